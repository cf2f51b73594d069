"""Damaged files are refused in one line; unusual folder names are used as they are."""

import os
import shutil
import stat
from pathlib import Path

import jax
import numpy as np
import pytest
import torch_models
from safetensors.numpy import load_file, save_file
from world import adapter_config, config_of, shaken, use_people, write_adapter, write_people

from persona_jax import export, sample, train
from persona_jax.data.dataset import open_dataset
from persona_jax.data.photo_datasets import load_photos
from persona_jax.errors import UserError
from persona_jax.interop.checkpoints import newest_step
from persona_jax.interop.lora_files import load_lora
from persona_jax.methods import finetuning, finetuning_loop
from persona_jax.pipelines.pipeline import load, open_pipeline
from persona_jax.runs import finished_run
from persona_jax.runtime import checksums
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.run_folder import write_run_files


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """People, a random base, runs and exports, all in a folder whose name looks like a glob."""
    root = tmp_path_factory.mktemp("damage") / "mine [1]"
    write_people(root / "people", people=3)
    torch_models.write_pipeline(root / "base")
    write_adapter(adapter_config("sa", root / "people", root / "data", root / "base"), root / "sa")
    for name in finetuning.METHODS:
        config = config_of(name, "lfw")
        config.pipeline = str(root / "base")
        parts = open_pipeline(config)
        (learnt,) = [finetuning.init(config, parts, jax.random.split(jax.random.key(0), 1))]
        write_run_files(root / name, config)
        one = shaken(jax.tree.map(lambda x: x[0], learnt), 0)
        finetuning_loop.save_person(root / name, "ann [2]", one, parts, config)
    who = ["--person", "ann [2]", "--format"]
    run(export, root / "sa", root / "sa-out", "--format", "ip-adapter", "--bin")
    run(export, root / "dreambooth", root / "dreambooth-out", *who, "diffusers")
    run(export, root / "lora", root / "lora-out", *who, "lora")
    return root


def run(module, workdir, out, *flags) -> None:
    argv = [module.__name__, "--workdir", workdir, "--out", out, *flags]
    run_with_arguments(module.parser(), module.main, list(map(str, argv)))


def loaders(world: Path) -> dict:
    """Returns, by folder, the function that loads it and the names of the files it reads."""
    base = str(world / "base")

    def person(method):
        config = config_of(method, "lfw")
        config.pipeline = base
        parts = load(base, only=("unet", "vae", "text_encoder"))
        return lambda: finetuning_loop.load_person(world / method, "ann [2]", parts, config)

    def lora():
        file = world / "lora-out/pytorch_lora_weights.safetensors"
        return load_lora(file, {"unet": {}, "text_encoder": {}})

    return {
        "lora/people/ann [2]": (person("lora"), ""),
        "dreambooth/people/ann [2]": (person("dreambooth"), ""),
        "sa-out": (lambda: finished_run.open_adapter(world / "sa-out", base), (
            "ip_adapter.safetensors", "aggregator.json", "aggregator.safetensors",
        )),
        "dreambooth-out": (lambda: load(str(world / "dreambooth-out")), (
            "unet", "vae", "text_encoder", "tokenizer", "scheduler",
        )),
        "lora-out": (lora, ("pytorch_lora_weights.safetensors",)),
    }  # fmt: skip


def test_no_flipped_bit_of_a_person_or_an_export_is_read(world):
    random, flips = np.random.default_rng(0), 0
    for folder, (read, names) in loaders(world).items():
        files = [p for p in sorted((world / folder).rglob("*")) if p.is_file()]
        files = [p for p in files if p.relative_to(world / folder).as_posix().startswith(names)]
        assert files
        for file in [*files, *random.choice(files, 5)]:
            whole = file.read_bytes()
            place = int(random.integers(len(whole)))
            bit = 1 << int(random.integers(8))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            try:
                if file.name == checksums.NAME:
                    continue
                with pytest.raises(UserError, match=r"damaged, .* is not as it was written; "):
                    read()
                flips += 1
            finally:
                file.write_bytes(whole)
    assert flips > 40


def test_exports_are_as_readable_as_the_umask_says(world):
    for folder in ("sa-out", "dreambooth-out", "lora-out", "lora/people/ann [2]"):
        for path in [world / folder, *(world / folder).rglob("*")]:
            expected = (0o777 if path.is_dir() else 0o666) & ~UMASK
            assert stat.S_IMODE(path.stat().st_mode) == expected, path


UMASK = os.umask(0)
os.umask(UMASK)


def test_training_and_sampling_below_a_folder_named_like_a_pattern(world, tmp_path):
    """Data, encodings, checkpoints and people are read back, and training resumes."""
    (world / "people/person_0").rename(world / "people/person [0]")
    config = adapter_config("sa", world / "people", world / "data", world / "base")
    train.main(config, world / "trained")
    config.optimizer.steps = 4
    train.main(config, world / "trained")
    assert newest_step(world / "trained/checkpoints") == 4
    photos = ["--photos", *(world / "people/person [0]").iterdir()]
    run(sample, world / "trained", tmp_path / "a [b]*", *photos, "--num", 1)
    assert (tmp_path / "a [b]*/0000.png").exists()

    config = config_of("lora", "tiny")
    config.pipeline = str(world / "base")
    use_people(config, world / "people", world / "data")
    config.data.update({"test_people": 0, "validation_people": 0})
    config.people.update({"group": "train", "count": 3, "at_once": 1})
    config.references.n, config.batch_size, config.optimizer.steps = 4, 8, 1
    config.prior.update({"pictures": 1, "steps": 1})
    train.main(config, world / "learnt")
    assert {p.name for p in (world / "learnt/people").iterdir()} == {
        "person [0]", "person_1", "person_2",
    }  # fmt: skip
    run(sample, world / "learnt", tmp_path / "out", "--person", "person [0]", "--num", 1)
    with pytest.raises(SystemExit):
        run(sample, world / "learnt", tmp_path / "no", "--person", "../../sa", "--num", 1)
    shutil.rmtree(world / "learnt")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": 3}', b"\xff\xfe"])
def test_a_damaged_built_dataset_is_built_again(tmp_path, capsys, content):
    write_people(tmp_path / "people", people=2)
    whole = load_photos("folder", tmp_path / "data", folder=tmp_path / "people")
    (info,) = (tmp_path / "data").rglob("dataset_info.json")
    info.write_bytes(content)
    again = load_photos("folder", tmp_path / "data", folder=tmp_path / "people")
    assert again.fingerprint == whole.fingerprint
    assert "damaged (" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "shape"])
def test_damaged_class_pictures_are_generated_again(world, tmp_path, capsys, damage):
    config = config_of("lora", "tiny")
    config.pipeline, config.captions = str(world / "base"), False
    use_people(config, world / "people", tmp_path)
    config.data.update({"test_people": 0, "validation_people": 0})
    photos, groups = open_dataset(config.data)
    config.prior.update({"pictures": 2, "steps": 1})
    parts = load(config.pipeline, only=("unet", "vae", "text_encoder"))

    def latents():
        return finetuning_loop.class_images(photos, groups, parts, config)["class_latents"]

    whole = latents()
    (file,) = tmp_path.rglob("latents.npy")
    data = file.read_bytes()
    flipped = data[:-9] + bytes([data[-9] ^ 64]) + data[-8:]
    if damage == "shape":
        np.save(file, whole[:1])
        checksums.write(file.parent)
    else:
        file.write_bytes({"flip": flipped, "cut": data[:200], "empty": b""}[damage])
    np.testing.assert_array_equal(latents(), whole)
    assert "generating them again" in capsys.readouterr().out
    latents()
    assert "generating" not in capsys.readouterr().out


def test_values_that_are_not_finite_are_errors_and_give_no_pictures(world, tmp_path, capsys):
    """NaN in the base, in a person's update, in an export; huge numbers in a LoRA."""
    shutil.copytree(world / "base", tmp_path / "base")
    for tower, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        file = tmp_path / "base" / tower / f"{name}.safetensors"
        good = file.read_bytes()
        tensors = load_file(file)
        save_file({k: np.full_like(v, np.nan) for k, v in tensors.items()}, file, {"format": "pt"})
        message = refusal(capsys, "--pipeline", tmp_path / "base", "--out", tmp_path / "out")
        assert f"what was sampled is not finite: {tower}." in message
        file.write_bytes(good)
    shutil.copytree(world / "sa-out", tmp_path / "sa")
    (tmp_path / "sa" / checksums.NAME).unlink()
    file = tmp_path / "sa/aggregator.safetensors"
    good = load_file(file)
    save_file({k: np.full_like(v, np.nan) for k, v in good.items()}, file, {"format": "pt"})
    photos = ["--photos", world / "people/person_1/0.png"]
    base = ["--pipeline", world / "base"]
    message = refusal(
        capsys, "--adapter", tmp_path / "sa", *base, *photos, "--out", tmp_path / "out"
    )
    assert "is not finite, which no aggregator has" in message
    file = tmp_path / "huge.safetensors"
    huge = load_file(world / "lora-out/pytorch_lora_weights.safetensors")
    save_file({k: np.full_like(v, 3e38) for k, v in huge.items()}, file, {"format": "pt"})
    message = refusal(capsys, *base, "--lora", file, "--out", tmp_path / "out")
    assert "which no LoRA has" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--guidance", "nan"], "argument --guidance: 'nan': expected a number from 0 to 1000"),
        (["--eta", "2"], "argument --eta: '2': expected a number from 0 to 1"),
        (["--steps", "0"], "argument --steps: '0': expected a whole number from 1 to 100000"),
        (["--lora_scale", "1e30"], "argument --lora_scale: '1e30': expected a number from -1000"),
        (["--seed", str(2**63)], "expected a whole number from 0 to 4294967295"),
        (["--num", "0"], "argument --num: '0': expected a whole number from 1 on"),
        (["--prompt", "caf\udce9"], "expected UTF-8"),
    ],
)
def test_flags_out_of_range_are_a_line(world, tmp_path, capsys, flags, expected):
    message = refusal(capsys, "--pipeline", world / "base", "--out", tmp_path / "out", *flags)
    assert expected in message


def refusal(capsys, *argv) -> str:
    """Returns the error line of a refused sampling command."""
    argv = ["sample", *map(str, argv)]
    if "--num" not in argv:
        argv += ["--num", "1", "--steps", "2"] if "--steps" not in argv else ["--num", "1"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_with_arguments(sample.parser(), sample.main, argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert len(message) < 500
    return message
