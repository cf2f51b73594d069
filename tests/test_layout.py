"""The layout: folders, their layers, and the direction of imports."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "persona_jax"
COMMANDS = (
    "compare",
    "encode",
    "evaluate",
    "export",
    "plan",
    "pretrain",
    "probe",
    "sample",
    "score",
    "train",
)
LAYERS = (
    ("commands",),
    ("api",),
    ("base", "planning", "runs"),
    ("evaluation", "methods"),
    ("pipelines", "training"),
    ("metrics",),
    ("interop", "data"),
    ("models", "diffusion"),
    ("runtime",),
    ("errors",),
)
"""Layers, from the top. A folder imports from lower layers and from itself only."""


def folder_of(parts: tuple[str, ...]) -> str:
    """Returns the folder of a module, given its path below ``persona_jax``."""
    return "commands" if parts[0] in COMMANDS else parts[0]


def imported(file: Path) -> set[tuple[str, ...]]:
    """Returns the modules a file imports, also in functions, as paths below ``persona_jax``."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    split = (tuple(name.split(".")) for name in names)
    return {parts[1:] for parts in split if parts[0] == "persona_jax" and len(parts) > 1}


def arrows() -> dict[tuple[str, str], set[str]]:
    """Returns the importing files by (importing folder, imported folder)."""
    out: dict[tuple[str, str], set[str]] = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts in (("__init__",), ("__main__",)):
            continue
        for target in imported(file):
            pair = folder_of(parts), folder_of(target)
            if pair[0] != pair[1]:
                out.setdefault(pair, set()).add("/".join(parts))
    return out


def test_loose_files_are_the_commands():
    loose = {path.stem for path in ROOT.glob("*.py")}
    assert loose == {*COMMANDS, "errors", "__init__", "__main__"}


def test_every_folder_has_its_layer():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders | {"commands", "errors"} == {folder for layer in LAYERS for folder in layer}


def test_imports_point_down():
    depth = {folder: i for i, layer in enumerate(LAYERS) for folder in layer}
    wrong = {pair: files for pair, files in arrows().items() if depth[pair[0]] >= depth[pair[1]]}
    assert not wrong


def test_no_cycle_between_folders():
    below: dict[str, set[str]] = {}
    for folder, target in arrows():
        below.setdefault(folder, set()).add(target)
    done: set[str] = set()

    def visit(folder: str, above: tuple[str, ...]) -> None:
        if folder in above:
            pytest.fail(" → ".join([*above[above.index(folder) :], folder]))
        if folder not in done:
            for target in sorted(below.get(folder, ())):
                visit(target, (*above, folder))
            done.add(folder)

    for folder in sorted(below):
        visit(folder, ())


OF_COMMANDS = {"base/ship", "runs/reference_sets", "runtime/command_line"}
"""Modules below the commands that parse a command line themselves."""


def test_library_errors_name_no_flags():
    """Only commands name flags (:func:`persona_jax.runtime.command_line.with_flags` adds them)."""
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if folder_of(parts) == "commands" or "/".join(parts) in OF_COMMANDS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                texts = [x.value for x in ast.walk(node.exc) if isinstance(x, ast.Constant)]
                text = " ".join(x for x in texts if isinstance(x, str))
                if re.search(r"(?<![\w.])--[a-z]", text) and "python -m" not in text:
                    wrong.append(f"{'/'.join(parts)}:{node.lineno}: {text:.80}")
    assert not [line for line in wrong if "evaluation/trait_classifier" not in line]
