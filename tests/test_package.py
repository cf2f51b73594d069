"""The package: the wheel's contents, its dependencies, and its use after installation."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from persona_jax import __main__ as program
from persona_jax.errors import UserError
from persona_jax.runtime import command_line

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {
    "absl": "absl-py",
    "huggingface_hub": "huggingface-hub",
    "ml_collections": "ml-collections",
    "orbax": "orbax-checkpoint",
    "PIL": "pillow",
    "tensorflow_datasets": "tensorflow-datasets",
}
"""Import names that differ from the distribution's name."""
SILENT = {"importlib-resources"}
"""Distributions that a dependency needs without declaring it."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the repository's files to keep the source tree clean."""
    root = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    (root / "source").mkdir()
    for name in ("persona_jax", "configs"):
        shutil.copytree(ROOT / name, root / "source" / name, ignore=ignored, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--quiet", "--wheel-dir", str(root), str(root / "source")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (file,) = root.glob("*.whl")
    return file


def test_the_wheel_holds_modules_configs_assets_and_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    here = {str(file.relative_to(ROOT)) for file in (ROOT / "persona_jax").rglob("*.py")}
    assert here <= set(names)
    configs = {f"persona_jax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    assert configs <= set(names)
    assert "persona_jax/py.typed" in names
    for name in ("assets/manifest.toml", "assets/tiny/ip_adapter.safetensors"):
        assert f"persona_jax/{name}" in names
    others = {name.split("/")[0] for name in names} - {"persona_jax"}
    assert [x for x in others if not x.endswith(".dist-info")] == []


def test_its_metadata_names_the_command_and_the_project(wheel):
    archive = zipfile.ZipFile(wheel)
    read = {
        Path(name).name: archive.read(name).decode()
        for name in archive.namelist()
        if ".dist-info/" in name
    }
    assert "persona-jax = persona_jax.__main__:main" in read["entry_points.txt"]
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.11", "Typing :: Typed"):
        assert line in read["METADATA"]


def imported_distributions() -> set[str]:
    """Returns the distributions that the package's modules import, also in functions."""
    roots: set[str] = set()
    for file in (*(ROOT / "persona_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots.add(node.module.split(".")[0])
    own = {"persona_jax", *(file.stem for file in (ROOT / "configs").glob("*.py"))}
    return {DISTRIBUTIONS.get(x, x) for x in roots - own - set(sys.stdlib_module_names)}


def names(requirements: list[str]) -> set[str]:
    """Returns the import names of requirements, without versions and extras."""
    return {re.split(r"[<>=\[ ]", x)[0].replace("_", "-") for x in requirements}


def test_dependencies_are_what_is_imported():
    imported = {x.replace("_", "-") for x in imported_distributions()}
    needed = names(PROJECT["dependencies"])
    extras = names([x for some in PROJECT["optional-dependencies"].values() for x in some])
    assert needed - SILENT <= imported
    assert imported <= needed | extras | {"dlib"}  # dlib is imported from dlib-bin


def test_commands_are_the_modules_and_are_listed(capsys, monkeypatch):
    files = {file.stem for file in (ROOT / "persona_jax").glob("*.py")}
    assert set(program.COMMANDS) == files - {"__init__", "__main__", "errors"}
    monkeypatch.setattr(sys, "argv", ["persona-jax", "--help"])
    program.main()
    listed = capsys.readouterr().out
    assert all(f"\n{command} " in listed for command in program.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["persona-jax", "draw"])
    with pytest.raises(SystemExit) as stop:
        program.main()
    assert stop.value.code == 2


@pytest.mark.parametrize("name", ["sa", "configs/sa.py", "sa.py"])
def test_configs_are_found_from_any_folder(tmp_path, monkeypatch, name):
    known = command_line.load_config(str(ROOT / "configs/sa.py") + ":tiny")
    monkeypatch.chdir(tmp_path)
    assert command_line.load_config(f"{name}:tiny").to_dict() == known.to_dict()
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'a': 1})"
    )
    assert command_line.load_config("mine.py").a == 1


@pytest.mark.parametrize("name", ["none", "common", "other/sa.py", "../configs/sa.py"])
def test_configs_that_are_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file, nor one of the package's: .*\bsa\b"):
        command_line.load_config(f"{name}:tiny")


@pytest.mark.slow
def test_a_fresh_environment_trains_samples_and_exports(wheel, tmp_path):
    """Installs the wheel and runs both forms of the command in another folder."""
    venv.create(tmp_path / "env", with_pip=True)
    bin_ = tmp_path / "env/bin"

    def run(*argv: str) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
        done = subprocess.run(
            [str(bin_ / argv[0]), *argv[1:]],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=clean,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run("python", "-m", "pip", "install", "--quiet", str(wheel))
    people = {"train": 16, "validation": 2, "test": 2}
    few = [f"--config.data.portraits.people.{k}={v}" for k, v in people.items()]
    few += ["--config.optimizer.steps=2", "--config.grid.people=1", "--config.grid.samples=1"]
    few += ["--config.sampling.steps=2", "--config.data.test_people=2"]
    run("persona-jax", "train", "--config", "sa:tiny", "--workdir", "a", *few)
    run(
        "python",
        "-m",
        "persona_jax.train",
        "--config",
        "configs/sa.py:tiny",
        "--workdir",
        "b",
        *few,
    )
    same = [(tmp_path / x / "config.json").read_text() for x in "ab"]
    assert same[0] == same[1]
    photos = sorted(map(str, (tmp_path / "a/example").glob("*.png")))
    run(
        "persona-jax",
        "sample",
        "--workdir",
        "a",
        "--photos",
        *photos,
        "--num",
        "1",
        "--steps",
        "2",
        "--out",
        "out",
    )
    assert (tmp_path / "out/0000.png").is_file()
    run("persona-jax", "export", "--workdir", "a", "--format", "ip-adapter", "--out", "files")
    assert (tmp_path / "files/ip_adapter.safetensors").is_file()
    code = (
        "import persona_jax as pj; pipe = pj.load_pipeline('tiny');"
        "adapter = pj.load_adapter('a', pipe);"
        f"images = pipe(photos={photos!r}, adapter=adapter, steps=2, seed=0);"
        "images[0].save('five.png')"
    )
    run("python", "-c", code)
    assert (tmp_path / "five.png").is_file()
