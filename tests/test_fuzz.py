"""Hostile input from hypothesis: the outcome is a result or a UserError of one line.

Takes a minute in all; longer with PERSONA_FUZZ_SECONDS (see fuzz.py).
"""

import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from fuzz import damaged, refusal, rounds
from hypothesis import strategies as st
from safetensors.numpy import save_file
from world import ROOT, config_of, shaken

from persona_jax import compare, encode, evaluate, export, plan, sample, score
from persona_jax.errors import UserError
from persona_jax.interop import folders
from persona_jax.interop.ip_adapter import load_ip_adapter, save_ip_adapter
from persona_jax.interop.torch_files import open_tensors
from persona_jax.models import adapter
from persona_jax.models.aggregators import Aggregator
from persona_jax.models.towers import TOWERS, abstract_params, build
from persona_jax.models.unet import UNetConfig, text_kernels
from persona_jax.runtime import command_line, untrusted
from persona_jax.runtime.command_line import load_config
from persona_jax.runtime.run_folder import read_run, write_run_files


def outcome(call) -> None:
    """Runs a function; it may raise a one-line UserError, any other exception fails the test."""
    try:
        call()
    except UserError as error:
        refusal(error)


class Weights:
    """An adapter in both file layouts, and the shapes it must fit."""

    def __init__(self, folder: Path):
        config = UNetConfig.from_json(torch_models.TINY_UNET)
        zeros = jax.tree.map(
            lambda x: np.zeros(x.shape, np.float32),
            dict(abstract_params(build("unet", torch_models.TINY_UNET))),
        )
        params = jax.tree.map(jnp.asarray, shaken(zeros, 0))
        self.config, self.kernels = config, text_kernels(params, config)
        learnt = adapter.init(
            jax.random.key(0), Aggregator("avg"), 12, config.cross_attention_dim,
            self.kernels,
        )  # fmt: skip
        file = folder / "whole.safetensors"
        save_ip_adapter(learnt, config, file)
        self.safetensors = file.read_bytes()
        nested = io.BytesIO()
        torch.save({"image_proj": {"proj.weight": torch.zeros(8, 12)}, "ip_adapter": {}}, nested)
        self.bin = nested.getvalue()

    def load(self, file: Path):
        return load_ip_adapter(file, self.config, self.kernels, 12)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return Weights(tmp_path_factory.mktemp("weights"))


def test_weights_of_damaged_files(weights, tmp_path):
    def load(data):
        kind = data.draw(st.sampled_from(["safetensors", "bin"]))
        whole = getattr(weights, kind)
        # Damage in the header, and anywhere.
        head = data.draw(st.sampled_from([len(whole), 2000]))
        content = data.draw(damaged([whole[:head]])) + whole[head:]
        file = tmp_path / f"x.{kind}"
        file.write_bytes(content)
        outcome(lambda: weights.load(file))

    rounds(load, st.data())


def test_weights_of_any_shape_and_type(weights, tmp_path):
    kinds = [np.float32, np.float16, np.float64, np.int64, np.int32, np.bool_, np.uint8]
    names = st.sampled_from(
        ["image_proj.proj.weight", "image_proj.proj.bias", "image_proj.norm.weight",
         "image_proj.latents", "image_proj.layers.0.0.to_q.weight", "image_proj.proj_in.weight",
         "ip_adapter.1.to_k_ip.weight", "ip_adapter.1.to_v_ip.weight", "x", ""]
    )  # fmt: skip
    shapes = st.lists(st.integers(0, 20), max_size=4)
    tensors = st.dictionaries(names, st.tuples(shapes, st.sampled_from(kinds)), max_size=6)

    def load(drawn):
        file = tmp_path / "x.safetensors"
        save_file({n: np.ones(s, k) for n, (s, k) in drawn.items()}, file)
        outcome(lambda: weights.load(file))

    rounds(load, tensors, examples=100)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: {"w": torch.zeros(1).expand(2**40)}, "more than the file holds"),
        (lambda: {"w": torch.zeros(1, dtype=torch.bfloat16).expand(2**40)}, "more than the file"),
        (lambda: [torch.zeros(1)], "not a readable state dict"),
        (lambda: {"w": 3}, "not a readable state dict"),
    ],
)
def test_torch_files_that_say_more_than_they_hold(tmp_path, content, expected):
    torch.save(content(), tmp_path / "x.bin")
    with pytest.raises(UserError, match=expected):
        open_tensors(tmp_path / "x.bin")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_are_floats(tmp_path, dtype):
    torch.save({"w": torch.zeros(3, dtype=dtype)}, tmp_path / "x.bin")
    tensors = open_tensors(tmp_path / "x.bin")
    with pytest.raises(UserError, match="not a float"):
        tensors.read("w")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**24)
    with pytest.raises(UserError, match="compressed, which torch does not do"):
        open_tensors(tmp_path / "x.bin")


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(2**70), 2**70) | st.text(max_size=8)
    | st.sampled_from([0, -1, 15, 10**6, 10**12, 1e30, float("nan")]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)  # fmt: skip


@st.composite
def changed(draw, settings: dict) -> object:
    """Draws settings with a value replaced, removed or added; or arbitrary JSON."""
    if draw(st.integers(0, 9)) == 0:
        return draw(ANY_JSON)
    out = json.loads(json.dumps(settings))
    for _ in range(draw(st.integers(1, 3))):
        place, keys = out, sorted(out) if isinstance(out, dict) else []
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        while isinstance(place[key], dict) and place[key] and draw(st.booleans()):
            place, key = place[key], draw(st.sampled_from(sorted(place[key])))
        if draw(st.integers(0, 4)) == 0:
            del place[key]
        else:
            place[key] = draw(ANY_JSON)
    return out


@pytest.mark.parametrize("tower", TOWERS)
def test_towers_of_any_json(tower, tmp_path):
    whole = {
        "unet": torch_models.TINY_UNET, "vae": torch_models.TINY_VAE,
        "text_encoder": torch_models.TINY_TEXT, "image_encoder": torch_models.TINY_VISION,
    }[tower]  # fmt: skip

    def load(content):
        (tmp_path / "config.json").write_text(json.dumps(content))
        # There are no weights, so accepted settings end in the error that they are missing.
        with pytest.raises(UserError) as error:
            folders.load_tower(tmp_path, tower)
        refusal(error.value)

    rounds(load, changed(dict(whole)), examples=60)


@pytest.mark.parametrize("name", ["sa", "lora"])
def test_runs_of_any_json(name, tmp_path):
    write_run_files(tmp_path, config_of(name))
    whole = json.loads((tmp_path / "config.json").read_text())

    def read(content):
        (tmp_path / "config.json").write_text(json.dumps(content))
        outcome(lambda: read_run(tmp_path))

    rounds(read, changed(whole), examples=80)


def test_json_of_any_bytes(tmp_path):
    whole = json.dumps(torch_models.TINY_UNET).encode()

    def read(content):
        (tmp_path / "x.json").write_bytes(content)
        outcome(lambda: untrusted.read_json(tmp_path / "x.json"))

    rounds(read, damaged([whole]) | st.binary(max_size=200))


VALUES = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text(max_size=10).filter(lambda x: "\0" not in x),
    st.sampled_from(["", "-", "--", "nan", "inf", "1e400", "True", "(1, 2)", "[]", "9" * 5000]),
)


@pytest.mark.parametrize("module", [compare, encode, evaluate, export, plan, sample, score])
def test_flags_of_any_value(module):
    parser = module.parser()
    known = [x.option_strings[0] for x in parser._actions if x.option_strings and x.nargs != 0]
    names = st.sampled_from([*known, "--zap"]).filter(lambda x: x != "--config")
    parser.error = command_line._refuse

    def parse(flags):
        argv = [text for flag in flags for text in flag]
        outcome(lambda: parser.parse_args(argv))

    rounds(parse, st.lists(st.tuples(names, VALUES), max_size=5), examples=60)


@pytest.mark.parametrize("name", ["sa", "lora", "base"])
def test_configs_of_any_value(name):
    file = str(ROOT / f"configs/{name}.py")
    from persona_jax.runtime.run_folder import leaves

    keys = st.sampled_from([*leaves(load_config(file)), "zap", "optimizer.zap", "", "data"])

    def load(overrides):
        outcome(lambda: load_config(file, [f"--config.{key}={value}" for key, value in overrides]))

    rounds(load, st.lists(st.tuples(keys, VALUES), max_size=3), examples=60)
