"""Convolutions by patches, and functions computed by another kernel on each platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stock
import torch

from persona_jax.models import layers
from persona_jax.models.layers import conv3
from persona_jax.models.platforms import by_platform


@pytest.fixture(autouse=True)
def every_kernel_is_large(monkeypatch):
    monkeypatch.setattr(layers, "LARGE", 0)


def inputs(side: int, channels: int, out: int):
    x = stock.normal(1, side, side, channels)
    kernel, bias = stock.normal(3, 3, channels, out, seed=1) * 0.1, stock.normal(out, seed=2)
    return x, {"params": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}


def lowered(layer, params, x, platform: str) -> str:
    run = jax.jit(lambda params, x: layer.apply(params, x))
    return jax.export.export(run, platforms=[platform])(params, x).mlir_module()


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
    found, back = jax.vjp(ours, params, x)
    assert stock.relative(found.transpose(0, 3, 1, 2), theirs) < 1e-5

    cotangent = stock.normal(*found.shape, seed=3)
    theirs.backward(torch.tensor(cotangent).permute(0, 3, 1, 2))
    of_params, of_x = jax.jit(back)(jnp.asarray(cotangent))
    of_kernel = of_params["params"]["kernel"]
    assert stock.relative(of_x.transpose(0, 3, 1, 2), theirs_x.grad) < 1e-5
    assert stock.relative(of_kernel.transpose(3, 2, 0, 1), kernel.grad) < 1e-5


@pytest.mark.parametrize(("side", "by_patches"), [(4, True), (16, False)])
def test_small_maps_of_many_channels_are_products_on_a_cpu_alone(side, by_patches):
    x, params = inputs(side, 8, 64)
    layer = conv3(64, None, "conv")
    assert ("convolution" not in lowered(layer, params, x, "cpu")) == by_patches
    assert "convolution" in lowered(layer, params, x, "tpu")


def test_small_kernels_are_left_alone(monkeypatch):
    monkeypatch.setattr(layers, "LARGE", 2**22)
    x, params = inputs(4, 8, 64)
    assert "convolution" in lowered(conv3(64, None, "conv"), params, x, "cpu")


def test_a_gradient_keeps_the_inputs_and_is_the_platforms():
    def wasteful(x):
        return jnp.sin(jnp.outer(x, x)).sum(axis=1)

    here = by_platform(cpu=lambda x: 3 * x, default=wasteful)
    x = jnp.arange(100.0)
    found, back = jax.vjp(here, x)
    np.testing.assert_array_equal(found, 3 * x)
    np.testing.assert_array_equal(back(x)[0], 3 * x)
    kept = jax.eval_shape(lambda x: jax.vjp(here, x)[1], x)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) <= 2 * x.size
