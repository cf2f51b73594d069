"""Convolutions as products of patches, and gradients that recompute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models

from persona_jax.models import layers
from persona_jax.models.layers import conv3


@pytest.fixture(autouse=True)
def every_kernel_is_large(monkeypatch):
    monkeypatch.setattr(layers, "LARGE", 0)


def inputs(side: int, channels: int, out: int):
    x = torch_models.normal(1, side, side, channels)
    kernel, bias = (
        torch_models.normal(3, 3, channels, out, seed=1) * 0.1,
        torch_models.normal(out, seed=2),
    )
    return x, {"params": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}


def lowered(layer, params, x) -> str:
    return jax.jit(lambda params, x: layer.apply(params, x)).lower(params, x).as_text()


@pytest.mark.parametrize("padding", [1, ((0, 1), (0, 1))])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("side", "channels", "out"), [(6, 8, 48), (7, 3, 64), (8, 8, 4)])
def test_a_convolution_and_its_gradients_are_torchs(side, channels, out, stride, padding):
    x, params = inputs(side, channels, out)
    layer = conv3(out, None, "conv", stride, padding)

    def ours(params, x):
        return layer.apply(params, jnp.asarray(x))

    theirs_x = torch.tensor(x).permute(0, 3, 1, 2).requires_grad_(True)
    kernel = torch.tensor(np.array(params["params"]["kernel"])).permute(3, 2, 0, 1)
    kernel = kernel.contiguous().requires_grad_(True)
    bias = torch.tensor(np.array(params["params"]["bias"]))
    (top, bottom), (left, right) = ((1, 1),) * 2 if padding == 1 else padding
    padded = torch.nn.functional.pad(theirs_x, (left, right, top, bottom))
    theirs = torch.nn.functional.conv2d(padded, kernel, bias, stride)
    output, back = jax.vjp(ours, params, x)
    assert torch_models.relative(output.transpose(0, 3, 1, 2), theirs) < 1e-5

    cotangent = torch_models.normal(*output.shape, seed=3)
    theirs.backward(torch.tensor(cotangent).permute(0, 3, 1, 2))
    of_params, of_x = jax.jit(back)(jnp.asarray(cotangent))
    of_kernel = of_params["params"]["kernel"]
    assert torch_models.relative(of_x.transpose(0, 3, 1, 2), theirs_x.grad) < 1e-5
    assert torch_models.relative(of_kernel.transpose(3, 2, 0, 1), kernel.grad) < 1e-5


@pytest.mark.parametrize(("side", "by_patches"), [(4, True), (16, False)])
def test_small_maps_of_many_channels_are_products_on_a_cpu_alone(side, by_patches, monkeypatch):
    x, params = inputs(side, 8, 64)
    layer = conv3(64, None, "conv")
    assert ("convolution" not in lowered(layer, params, x)) == by_patches
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    assert "convolution" in lowered(layer, params, x)


def test_small_kernels_are_left_alone(monkeypatch):
    monkeypatch.setattr(layers, "LARGE", 2**22)
    x, params = inputs(4, 8, 64)
    assert "convolution" in lowered(conv3(64, None, "conv"), params, x)
