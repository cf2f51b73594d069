"""The launcher: what it would run on clusters, and how it handles processes on this machine.

The processes are small programs, given by --python in place of the interpreter; those of
tests/test_faults.py are real.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ["--config", "configs/sa.py:lfw", "--workdir", "runs/it's one", "--config.prompt=a $HOME"]
RUN = ["-m", "persona_jax.train", *COMMAND]


def launch(*arguments, command=COMMAND, **options):
    return subprocess.run(
        [ROOT / "launch/run", *arguments, "--", *command],
        capture_output=True, text=True, timeout=60, check=False, **options,
    )  # fmt: skip


def printed(*arguments, **options) -> str:
    done = launch(*arguments, "--dry-run", **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what would run -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: local|tpu|slurm|k8s"),
        (["moon"], "moon"),
        (["local"], "required: --processes"),
        (["local", "--processes", "0"], "at least 1"),
        (["local", "--processes", "2", "--module", "nothing"], "no persona_jax.nothing"),
        (["local", "--processes", "1", "--python", "/no/python"], "/no/python: not found"),
        (["tpu", "--name", "v5"], "required: --zone"),
        (["slurm"], "required: --nodes"),
        (["slurm", "--nodes", "2", "--gpus-per-node", "many"], "--gpus-per-node: 'many'"),
        (["k8s", "--name", "sa"], "required: --image, --nodes"),
        (["k8s", "--name", "Sa_1", "--image", "i", "--nodes", "2"], "--name: 'Sa_1'"),
        (["k8s", "--name", "sa", "--image", "i", "--nodes", "2", "--claim", "disk"], "--claim"),
        (["k8s", "--name", "sa", "--image", "i", "--nodes", "2", "--tpu", "v5e"], "--tpu"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, expected, tmp_path):
    done = launch(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr


def test_a_command_is_needed(tmp_path):
    done = launch("local", "--processes", "2", command=[], cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nothing to run" in done.stderr


def test_local_dry_run(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--a"}
    python = ["--python", "py"]
    text = printed("local", "--processes", "2", *python, cwd=tmp_path, env=environment)
    first, second, last = text.splitlines()
    words = shlex.split(first)
    variables = dict(word.split("=", 1) for word in words[: words.index("py")])
    assert words[words.index("py") :] == ["py", *RUN, "&"]
    assert variables["JAX_NUM_PROCESSES"] == "2"
    assert variables["JAX_PROCESS_ID"] == "0"
    assert variables["JAX_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")
    assert variables["XLA_FLAGS"].startswith("--a --xla_force_host_platform_device_count=")
    assert "JAX_PROCESS_ID=1" in second
    assert shlex.split(second)[-4:] == [">>", "runs/it's one/logs/process_1.log", "2>&1", "&"]
    assert last == "wait"
    # One process is the command itself.
    assert shlex.split(printed("local", "--processes", "1", *python)) == ["py", *RUN]
    assert list(tmp_path.iterdir()) == []


def test_gpus_are_dealt_out(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "0,1,4,5"}
    text = printed("local", "--processes", "2", env=environment)
    assert "CUDA_VISIBLE_DEVICES=0,1 " in text
    assert "CUDA_VISIBLE_DEVICES=4,5 " in text
    done = launch("local", "--processes", "3", env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "4 GPUs do not divide" in done.stderr


def program(folder: Path, name: str, text: str) -> Path:
    """Writes a Python program of that name, for PATH or --python."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\nimport json, os, signal, sys, time\n{text}\n")
    (folder / name).chmod(0o755)
    return folder / name


def with_path(folder: Path) -> dict[str, str]:
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


ECHO = "print(json.dumps(sys.argv[1:]), flush=True)"


def test_tpu_runs_the_command_on_every_worker(tmp_path):
    flags = ["--name", "v5", "--zone", "us-x", "--project", "p", "--python", "py"]
    first, second = printed("tpu", *flags).splitlines()
    words = shlex.split(first)
    assert words[:10] == [
        "gcloud", "compute", "tpus", "tpu-vm", "ssh", "v5", "--zone", "us-x", "--project", "p",
    ]  # fmt: skip
    assert words[10] == "--worker=all"
    stop = shlex.split(second.removeprefix("# to stop it: "))
    assert stop[:-1] == words[:-1]
    # Runs the workers' script in a local shell.
    script = words[-1].removeprefix("--command=")
    (tmp_path / "persona_jax").mkdir()
    program(tmp_path / "bin", "py", f"{ECHO}\nsys.exit(3 if os.environ['WORKER'] == '1' else 0)")
    program(tmp_path / "bin", "curl", "print(os.environ['WORKER'])")
    for worker in ("0", "1"):
        environment = with_path(tmp_path / "bin") | {"WORKER": worker, "USER": f"test{os.getpid()}"}
        done = subprocess.run(
            ["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        if worker == "0":
            assert (done.returncode, json.loads(done.stdout)) == (0, RUN), done.stderr
        else:
            log = tmp_path / "persona_jax/runs/it's one/logs/process_1.log"
            assert json.loads(log.read_text()) == RUN
            assert (done.returncode, done.stdout) == (3, "")
            assert done.stderr.startswith("worker 1: exit status 3\n")
            assert json.loads(done.stderr.splitlines()[1]) == RUN
    Path(f"/tmp/v5.test{os.getpid()}.pid").unlink()


def test_slurm_script(tmp_path):
    flags = ["--nodes", "2", "--gpus-per-node", "a100:4", "--time", "1:00:00", "--python", "py"]
    text = printed("slurm", *flags, "--partition", "long", "--cpus-per-task", "8")
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line]
    assert {
        "nodes=2", "gpus-per-node=a100:4", "ntasks-per-node=4", "time=1:00:00", "partition=long",
        "signal=TERM@120", "requeue", "cpus-per-task=8",
    } <= set(options)  # fmt: skip
    program(tmp_path / "bin", "srun", f"{ECHO}\nsys.exit(143)")
    logs = tmp_path / "runs/it's one/logs"
    logs.mkdir(parents=True)
    (logs / "process_1.log").write_text("the end\n")
    done = subprocess.run(
        ["bash", "-c", text], cwd=tmp_path, env=with_path(tmp_path / "bin"), capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 143
    words = json.loads(done.stdout.splitlines()[0])
    assert words[words.index("py") :] == ["py", *RUN]
    assert "--kill-on-bad-exit=1" in words
    assert "--cpus-per-task=8" in words
    assert "--output=runs/it's one/logs/process_%t.log" in words
    assert "the end" in done.stdout


def test_sbatch_and_kubectl_read_what_is_printed(tmp_path):
    for name in ("sbatch", "kubectl"):
        program(tmp_path / "bin", name, f"{ECHO}\nprint(sys.stdin.read())")
    flags = {"slurm": ["--nodes", "2"], "k8s": ["--name", "sa", "--image", "i", "--nodes", "2"]}
    for place, own in flags.items():
        text = printed(place, *own)
        done = launch(place, *own, cwd=tmp_path, env=with_path(tmp_path / "bin"))
        assert done.returncode == 0, done.stderr
        given, _, read = done.stdout.partition("\n")
        assert json.loads(given) == ([] if place == "slurm" else ["apply", "-f", "-"])
        assert read.startswith(text.rpartition("\n# to be read by")[0])
        assert "process 0: " in done.stdout.splitlines()[-1]


def test_jobset(tmp_path):
    yaml = pytest.importorskip("yaml")
    flags = ["--name", "sa", "--image", "site/image:1", "--nodes", "2", "--gpus-per-node", "8"]
    command = [*COMMAND, "--config.note=$(X)", "--config.a=é: {}\n#"]
    text = printed("k8s", *flags, "--claim", "disk:/mnt", "--namespace", "n", command=command)
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"] == {"name": "sa", "namespace": "n"}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 10
    (jobs,) = jobset["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (2, 2, 0)
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][0] == "python"
    assert [word.replace("$$(", "$(") for word in container["command"][3:]] == command
    assert "--config.note=$$(X)" in container["command"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert variables["JAX_COORDINATOR_ADDRESS"] == f"sa-{jobs['name']}-0-0.sa:1234"
    assert variables["JAX_NUM_PROCESSES"] == "2"
    index = {one["name"]: one for one in container["env"]}["JAX_PROCESS_ID"]["valueFrom"]
    assert "job-completion-index" in index["fieldRef"]["fieldPath"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert mounts == {"shm": "/dev/shm", "shared": "/mnt"}
    flags = [*flags[:6], "--tpu", "tpu-v5-lite-podslice/4x4/4"]
    (jobs,) = yaml.safe_load(printed("k8s", *flags))["spec"]["replicatedJobs"]
    pod = jobs["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"


# --- processes on this machine --------------------------------------------------------------


def start(folder: Path, text: str, *flags: str) -> subprocess.Popen:
    """Starts two processes of a program that has its process number in `i`."""
    python = program(folder / "bin", "python", f"i = int(os.environ['JAX_PROCESS_ID'])\n{text}")
    flags = ["--processes", "2", "--python", python, *flags, "--", "--workdir", folder / "run"]
    return subprocess.Popen(
        [ROOT / "launch/run", "local", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


def when(*paths: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_process_0_prints_to_the_terminal_and_the_others_to_files(tmp_path):
    for _ in range(2):
        code, out, err = finish(start(tmp_path, "print('I am', i)"))
        assert (code, out) == (0, "I am 0\n"), err
    log = tmp_path / "run/logs/process_1.log"
    assert [line for line in log.read_text().splitlines() if line[:3] != "---"] == ["I am 1"] * 2
    assert str(log.parent) in err


def test_one_dead_process_ends_all_with_its_error(tmp_path):
    text = "print('step', i)\nif i: sys.exit('no room\\nfor it')\ntime.sleep(60)"
    begin = time.monotonic()
    code, _, err = finish(start(tmp_path, text, "--logs", str(tmp_path / "else where")))
    assert code == 1
    assert time.monotonic() - begin < 20
    assert "process 1 ended with exit status 1 and the others were ended" in err
    assert "else where/process_1.log ends:\n  step 1\n  no room\n  for it\n" in err


def test_after_a_death_a_process_that_ignores_sigterm_is_killed(tmp_path):
    text = """
signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[-1] + '/told', 'w').close())
if i: os.kill(os.getpid(), signal.SIGKILL)
while True: time.sleep(0.1)"""
    (tmp_path / "run").mkdir()
    code, _, err = finish(start(tmp_path, text))
    assert code == 128 + signal.SIGKILL
    assert "process 1 was killed by SIGKILL" in err
    assert (tmp_path / "run/told").exists()


SAVES = """
def stop(number, _):
    time.sleep(0.2)
    with open(sys.argv[-1] + f'/saved{i}', 'a') as file: file.write(f'{number} ')
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, stop)
open(sys.argv[-1] + f'/ready{i}', 'w').close()
while True: time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_is_forwarded_to_all_once(tmp_path, number):
    (tmp_path / "run").mkdir()
    process = start(tmp_path, SAVES)
    when(tmp_path / "run/ready0", tmp_path / "run/ready1")
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 128 + number
    assert f"stopped by {number.name}; run the same command again" in err
    assert [(tmp_path / f"run/saved{i}").read_text() for i in range(2)] == [f"{number} "] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child of its parent's death")
def test_a_killed_launcher_leaves_no_process_behind(tmp_path):
    (tmp_path / "run").mkdir()
    process = start(tmp_path, SAVES)
    when(tmp_path / "run/ready0", tmp_path / "run/ready1")
    process.kill()
    when(tmp_path / "run/saved0", tmp_path / "run/saved1")
    finish(process)
