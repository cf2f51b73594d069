"""A finished run is opened on the base it was trained on, and on no other."""

import shutil
from pathlib import Path

import jax
import pytest
import torch_models
from world import adapter_config, config_of, use_people, write_adapter, write_people

import persona_jax as pj
from persona_jax import evaluate, export, sample
from persona_jax.errors import UserError
from persona_jax.methods import finetuning, finetuning_loop
from persona_jax.pipelines.pipeline import open_pipeline
from persona_jax.runs import finished_run
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.run_folder import write_run_files


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """An adapter and a person's LoRA, after whose training their base was changed."""
    root = tmp_path_factory.mktemp("world")
    write_people(root / "people", people=4)
    torch_models.write_pipeline(root / "base")
    config = adapter_config("sa", root / "people", root / "data", root / "base")
    config.aggregator.pooling_heads, config.data.test_people = 3, 2
    write_adapter(config, root / "sa")
    personal = config_of("lora", "lfw")
    use_people(personal, root / "people", root / "data")
    personal.data.test_people, personal.pipeline = 2, str(root / "base")
    parts = open_pipeline(personal)
    learnt = finetuning.init(personal, parts, jax.random.split(jax.random.key(0), 1))
    learnt = jax.tree.map(lambda x: x[0], learnt)
    write_run_files(root / "lora", personal)
    for name in ("person_0", "person_1", "person_2", "person_3"):
        finetuning_loop.save_person(root / "lora", name, learnt, parts, personal)
    shutil.copytree(root / "base", root / "original")
    settings = root / "base/unet/config.json"
    settings.write_text(settings.read_text() + "\n")
    return root


COMMANDS = {
    "evaluate sa": (evaluate, ["--workdir", "sa", "--references", "1"]),
    "evaluate lora": (evaluate, ["--workdir", "lora"]),
    "export sa": (export, ["--workdir", "sa", "--out", "out", "--format", "ip-adapter"]),
    "export lora": (
        export,
        ["--workdir", "lora", "--out", "out", "--format", "lora", "--person", "person_0"],
    ),
    "sample sa": (
        sample,
        ["--workdir", "sa", "--out", "out", "--photos", "people/person_0/0.png"],
    ),
    "sample lora": (sample, ["--workdir", "lora", "--out", "out", "--person", "person_0"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_a_base_that_was_changed(world, name, monkeypatch, capsys):
    module, flags = COMMANDS[name]
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as stop:
        run_with_arguments(module.parser(), module.main, [module.__name__, *flags])
    assert stop.value.code == 2
    now, trained = (_hash(world / folder) for folder in ("base", "original"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(
        f"{name.split()[1]}: the base at {world / 'base'} now has hash {now}, this run was trained "
        f"on {trained}; restore the original, or open the one of this run"
    )
    assert len(error) < 500
    assert not (world / "out").exists() or not list((world / "out").glob("*.png"))


def test_a_changed_image_encoder_is_refused(world, tmp_path):
    """And the base restored is opened."""
    shutil.copytree(world / "original", tmp_path / "base")
    config = adapter_config("sa", world / "people", world / "data", tmp_path / "base")
    config.aggregator.pooling_heads = 3
    write_adapter(config, tmp_path / "sa")
    assert finished_run.open_run(tmp_path / "sa").adapter is not None
    settings = tmp_path / "base/image_encoder/config.json"
    settings.write_text(settings.read_text() + "\n")
    with pytest.raises(UserError, match=r"the image encoder at .*base now has hash"):
        finished_run.open_run(tmp_path / "sa")
    with pytest.raises(UserError, match=r"the image encoder at .*base now has hash"):
        pj.load_adapter(tmp_path / "sa", pj.load_pipeline(str(tmp_path / "base")))


def _hash(base: Path) -> str:
    return pj.load_pipeline(str(base)).hash
