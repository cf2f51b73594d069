"""IP-Adapter files: published names and shapes, and a round trip."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_models import PUBLISHED, TINY_UNET

from persona_jax.errors import UserError
from persona_jax.interop.ip_adapter import load_ip_adapter, save_ip_adapter
from persona_jax.models import adapter, towers
from persona_jax.models.aggregators import Aggregator
from persona_jax.models.unet import text_kernels

DIM = 10


def make(settings: dict, dim: int, real: bool = True, kind: str = "avg"):
    """Returns (adapter, its UNet's config and kernels); only shapes unless `real`."""
    unet = towers.build("unet", settings)

    def init():
        kernels = text_kernels(towers.initialise(unet, jax.random.key(0)), unet.config)
        token_dim = unet.config.cross_attention_dim
        return adapter.init(jax.random.key(1), Aggregator(kind), dim, token_dim, kernels), kernels

    params, kernels = init() if real else jax.eval_shape(init)
    return params, unet.config, kernels


@pytest.mark.parametrize(
    ("file", "kind", "dim"),
    [("ip-adapter_sd15.json", "avg", 1024), ("ip-adapter-plus_sd15.json", "plus", 1280)],
)
def test_names_and_shapes_are_those_published(tmp_path, file, kind, dim):
    published = json.loads((PUBLISHED / file).read_text())
    params, config, _ = make({"cross_attention_dim": 768}, dim, real=False, kind=kind)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float16), params)
    save_ip_adapter(zeros, config, tmp_path / "a.safetensors", np.float16)
    ours = {k: list(v.shape) for k, v in load_file(tmp_path / "a.safetensors").items()}
    assert ours == published


@pytest.mark.parametrize("kind", ["avg", "resampler"])
def test_round_trip(tmp_path, kind):
    params, config, kernels = make(TINY_UNET, DIM, kind=kind)
    params = jax.tree.map(lambda x: x + 0.1, params)
    save_ip_adapter(params, config, tmp_path / "a.safetensors")
    again = load_ip_adapter(tmp_path / "a.safetensors", config, kernels, DIM)
    assert set(again) == {"image_proj", "ip_adapter"}
    for part in again:
        jax.tree.map(np.testing.assert_array_equal, again[part], params[part])


def test_what_does_not_fit_is_named(tmp_path):
    params, config, kernels = make(TINY_UNET, DIM)
    file = tmp_path / "a.safetensors"
    save_ip_adapter(params, config, file)
    tensors = load_file(file)
    tensors["ip_adapter.99.to_k_ip.weight"] = tensors.pop("ip_adapter.1.to_k_ip.weight")
    tensors["image_proj.proj.bias"] = jnp.zeros(3)
    save_file({k: np.asarray(v) for k, v in tensors.items()}, file)
    with pytest.raises(UserError) as error:
        load_ip_adapter(file, config, kernels, DIM)
    for name in ("ip_adapter.99.to_k_ip", "ip_adapter.1.to_k_ip", "image_proj.proj.bias"):
        assert name in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        load_ip_adapter(tmp_path / "b.safetensors", config, kernels, DIM)
