"""DreamBooth and LoRA as a user runs them, at the smallest size."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch_models
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.numpy import load_file
from world import ROOT, config_of, use_people, write_people

from persona_jax import sample, train
from persona_jax.errors import UserError
from persona_jax.methods import finetuning, finetuning_loop
from persona_jax.pipelines import pipeline
from persona_jax.runtime.command_line import run_with_arguments


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    torch_models.write_pipeline(folder)
    return folder


def config(name: str, base: Path, people: Path, data_dir: Path):
    settings = config_of(name, "tiny")
    settings.pipeline = str(base)
    use_people(settings, people, data_dir)
    settings.people.update({"group": "train", "count": 3, "at_once": 2})
    settings.references.n = 4
    settings.batch_size = 8
    settings.optimizer.learning_rate = 1e-3
    settings.optimizer.steps = 2
    settings.prior.update({"pictures": 3, "steps": 2})
    settings.sampling.steps = 2
    return settings


@pytest.fixture(scope="module", params=finetuning.METHODS)
def run(request, base, tmp_path_factory):
    """(config, workdir) of three people, two at once."""
    root = tmp_path_factory.mktemp(request.param)
    chosen = config(request.param, base, write_people(root / "people", people=5), root / "data")
    train.main(chosen, root / "run")
    return chosen, root / "run"


def generate(workdir: Path, out: Path, *flags: str) -> None:
    argv = ["sample", "--workdir", str(workdir), "--out", str(out), "--num", "2", *flags]
    run_with_arguments(sample.parser(), sample.main, argv)


def names_in(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "people").iterdir())


def test_everyone_is_trained_and_nothing_else_is_left(run):
    chosen, workdir = run
    names = names_in(workdir)
    assert len(names) == 3
    assert not list((workdir / "training").iterdir())
    parts = pipeline.load(chosen.pipeline, only=("unet", "vae", "text_encoder"))
    before = np.asarray(parts.unet.params["conv_in"]["kernel"])
    learnt = [finetuning_loop.load_person(workdir, name, parts, chosen) for name in names]
    leaves = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t["unet"])]) for t in learnt]
    assert all(np.abs(a - b).max() > 0 for a, b in itertools.pairwise(leaves))
    moved = np.abs(np.asarray(learnt[0]["unet"]["conv_in"]["kernel"]) - before).max()
    assert (moved > 0) == (chosen.method == "dreambooth")


def test_running_again_trains_nobody_anew(run):
    chosen, workdir = run
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("people/*/*")}
    train.main(chosen, workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("people/*/*")} == before


def test_files_are_what_stock_libraries_read(run):
    chosen, workdir = run
    folder = workdir / "people" / names_in(workdir)[0]
    if chosen.method == "dreambooth":
        theirs = UNet2DConditionModel.from_pretrained(folder / "unet")
        assert theirs.config.sample_size == torch_models.TINY_UNET["sample_size"]
    else:
        tensors = load_file(folder / "pytorch_lora_weights.safetensors")
        layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
        into, out = (
            torch_models.TINY_UNET["cross_attention_dim"],
            torch_models.TINY_UNET["block_out_channels"][-1],
        )
        assert tensors[f"{layer}.lora_A.weight"].shape == (chosen.lora.rank, into)
        assert tensors[f"{layer}.lora_B.weight"].shape == (out, chosen.lora.rank)


def test_a_person_is_sampled(run, tmp_path):
    _, workdir = run
    generate(workdir, tmp_path, "--person", names_in(workdir)[0], "--prompt", "a sad person")
    record = json.loads((tmp_path / "sample.json").read_text())
    assert record["prompt"] == "a sad sks person"
    assert Image.open(tmp_path / "0001.png").size[0] > 8


@pytest.mark.parametrize(
    ("prompt", "called"),
    [
        ("a photo of a person", "a photo of a sks person"),
        ("a picture of a woman with a calm face", "a picture of a sks woman with a calm face"),
        ("a man, no other person", "a sks man, no other person"),
        ("a sks man", "a sks man"),
    ],
)
def test_the_token_stands_before_the_first_noun(prompt, called):
    assert finetuning.insert_token(prompt, "sks", config_of("lora").nouns) == called


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--person", "nobody"], "no such person; there are: person_"),
        (["--photos", str(ROOT / "x.png")], "give --person"),
        (
            ["--person", "{0}", "--prompt", "a photo of a dog"],
            "no 'person' or 'man' or 'woman' to put 'sks' before",
        ),
    ],
)
def test_wrong_flags(run, tmp_path, capsys, flags, word):
    given = [flag.format(names_in(run[1])[0]) for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        generate(run[1], tmp_path / "out", *given)
    assert stopped.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"people.group": "friends"}, "friends"),
        ({"people.count": 99}, "99"),
        ({"references.n": 1}, "too few photos"),
        ({"prior.pictures": 0}, "pictures=0"),
    ],
)
def test_wrong_settings(base, tmp_path, changes, word):
    chosen = config("dreambooth", base, write_people(tmp_path / "people"), tmp_path / "data")
    chosen.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=word):
        train.main(chosen, tmp_path / "run")


def test_people_trained_in_parallel_do_not_affect_each_other(run, tmp_path):
    chosen, workdir = run
    if chosen.method == "dreambooth":
        pytest.skip("the same program as lora's, and twice as long to compile")
    alone = chosen.copy_and_resolve_references()
    alone.people.update({"count": 1, "at_once": 1})
    train.main(alone, tmp_path)
    (name,) = names_in(tmp_path)
    one, other = (
        load_file(folder / "people" / name / "pytorch_lora_weights.safetensors")
        for folder in (tmp_path, workdir)
    )
    # Adam's first steps follow the sign even of gradients that are rounding errors.
    assert one.keys() == other.keys()
    for key, value in one.items():
        step = alone.optimizer.learning_rate
        assert np.abs(value - other[key]).mean() < 0.05 * step


def test_parameters_may_lie_in_parts_on_all_devices(run, tmp_path):
    """Fully sharded: no device holds all trained parameters or all of the optimiser's state."""
    chosen, workdir = run
    if chosen.method == "lora":
        pytest.skip("its weights are too few to split")
    parts = chosen.copy_and_resolve_references()
    parts.mesh.update({"data": 1, "fsdp": 8})
    parts.remat = "blocks"
    parts.people.update({"count": 1, "at_once": 1})
    train.main(parts, tmp_path)
    (name,) = names_in(tmp_path)
    file, step = "unet/diffusion_pytorch_model.safetensors", parts.optimizer.learning_rate
    one, other = (load_file(folder / "people" / name / file) for folder in (tmp_path, workdir))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert np.abs(np.float32(value) - np.float32(other[key])).mean() < 0.05 * step


def test_another_run_starts_from_trained_weights(run, tmp_path):
    """Starts from a LoRA file and a pipeline folder; with 0 steps the weights stay unchanged."""
    chosen, workdir = run
    name = names_in(workdir)[0]
    again = chosen.copy_and_resolve_references()
    again.optimizer.steps = 0
    again.people.update({"count": 1, "at_once": 1})
    again.prior.weight = 0.0
    parts = pipeline.load(chosen.pipeline, only=("unet", "vae", "text_encoder"))
    if chosen.method == "lora":
        file = "pytorch_lora_weights.safetensors"
        again.init_from = str(workdir / "people" / name / file)
        again.lora.alpha = 2 * chosen.lora.alpha  # the file's content does not change
    else:
        shutil.copytree(chosen.pipeline, tmp_path / "base")
        shutil.rmtree(tmp_path / "base/unet")
        shutil.copytree(workdir / "people" / name / "unet", tmp_path / "base/unet")
        again.init_from = str(tmp_path / "base")
    train.main(again, tmp_path / "run")
    one = finetuning_loop.load_person(workdir, name, parts, chosen)
    (person,) = names_in(tmp_path / "run")
    other = finetuning_loop.load_person(tmp_path / "run", person, parts, again)
    for a, b in zip(jax.tree.leaves(one["unet"]), jax.tree.leaves(other["unet"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_initial_weights_that_do_not_fit(run, tmp_path):
    chosen, workdir = run
    again = chosen.copy_and_resolve_references()
    if chosen.method == "lora":
        file = f"people/{names_in(workdir)[0]}/pytorch_lora_weights.safetensors"
        again.init_from = str(workdir / file)
        again.lora.rank = 2
        words = "does not fit"
    else:
        again.init_from, words = "tiny", "does not fit"
    with pytest.raises(UserError, match=words):
        train.main(again, tmp_path)
