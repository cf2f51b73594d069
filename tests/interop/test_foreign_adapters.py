"""Damaged, foreign or hostile adapter files: a one-line error; no code is run, no file changed."""

import json
import struct
import zipfile

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch_models import TINY_UNET

from persona_jax.errors import UserError
from persona_jax.interop.ip_adapter import load_ip_adapter, save_ip_adapter, save_ip_adapter_bin
from persona_jax.models import adapter, towers
from persona_jax.models.aggregators import Aggregator
from persona_jax.models.unet import text_kernels

DIM = 10
KEY, BIAS = "ip_adapter.1.to_k_ip.weight", "image_proj.proj.bias"


class Trap:
    """Runs code when it is unpickled without protection."""

    def __reduce__(self):
        """Prints."""
        return (print, ("ran",))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder with a good adapter as both kinds of file, the UNet's config and kernels)."""
    folder = tmp_path_factory.mktemp("adapter")
    unet = towers.build("unet", TINY_UNET)
    kernels = text_kernels(towers.initialise(unet, jax.random.key(0)), unet.config)
    params = adapter.init(jax.random.key(1), Aggregator("avg"), DIM, 16, kernels)
    save_ip_adapter(params, unet.config, folder / "good.safetensors")
    save_ip_adapter_bin(folder / "good.safetensors", folder / "good.bin")
    return folder, unet.config, kernels


def read(file, world):
    return load_ip_adapter(file, world[1], world[2], DIM)


def test_both_kinds_of_file_are_read(world):
    one, other = (read(world[0] / f"good.{kind}", world) for kind in ("safetensors", "bin"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_half_precision_is_read(world, tmp_path):
    nested = torch.load(world[0] / "good.bin", weights_only=True)
    half = {part: {k: v.bfloat16() for k, v in tensors.items()} for part, tensors in nested.items()}
    torch.save(half, tmp_path / "half.bin")
    one, other = read(world[0] / "good.bin", world), read(tmp_path / "half.bin", world)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), one, other)


def changed(**changes):
    """Returns a function that replaces some of the good tensors; None removes one."""

    def make(good: dict) -> dict:
        tensors = good | {name.replace("__", "."): x for name, x in changes.items()}
        return {name: x for name, x in tensors.items() if x is not None}

    return make


def key(value) -> dict:
    return {KEY.replace(".", "__"): value}


def bias(value) -> dict:
    return {BIAS.replace(".", "__"): value}


def like(good: dict, name: str, value: float) -> np.ndarray:
    return np.full_like(good[name], value)


def plus(depth: int) -> dict:
    names = [f"image_proj.layers.{i}.0.to_q.weight" for i in range(depth)]
    return {
        "image_proj.latents": np.zeros((1, 16, 8)),
        **{name: np.zeros((64, 8)) for name in names},
    }


TENSORS = {
    "renamed": (lambda good: changed(**key(None), other=good[KEY])(good), "other"),
    "extra": (changed(extra=np.zeros(3)), "extra"),
    "missing": (changed(**bias(None)), BIAS),
    "transposed": (lambda good: changed(**key(good[KEY].T.copy()))(good), "to_k_ip|width"),
    "one more axis": (lambda good: changed(**key(good[KEY][None]))(good), "to_k_ip"),
    "a scalar": (changed(**bias(np.float32(1))), BIAS),
    "no rows": (lambda good: changed(**bias(good[BIAS][:0]))(good), BIAS),
    "sixteen tokens": (lambda good: changed(**bias(np.repeat(good[BIAS], 4)))(good), BIAS),
    "NaN": (lambda good: changed(**bias(like(good, BIAS, np.nan)))(good), "not finite"),
    "infinity": (lambda good: changed(**key(like(good, KEY, np.inf)))(good), "not finite"),
    "one NaN": (
        lambda good: changed(**bias(np.r_[good[BIAS][:-1], np.float32(np.nan)]))(good),
        "not finite",
    ),
    "half of a Plus": (lambda good: plus(4), "missing"),
    "Plus with other heads": (
        lambda good: plus(4) | {"image_proj.layers.0.0.to_q.weight": np.zeros((72, 8))},
        "heads of 64",
    ),
    "Plus of another depth": (lambda good: plus(6), "Plus file of depth 6"),
    "FaceID": (
        lambda good: {"image_proj.proj.0.weight": np.zeros((8, 8)), KEY: good[KEY]},
        "FaceID",
    ),
    "full face": (
        lambda good: {"image_proj.perceiver_resampler.latents": np.zeros((1, 4, 8))},
        "FaceID or full-face",
    ),
    "SDXL": (
        lambda good: {
            n: np.zeros((8, 2048), np.float32) if "_ip" in n else x for n, x in good.items()
        },
        "width 2048",
    ),
    "another UNet": (
        lambda good: {
            n: np.zeros((8, 24), np.float32) if "_ip" in n else x for n, x in good.items()
        },
        "width 24",
    ),
    "a LoRA": (
        lambda good: {"unet.mid_block.attentions.0.lora_A.weight": np.zeros((4, 8))},
        "lora_A",
    ),
    "a trainer's": (
        lambda good: {"image_proj_model.proj.weight": np.zeros(3), "adapter_modules.1": good[KEY]},
        "IP-Adapter's trainer",
    ),
    "compiled": (lambda good: {f"_orig_mod.{n}": x for n, x in good.items()}, "torch.compile"),
    "PEFT's": (
        lambda good: {"base_model.model.mid_block.lora_A.weight": np.zeros((4, 8))},
        "load it as a LoRA",
    ),
    "many": (lambda good: {f"{'name' * 9}.{i}": np.zeros(1) for i in range(900)}, "and 89. more"),
    "nothing": (lambda good: {"empty": np.zeros(0)}, "missing"),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_tensors_that_do_not_fit(world, tmp_path, name, kind):
    from safetensors.numpy import load_file

    make, words = TENSORS[name]
    tensors = make(load_file(world[0] / "good.safetensors"))
    file = tmp_path / f"adapter.{kind}"
    if kind == "safetensors":
        save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, file)
    else:
        torch.save({n: torch.tensor(np.array(x)) for n, x in tensors.items()}, file)
    refused(file, world, words)


def test_the_suffix_may_be_in_capitals(world, tmp_path):
    file = tmp_path / "ADAPTER.SAFETENSORS"
    file.write_bytes((world[0] / "good.safetensors").read_bytes())
    one, other = read(world[0] / "good.safetensors", world), read(file, world)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.bool_])
def test_numbers_of_another_kind(world, tmp_path, dtype):
    save_file({KEY: np.zeros((8, 16), dtype)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", world, "not a float")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_cut_short(world, tmp_path, kind, share):
    data = (world[0] / f"good.{kind}").read_bytes()
    file = tmp_path / f"cut.{kind}"
    file.write_bytes(data[: int(share * len(data))])
    refused(file, world, "not a readable")


@pytest.mark.parametrize(
    "state",
    [
        Trap(),
        {"image_proj": Trap()},
        {"image_proj": {"proj.weight": torch.zeros(2), "x": Trap()}},
        [torch.zeros(2)],
        {"image_proj": "words"},
        {"image_proj": {"proj.weight": None}},
        7,
        {"state_dict": {"x": torch.zeros(2)}, "epoch": 3},
        {"model": {"x": torch.zeros(2)}, "optimizer": {"lr": 0.1}},
    ],
)
def test_files_of_torch_that_hold_something_else(world, tmp_path, state):
    torch.save(state, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", world, "state dict|more than tensors|trainer's whole")


def header(text: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"words",
        header("{", None),
        header("[]"),
        header("{}", 2**60),
        header(json.dumps({KEY: {"dtype": "F32", "shape": [8, 16], "data_offsets": [0, 512]}})),
        header(json.dumps({KEY: {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}})) + b"1234",
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_files_of_something_else(world, tmp_path, data, kind):
    (tmp_path / f"a.{kind}").write_bytes(data)
    refused(tmp_path / f"a.{kind}", world, "not a readable|more than tensors")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_pictures_archives_folders_and_nothing_at_all(world, tmp_path, kind):
    picture, archive, folder = (
        tmp_path / f"{name}.{kind}" for name in ("picture", "zip", "folder")
    )
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("a/data.pkl", b"words")
    folder.mkdir()
    for file in (picture, archive, folder, tmp_path / f"nothing.{kind}"):
        refused(file, world, "no such file|not a readable|more than tensors")


def refused(file, world, words: str) -> None:
    """Asserts a one-line error that names the file, and that the file is unchanged."""
    before = file.read_bytes() if file.is_file() else None
    names = sorted(file.parent.iterdir())
    with pytest.raises(UserError, match=words) as error:
        read(file, world)
    message = str(error.value)
    assert str(file) in message
    assert "\n" not in message
    assert len(message) < 500
    assert sorted(file.parent.iterdir()) == names
    assert (file.read_bytes() if file.is_file() else None) == before


@pytest.fixture(autouse=True)
def nothing_is_run(capfd):
    yield
    assert "ran" not in capfd.readouterr().out
