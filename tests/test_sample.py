"""Sampling from the command line: several people, adapters, forms of λ, LoRA files, text alone."""

import json

import jax
import numpy as np
import pytest
import torch_models
from PIL import Image
from safetensors.numpy import load_file, save_file
from world import adapter_config, shaken, write_adapter, write_people

from persona_jax import export, sample, score, train
from persona_jax.errors import UserError
from persona_jax.interop import tensors
from persona_jax.interop.checkpoints import load_params
from persona_jax.models import lora
from persona_jax.pipelines.pipeline import open_pipeline
from persona_jax.runtime.command_line import run_with_arguments


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with people, a random base, runs on it, exports, and a LoRA file."""
    root = tmp_path_factory.mktemp("world")
    write_people(root / "people", people=3, photos=4)
    torch_models.write_pipeline(root / "base")
    for name in ("avg", "resampler", "plus"):
        config = adapter_config(
            "ip" if name == "plus" else name, root / "people", root / "data", root / "base"
        )
        config.aggregator.kind = name
        write_adapter(config, root / name)
        run(
            export,
            "--workdir",
            root / name,
            "--out",
            root / f"{name}-out",
            "--format",
            "ip-adapter",
        )
    unet = open_pipeline(config).unet
    update = shaken(lora.init(jax.random.key(0), unet.params, 2), 0)
    tensors.save_tree({"unet": update}, root / "lora.safetensors")
    for side, name in enumerate(("left", "right")):
        mask = np.zeros((32, 32), np.uint8)
        mask[:, 16 * side : 16 * (side + 1)] = 255
        Image.fromarray(mask).save(root / f"{name}.png")
    return root


def run(module, *argv) -> None:
    run_with_arguments(module.parser(), module.main, [module.__name__, *map(str, argv)])


def generate(world, out, *argv) -> np.ndarray:
    run(sample, "--out", out, "--num", 1, "--steps", 2, "--guidance", 2, *argv)
    return np.asarray(Image.open(out / "0000.png"), int)


def photos(world, person: int, count: int = 2) -> list:
    return ["--photos", *(world / f"people/person_{person}/{i}.png" for i in range(count))]


def test_two_people_by_masks_with_one_adapter(world, tmp_path):
    ann, bob = photos(world, 0), photos(world, 1)
    left, right = (["--mask", world / f"{side}.png"] for side in ("left", "right"))
    who = ["--workdir", world / "avg"]
    both = generate(world, tmp_path / "a", *who, *ann, *left, *bob, *right)
    swapped = generate(world, tmp_path / "b", *who, *bob, *right, *ann, *left)
    assert abs(both - swapped).max() <= 1  # in any order
    other = generate(world, tmp_path / "c", *who, *ann, *right, *bob, *left)
    assert abs(both - other).max() > 5
    record = json.loads((tmp_path / "a/sample.json").read_text())
    assert [len(one["photos"]) for one in record["sets"]] == [2, 2]
    assert Image.open(tmp_path / "a/grid.png").size[1] > 3 * 16  # one row per reference set


def test_runs_and_files_together_each_with_its_own(world, tmp_path):
    """A run, an exported folder and a file, with settings given once for all or once for each."""
    sets = [*photos(world, 0), *photos(world, 1), *photos(world, 2)]
    file = world / "plus-out/ip_adapter.safetensors"
    who = ["--workdir", world / "avg", "--adapter", world / "resampler-out", "--adapter", file]
    one = generate(world, tmp_path / "a", *who, *sets, "--scale", 0.5)
    each = generate(world, tmp_path / "b", *who, *sets, "--scale", 0.5, 0.5, "--scale", 0.5)
    np.testing.assert_array_equal(one, each)
    more = ["--scale", "0.5", '{"mid": 1}', "0", "--window", 0, 0.5]
    assert abs(generate(world, tmp_path / "c", *who, *sets, *more) - one).max() > 2


@pytest.mark.parametrize("name", ["avg", "resampler", "plus"])
def test_negative_photos(world, tmp_path, name):
    who = ["--workdir", world / name, *photos(world, 0)]
    plain = generate(world, tmp_path / "a", *who)
    away = generate(world, tmp_path / "b", *who, "--negative_photos", *photos(world, 1, 3)[1:])
    assert abs(plain - away).max() > 2
    # Guidance 1 does not use the unconditional branch.
    one, other = (
        generate(world, tmp_path / label, *who, *more, "--guidance", 1)
        for label, more in (("c", []), ("d", ["--negative_photos", *photos(world, 1, 3)[1:]]))
    )
    assert abs(one - other).max() <= 1


def test_a_base_alone_and_with_a_lora(world, tmp_path):
    base, file = ["--pipeline", world / "base"], world / "lora.safetensors"
    alone = generate(world, tmp_path / "a", *base)
    with_it = generate(world, tmp_path / "b", *base, "--lora", file)
    assert abs(alone - with_it).max() > 2
    none = generate(world, tmp_path / "c", *base, "--lora", file, "--lora_scale", 0)
    np.testing.assert_array_equal(alone, none)
    half = ["--lora", file, file, "--lora_scale", 0.5, 0.5]
    twice = generate(world, tmp_path / "d", *base, *half)
    assert abs(twice - with_it).max() <= 1
    with pytest.raises(SystemExit) as stop:
        generate(world, tmp_path / "e", *base, "--lora", file, "--lora_scale", 1, 2)
    assert stop.value.code == 2


def test_runs_of_two_bases_are_refused(world, tmp_path, capsys):
    torch_models.write_pipeline(tmp_path / "base", prediction="v_prediction")
    unet = tmp_path / "base/unet/diffusion_pytorch_model.safetensors"
    save_file({name: x + 0.01 for name, x in load_file(unet).items()}, unet, {"format": "pt"})
    config = adapter_config("avg", world / "people", world / "data", tmp_path / "base")
    write_adapter(config, tmp_path / "avg")
    who = ["--workdir", world / "avg", tmp_path / "avg"]
    with pytest.raises(SystemExit) as stop:
        generate(world, tmp_path / "out", *who, *photos(world, 0), *photos(world, 1))
    assert stop.value.code == 2
    assert "this run was trained on" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resampler", "plus"])
def test_adapters_in_the_plus_layout_learn_and_go_on_from_files(world, tmp_path, name):
    config = adapter_config(
        "ip" if name == "plus" else name, world / "people", world / "data", world / "base"
    )
    config.aggregator.kind, config.grid.people = name, 1
    config.init_from = str(world / f"{name}-out/ip_adapter.safetensors")
    config.optimizer.steps = 0
    train.main(config, tmp_path / "as it is")
    start = load_params(tmp_path / "as it is/checkpoints", "params")
    known = load_params(world / name / "checkpoints", "ema")
    jax.tree.map(np.testing.assert_array_equal, start["image_proj"], known["image_proj"])
    config.optimizer.steps = 2
    train.main(config, tmp_path / "on")
    trained = load_params(tmp_path / "on/checkpoints", "params")
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), trained, start)
    assert min(jax.tree.leaves(moved)) > 0
    assert list((tmp_path / "on/grids").iterdir())


def test_layouts_are_not_mixed(world, tmp_path):
    config = adapter_config("avg", world / "people", world / "data", world / "base")
    config.init_from = str(world / "plus-out/ip_adapter.safetensors")
    with pytest.raises(UserError, match=r"do not fit|Plus layout"):
        train.main(config, tmp_path / "a")
    config = adapter_config("resampler", world / "people", world / "data", world / "base")
    config.init_from = str(world / "avg-out/ip_adapter.safetensors")
    with pytest.raises(UserError, match="plain layout"):
        train.main(config, tmp_path / "b")


@pytest.mark.parametrize("wrong", ["a file", "a folder for a picture", "too long"])
def test_the_output_folder_is_tried_before_sampling(world, tmp_path, monkeypatch, capsys, wrong):
    def too_early(*_, **__):
        raise AssertionError("sampled too early")

    monkeypatch.setattr(sample, "open_pipeline", too_early)
    out = tmp_path / ("n" * 300 if wrong == "too long" else "out")
    if wrong == "a file":
        out.write_text("mine")
    elif wrong == "a folder for a picture":
        (out / "0000.png").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        run(sample, "--out", out, "--workdir", world / "avg", *photos(world, 0))
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --out")
    assert len(error) < 500


def test_a_full_disk_leaves_whole_pictures(world, tmp_path, monkeypatch, capsys):
    whole, saved = Image.Image.save, []

    def save(image, file, *rest, **settings):
        if len(saved) == 3:
            with open(file, "wb") as half:
                half.write(b"half")
            raise OSError(28, "No space left on device")
        saved.append(whole(image, file, *rest, **settings))

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(SystemExit) as stop:
        generate(
            world, tmp_path / "out", "--pipeline", world / "base", "--num", 5, "--batch_size", 2
        )
    assert stop.value.code == 2
    assert "0003.png: cannot be written (No space left" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"000{i}.png" for i in range(3)]
    for file in (tmp_path / "out").iterdir():
        Image.open(file).load()


def test_more_pictures_than_the_grid_or_a_batch_holds(world, tmp_path, monkeypatch, capsys):
    """Batches are generated one at a time; pictures do not depend on batch size and number."""
    monkeypatch.setattr(sample, "SHOWN", 3)
    sizes = []
    whole = sample.write_pictures

    def watch(out, batches):
        return whole(out, (sizes.append(len(batch)) or batch for batch in batches))

    monkeypatch.setattr(sample, "write_pictures", watch)
    who = ["--workdir", world / "avg", *photos(world, 0)]
    generate(world, tmp_path / "a", *who, "--num", 5, "--batch_size", 2)
    assert sizes == [2, 2, 1]
    assert "5 pictures in" in (printed := capsys.readouterr().out)
    assert "the first 3 in" in printed
    generate(world, tmp_path / "b", *who, "--num", 4, "--batch_size", 4)
    for i in range(4):
        one, other = (np.asarray(Image.open(tmp_path / f"{x}/000{i}.png"), int) for x in "ab")
        assert abs(one - other).max() <= 1


def test_what_sample_leaves_can_be_scored(world, tmp_path):
    """As in README: score the pictures of sample against photos of any size, rotated by EXIF."""
    who = ["--workdir", world / "avg", *photos(world, 0)]
    generate(world, tmp_path / "out", *who, "--num", 3)
    pictures, others = score.list_pictures(tmp_path / "out")
    assert [file.name for file in pictures] == ["0000.png", "0001.png", "0002.png"]
    assert [file.name for file in others] == ["grid.png", "sample.json"]
    (part,) = score.read_pictures(pictures)
    assert part.shape[0] == 3


def test_masks_in_the_alpha_channel_give_the_same(world, tmp_path):
    who = ["--workdir", world / "avg", *photos(world, 0)]
    grey = generate(world, tmp_path / "a", *who, "--mask", world / "left.png")
    alpha = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    alpha.putalpha(Image.open(world / "left.png"))
    alpha.save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(
        grey, generate(world, tmp_path / "b", *who, "--mask", tmp_path / "alpha.png")
    )
    assert abs(grey - generate(world, tmp_path / "c", *who)).max() > 2
