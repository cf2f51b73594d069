import argparse
import json
import os
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from persona_jax.errors import UserError, listed
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.run_folder import (
    config_difference,
    read_config,
    refuse_another_run,
    write_run_files,
)

CONFIG = """
import neighbour
from ml_collections import ConfigDict
from persona_jax.errors import UserError

def get_config(preset="tiny"):
    if preset not in ("tiny", "lfw"):
        raise UserError(f"preset {preset!r}: expected tiny or lfw")
    return ConfigDict({"steps": 5, "rate": 1e-3, "name": preset, "on": True,
                       "sizes": (1, 2), "model": {"width": neighbour.WIDTH}})
"""

MAIN = '''
"""Entry point of the test."""
import os, signal, sys
from persona_jax.runtime import command_line
from persona_jax.errors import UserError

def main(config, workdir):
    if config.name == "mistake":
        raise UserError("photos/a.jpg: no such\\nfile")
    if config.name == "bug":
        raise KeyError("bug")
    if config.name == "interrupt":
        # As under a terminal; a shell's background job starts with the signal ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    print(config.to_json(), workdir)

command_line.run_with_config(main)
'''

SAMPLE = """
import argparse
from persona_jax.runtime import command_line

parser = argparse.ArgumentParser()
parser.add_argument("--photos", nargs="+", required=True)
parser.add_argument("--num", type=int, default=8)
command_line.run_with_arguments(parser, lambda args: print(args.photos, args.num))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command_line")
    files = {
        "sa.py": CONFIG, "neighbour.py": "WIDTH = 3", "main.py": MAIN, "sample.py": SAMPLE,
        "broken.py": "def get_config(:", "wrong.py": "def get_config(): return {}['x']",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def run(folder, program, *arguments):
    command = [sys.executable, program, *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


def test_overrides_reach_main(folder):
    done = run(
        folder, "main.py", "--config", "sa.py:lfw", "--workdir=w", "--config.model.width=7",
        "--config.rate", "1", "--noconfig.on", "--config.sizes=(3,4)",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config, workdir = done.stdout.rsplit(" ", 1)
    assert json.loads(config) == {
        "model": {"width": 7}, "name": "lfw", "on": False, "rate": 1.0,
        "sizes": [3, 4], "steps": 5,
    }  # fmt: skip
    assert workdir == "w\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config=sa.py"], "required: --workdir"),
        (["--workdir=w"], "required: --config"),
        (["--config=no.py", "--workdir=w"], "--config no.py: no such file"),
        (["--config=sa.py:big", "--workdir=w"], "preset 'big': expected tiny or lfw"),
        (["--config=broken.py", "--workdir=w"], "SyntaxError"),
        (["--config=wrong.py", "--workdir=w"], "--config wrong.py: KeyError: 'x'"),
        (["--config=sa.py", "--workdir=w", "--zap=1"], "'zap'"),
        (["--config=sa.py", "--workdir=w", "a.jpg"], "'a.jpg'"),
        (
            ["--config=sa.py", "--workdir=w", "--config.stepz=1"],
            "--config.stepz: no such key; did you mean steps",
        ),
        (["--config=sa.py", "--workdir=w", "--config.model.x=1"], "--config.model.x: no such key"),
        (["--config=sa.py", "--workdir=w", "--config.steps=1.5"], "--config.steps=1.5"),
        (["--config=sa.py", "--workdir=w", "--config.rate=fast"], "--config.rate=fast"),
        (["--config=sa.py", "--workdir=w", "--config.on=maybe"], "--config.on=maybe"),
        (["--config=sa.py", "--workdir=w", "--config.sizes=a"], "--config.sizes: found ('a',)"),
        (
            ["--config=sa.py", "--workdir=w", "--config.name=mistake"],
            "error: photos/a.jpg: no such file",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(folder, arguments, expected):
    done = run(folder, "main.py", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert done.stdout == ""


def test_bugs_keep_their_traceback_and_ctrl_c_is_130(folder):
    done = run(folder, "main.py", "--config=sa.py", "--workdir=w", "--config.name=bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    done = run(folder, "main.py", "--config=sa.py", "--workdir=w", "--config.name=interrupt")
    assert done.returncode == 130, done.stderr


def test_help_shows_what_the_entry_point_is_for(folder):
    done = run(folder, "main.py", "--help")
    assert done.returncode == 0
    assert "Entry point of the test." in done.stdout
    assert "--config.any.key=value" in done.stdout


def test_argparse_entry_points(folder):
    done = run(folder, "sample.py", "--photos", "a.jpg", "b.jpg", "--num", "2")
    assert (done.returncode, done.stdout) == (0, "['a.jpg', 'b.jpg'] 2\n")
    for arguments, expected in (
        (["--photos"], "--photos: expected at least one argument"),
        (["--photos", "a", "--num", "x"], "--num: invalid int value: 'x'"),
        (["--photos", "a", "--zap"], "unrecognized arguments: --zap"),
    ):
        done = run(folder, "sample.py", *arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert expected in done.stderr


def config(**changes):
    return ConfigDict({"steps": 5, "sizes": (1, 2), "model": {"width": 3, "none": None}} | changes)


def test_config_round_trip(tmp_path):
    write_run_files(tmp_path / "run", config().lock())
    again = read_config(tmp_path / "run")
    assert config_difference(config(), again) == []
    assert again.sizes == (1, 2)
    assert again.model.none is None
    assert (tmp_path / "run" / "run.json").exists()
    with pytest.raises(UserError, match=r"is .* a run's workdir"):
        read_config(tmp_path)
    (tmp_path / "run" / "config.json").write_text('{"steps": ')
    with pytest.raises(UserError, match="not readable as JSON"):
        read_config(tmp_path / "run")


def test_config_difference_names_the_keys():
    after = config(steps=6, new="x", model={"width": 4})
    assert config_difference(config(), after) == [
        "model.none: null, now absent",
        "model.width: 3, now 4",
        'new: absent, now "x"',
        "steps: 5, now 6",
    ]


def test_another_run_in_the_workdir_is_refused(tmp_path):
    before = ConfigDict({"steps": 5, "model": {"kind": "a", "width": 2}})
    refuse_another_run(tmp_path, before, ["model"])
    write_run_files(tmp_path, before)
    longer = ConfigDict({"steps": 9, "model": {"kind": "a", "width": 2}})
    refuse_another_run(tmp_path, longer, ["model"])
    other = ConfigDict({"steps": 5, "model": {"kind": "b", "width": 2}})
    with pytest.raises(UserError, match=r'model.kind: "a", now "b"'):
        refuse_another_run(tmp_path, other, ["model"])


def refuse(message: str, capsys, *flags: str) -> list[str]:
    """Returns the output of a command that fails with a user error."""

    def main(arguments):
        raise UserError(message, [f"tensor {i}" for i in range(1000)])

    with pytest.raises(SystemExit) as stop:
        run_with_arguments(argparse.ArgumentParser(), main, ["refuse", *flags])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("length", [20, 470, 490, 35000])
def test_errors_are_short_and_verbose_shows_all(capsys, length):
    (line,) = refuse("x" * length, capsys)
    assert len(line) < 500
    assert line.endswith("(--verbose: all of it)")
    first, *details = refuse("x" * length, capsys, "--verbose")
    assert first == f"error: {'x' * length}"
    assert details == [f"  tensor {i}" for i in range(1000)]


def test_long_lists_of_names_are_shortened():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(1000)], 12) == "0, 1, 2, 3 and 996 more"
    assert len(listed(["x" * 10**6] * 2)) < 150
