"""README and docs: everything they name exists, and the reference is complete."""

import argparse
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image
from test_layout import COMMANDS
from test_layout import ROOT as PACKAGE
from world import config_of

from persona_jax.errors import UserError
from persona_jax.evaluation import reference_statistics, report
from persona_jax.metrics import distributions
from persona_jax.models import aggregators
from persona_jax.pipelines import image_encoders
from persona_jax.runtime.command_line import VERBOSE, config_parser
from persona_jax.runtime.run_folder import leaves

ROOT = PACKAGE.parent
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    + [ROOT / "benchmarks/RESULTS.md", ROOT / "third_party/README.md"]
    + [*ROOT.glob("docs/**/*.md"), *PACKAGE.glob("assets/**/*.md")]
)
CONFIGS = sorted(path.stem for path in ROOT.glob("configs/*.py") if path.stem != "common")
WITH_CONFIG = ("train", "pretrain", "probe", "encode", "plan")
TO_BE_WRITTEN = {"configs/min.py"}
"""Files that CONTRIBUTING's examples create."""


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parser_of(command: str) -> argparse.ArgumentParser:
    module = importlib.import_module(f"persona_jax.{command}")
    if hasattr(module, "parser"):
        return module.parser()
    parser = config_parser(module.__doc__)
    parser.add_argument("--workdir")
    return parser


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings} - {"-h"}


def launcher_flags() -> set[str]:
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        parser = importlib.import_module("launcher").make_parser()
    finally:
        sys.path.remove(str(ROOT / "launch"))
    (places,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return set().union(*map(flags_of, places.choices.values()))


@pytest.fixture(scope="module")
def known_flags() -> dict[str, set[str]]:
    commands = {f"persona_jax.{name}": flags_of(parser_of(name)) for name in COMMANDS}
    for name in ("benchmarks", "benchmarks.inputs"):
        module = importlib.import_module("benchmarks.__main__" if name == "benchmarks" else name)
        commands[name] = flags_of(module.parser())
    return commands


@pytest.fixture(scope="module")
def known_keys() -> set[str]:
    return {key for name in CONFIGS for key in leaves(config_of(name))}


def sections(text: str) -> set[str]:
    """Returns GitHub's anchors of a page's headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def code_of(text: str) -> list[str]:
    """Returns a page's code: lines of blocks (continued lines joined), and spans."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))
    return [*(line for block in blocks for line in block.splitlines()), *spans]


def command_lines(text: str) -> list[tuple[str, list[str]]]:
    """Returns (module, arguments) of each ``python -m persona_jax.X`` or ``benchmarks``."""
    commands = []
    for line in code_of(text):
        for module, rest in re.findall(
            r"python -m ((?:persona_jax|benchmarks)[\w.]*)([^&|#]*)", line
        ):
            commands.append((module, shlex.split(rest)))
    return commands


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_readme_has_one_picture_and_the_tests_command():
    text = (ROOT / "README.md").read_text()
    assert len(re.findall(r"!\[", text)) == 1
    assert re.search(r"^<!-- tests -->\n```bash\n.* -m pytest -n 2\n```$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_exist(page):
    text = page.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page_id(page)}: {target}"
        if anchor:
            assert anchor in sections(file.read_text()), f"{page_id(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_named_exist(page):
    for word in code_of(page.read_text()):
        for path in re.findall(r"(?:persona_jax|configs|tests|docs|launch)/[\w/]+\.\w+", word):
            if path not in TO_BE_WRITTEN and "/NAME." not in path:
                assert (ROOT / path).exists(), f"{page_id(page)}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_and_their_flags_exist(page, known_flags, known_keys):
    for module, words in command_lines(page.read_text()):
        if module == "persona_jax.NAME":
            continue
        known = known_flags.get(module)
        if known is None:  # not one of the ten commands
            file = PACKAGE.parent / f"{module.replace('.', '/')}.py"
            assert file.exists(), f"{page_id(page)}: {module}"
            known = flags_of(importlib.import_module(module).parser())
        for word in words:
            flag = word.partition("=")[0]
            if flag.startswith("--config."):
                assert module.removeprefix("persona_jax.") in WITH_CONFIG
                assert flag.removeprefix("--config.") in known_keys, f"{page_id(page)}: {word}"
            elif flag.startswith("--"):
                assert flag in known, f"{page_id(page)}: {module} {word}"
            elif re.match(r"configs/\w+\.py", word):
                file, _, preset = word.partition(":")
                config_of(Path(file).stem, *([preset] if preset else []))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_flags_and_keys_anywhere_exist(page, known_flags, known_keys):
    """Checks flags and keys that are named without their command, too."""
    flags = set().union(*known_flags.values(), launcher_flags(), OF_OTHERS)
    for word in code_of(page.read_text()):
        for key in re.findall(r"--config\.([a-z][\w.]*)", word):
            assert key in known_keys, f"{page_id(page)}: --config.{key}"
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", word):
            if not flag.startswith("--config"):
                assert flag in flags, f"{page_id(page)}: {flag}"


OF_OTHERS = {"--check", "--slow", "--base", "--help", VERBOSE}
"""Flags of ruff, of the tests, of ``persona_jax.base.ship``, and of every command."""


@pytest.mark.parametrize("command", COMMANDS)
def test_the_reference_names_every_flag(command):
    text = (ROOT / "docs/reference/commands.md").read_text()
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    (part,) = (part for part in parts if command in part.partition("\n")[0].split(", "))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", part))
    assert flags_of(parser_of(command)) - {"--help"} <= named


@pytest.mark.parametrize("name", ["sa", "dreambooth", "lora"])
def test_the_reference_names_every_key(name):
    named = set(re.findall(r"`([\w.]+)`", (ROOT / "docs/reference/configuration.md").read_text()))
    assert leaves(config_of(name)).keys() <= named


def test_the_design_lists_every_folder():
    text = (ROOT / "docs/design.md").read_text()
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE))


def test_sections_of_the_design_that_the_code_names_exist():
    titles = set(re.findall(r"^#+ (.+)$", (ROOT / "docs/design.md").read_text(), re.MULTILINE))
    pointed = 0
    for file in [*PACKAGE.rglob("*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("configs/*.py")]:
        if file == Path(__file__):
            continue
        text = " ".join(file.read_text().split())
        assert "design §" not in text, file
        for title in re.findall(r'docs/design\.md, "([^"]+)"', text):
            assert title in titles, f"{file}: {title}"
            pointed += 1
    assert pointed


def examples(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return ["\n".join(line[len(i) :] for line in block.splitlines()) for i, block in blocks]


def example(name: str, module) -> object:
    """Returns the function that an example of CONTRIBUTING defines, run in its module's scope."""
    (code,) = (code for code in examples("CONTRIBUTING.md") if f"def {name}(" in code)
    names = dict(vars(module))
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return names[name]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_is_python(page):
    for code in examples(page_id(page)):
        compile(code, page_id(page), "exec")


def test_the_example_of_an_aggregator():
    minimum = example("minimum", aggregators)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    aggregate = minimum(jnp.asarray(x), jnp.asarray([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(aggregate, [x[0, :2].min(axis=0), np.zeros(4)])


def test_one_entry_makes_an_aggregator_known_everywhere(monkeypatch):
    """CONTRIBUTING's second block; taken out again."""
    (entry,) = (code for code in examples("CONTRIBUTING.md") if code.startswith("KINDS["))
    monkeypatch.setattr(aggregators, "KINDS", dict(aggregators.KINDS))
    names = vars(aggregators) | {"minimum": example("minimum", aggregators)}
    exec(compile(entry, "CONTRIBUTING.md", "exec"), names)
    built = aggregators.build("min", {})
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    found = built.apply({}, jnp.asarray(x), jnp.ones((1, 3)))
    np.testing.assert_array_equal(found, x.min(axis=1))


def test_the_reference_lists_the_kinds_of_aggregators():
    text = (ROOT / "docs/reference/configuration.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| `aggregator.kind` "))
    assert re.findall(r"`(\w+)`", row.split("|")[2]) == list(aggregators.KINDS)
    design = (ROOT / "docs/design.md").read_text()
    table = design[design.index("| `aggregator.kind` |") :].split("\n\n")[0]
    assert all(f"| `{kind}` |" in table for kind in aggregators.KINDS)


def test_the_example_of_an_image_encoder():
    encoder = example("_colours_encoder", image_encoders)(0.6)
    embedding = encoder.encode([Image.new("RGB", (40, 30), (0, 255, 51))])
    assert embedding.shape == (1, encoder.dim) == (1, 192)
    np.testing.assert_allclose(embedding.reshape(64, 3), np.tile([-1, 1, -0.6], (64, 1)), atol=1e-6)


def test_the_example_of_a_metric():
    coverage = example("coverage", distributions)
    real = np.random.default_rng(0).normal(size=(50, 4))
    assert coverage(real, real) == 1.0
    assert coverage(real + 100.0, real) == 0.0
    far = np.where(np.arange(50)[:, None] < 25, real, real + 100.0)
    assert coverage(real[:25], far) == 0.5
    with pytest.raises(UserError, match="more than 5"):
        coverage(real, real[:5])
    # The lines that add the column use names that exist where they are to be put.
    (column,) = (code for code in examples("CONTRIBUTING.md") if code.startswith("if real.feat"))
    columns, network = {}, "encoder"
    names = {"real": reference_statistics.of(real), "features": [real], "columns": columns}
    assert {*names, "network"} <= set(inspect.unwrap(report.realism).__code__.co_varnames)
    distributions_with_it = SimpleNamespace(coverage=coverage)
    exec(column, names | {"network": network, "distributions": distributions_with_it, "np": np})
    assert columns == {"coverage (encoder) ↑": 1.0}


def test_readme_uses_names_that_the_package_has():
    import persona_jax

    (code,) = examples("README.md")
    names = set(re.findall(r"\bpj\.(\w+)", code))
    assert names == {"load_pipeline", "load_adapter"}
    assert names <= set(persona_jax.__all__)
