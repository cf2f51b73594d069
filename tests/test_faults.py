"""Faults of a run: kills, signals, a full disk, damaged files, a second run in the same workdir.

The processes are real, started by launch/run on a tiny random base. After any fault, the same
command resumes from the last complete checkpoint to the same losses; one line reports the fault.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch_models
from world import ROOT, write_people

from persona_jax.interop.checkpoints import load_params, newest_step

STEPS, SAVE_EVERY = 100, 10
CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from world import adapter_config
def get_config():
    config = adapter_config("sa", *(Path({root!r}) / name for name in ("people", "data", "base")))
    config.optimizer.steps, config.save_every, config.grid.people = {steps}, {save_every}, 0
    return config
"""


class Run:
    """A launch that runs in the background of the test."""

    def __init__(self, root: Path, workdir: Path, processes: int, *flags: str):
        """`processes` with two devices together."""
        self.workdir, self.processes = workdir, processes
        level = [w for w in os.environ["XLA_FLAGS"].split() if "device_count" not in w]
        count = f"--xla_force_host_platform_device_count={2 // processes}"
        environment = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join([*level, count]),
            # Runs share their compiled programs.
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.errors = root / f"errors_{time.monotonic_ns()}"
        command = [ROOT / "launch/run", "local", "--processes", str(processes)]
        command += [
            "--python",
            sys.executable,
            "--",
            "--config",
            root / "quick.py",
            "--workdir",
            workdir,
            *flags,
        ]
        with self.errors.open("w") as errors:
            self.launcher = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=errors,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )

    def said(self) -> str:
        """Returns the output of process 0 and the launcher."""
        return self.errors.read_text()

    def wait(self, condition) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            assert self.launcher.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def wait_for_checkpoint(self, after: int = 0) -> None:
        """Waits until a checkpoint of a later step is complete."""
        self.wait(lambda: (newest_step(self.workdir / "checkpoints") or 0) > after)

    def pids(self) -> list[int]:
        """Returns the ids of the processes, if there are several."""
        return [int(n) for n in re.search(r"processes, ([\d ]+);", self.said())[1].split()]

    def finish(self) -> tuple[int, str]:
        """Waits for the end; returns the exit status and the output."""
        try:
            self.launcher.wait(timeout=180)
        finally:
            self.launcher.kill()
        return self.launcher.returncode, self.said()


def losses(workdir: Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [line["step"] for line in entries] == list(range(1, len(entries) + 1))
    return {line["step"]: line["loss"] for line in entries}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A base, people and a configuration."""
    root = tmp_path_factory.mktemp("faults")
    torch_models.write_pipeline(root / "base")
    write_people(root / "people")
    tests = str(Path(__file__).parent)
    text = CONFIG.format(tests=tests, root=str(root), steps=STEPS, save_every=SAVE_EVERY)
    (root / "quick.py").write_text(text)
    return root


@pytest.fixture(scope="module")
def whole(root) -> dict[int, float]:
    """The losses of an undisturbed run."""
    code, said = Run(root, root / "whole", 1).finish()
    assert code == 0, said
    assert len(losses(root / "whole")) == STEPS
    return losses(root / "whole")


def test_nothing_is_lost_but_the_steps_since_the_last_save(root, whole, tmp_path):
    workdir = tmp_path / "run"

    # One of two processes is killed.
    run = Run(root, workdir, 2)
    run.wait_for_checkpoint(after=SAVE_EVERY)
    os.kill(run.pids()[1], signal.SIGKILL)
    begin = time.monotonic()
    code, said = run.finish()
    assert code == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 30
    assert "process 1 was killed by SIGKILL and the others were ended; run the same command" in said
    assert f"{workdir}/logs/process_1.log ends:" in said

    # The newest checkpoint is truncated, and an encoded array is missing.
    newest = newest_step(workdir / "checkpoints")
    files = (workdir / f"checkpoints/{newest}/params").rglob("*")
    largest = max((f for f in files if f.parent.name == "d"), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:20])
    (array,) = (root / "data/encoded").glob("*/*/moments")
    array.unlink()
    run = Run(root, workdir, 2)
    run.wait_for_checkpoint(after=newest)
    assert f"{workdir}/checkpoints/{newest}: damaged (" in run.said()
    assert f"resuming at step {newest - SAVE_EVERY}" in run.said()
    encoded = run.said() + (workdir / "logs/process_1.log").read_text()
    assert f"encodings {array.parent}: damaged (" in encoded
    assert "encoding again" in encoded

    # A second run in the workdir is refused and changes nothing; then one process gets SIGTERM.
    pids = run.pids()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    before = (workdir / "config.json").read_bytes()
    code, said = Run(root, workdir, 1, "--config.optimizer.learning_rate=0.5").finish()
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert f"--workdir {workdir}: another run is using it" in line
    assert (workdir / "config.json").read_bytes() == before
    os.kill(pids[1], signal.SIGTERM)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    code, said = run.finish()
    assert code == 128 + signal.SIGTERM, said
    step = newest_step(workdir / "checkpoints")
    assert f"SIGTERM: saved at step {step} of {STEPS}" in said
    assert "stopped by SIGTERM; run the same command again" in said

    # A single process resumes, on another mesh.
    code, said = Run(root, workdir, 1, "--config.mesh.fsdp=2").finish()
    assert code == 0, said
    assert f"resuming at step {step}" in said
    resumed = losses(workdir)
    np.testing.assert_allclose(list(resumed.values()), list(whole.values()), rtol=1e-3)


def test_a_full_disk_at_a_checkpoint_ends_all_processes_in_a_line(root, tmp_path):
    """A limit on file size imitates a full disk: the write fails half-way."""
    workdir = tmp_path / "run"
    run = Run(root, workdir, 2)
    run.wait_for_checkpoint()
    resource.prlimit(run.pids()[0], resource.RLIMIT_FSIZE, (2**14, 2**14))
    code, said = run.finish()
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(r"checkpoint of step \d+ could not be written: .*make room", line)
    assert "Traceback" not in said
    assert "process 0 ended with exit status 2 and the others were ended" in said
    assert newest_step(workdir / "checkpoints") >= SAVE_EVERY
    assert load_params(workdir / "checkpoints")


def test_a_built_file_that_is_gone_is_named_in_a_line(root, whole, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    (file,) = (tmp_path / "data").rglob("*.array_record-*")
    file.unlink()
    flags = [f"--config.data.data_dir={tmp_path / 'data'}"]
    code, said = Run(root, tmp_path / "run", 1, *flags).finish()
    assert code == 2, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line == f"error: {file}: missing; remove the folder {file.parent}, and it is built again"
