"""Layers that the UNet and the VAE share, with diffusers' names. Feature maps are [B, h, w, C]."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from persona_jax.models.platforms import platform


def normalise(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Unit length per row."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def group_norm(groups: int, epsilon: float, dtype: jnp.dtype | None, name: str) -> nn.GroupNorm:
    """GroupNorm with float32 statistics, the variance computed in two passes as in PyTorch."""
    return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def normed(
    norm: nn.Module, x: Float[Array, "..."], then: Callable[[Array], Array] = lambda x: x
) -> Float[Array, "..."]:
    """then(norm(x)), recomputed in the backward pass so that only x is stored."""
    return nn.remat(lambda norm, x: then(norm(x)))(norm, x)


def conv1(channels: int, dtype: jnp.dtype | None, name: str) -> nn.Conv:
    """1×1 convolution."""
    return nn.Conv(channels, (1, 1), dtype=dtype, name=name, conv_general_dilated=convolve)


def conv3(
    channels: int,
    dtype: jnp.dtype | None,
    name: str,
    stride: int = 1,
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 1,
) -> nn.Conv:
    """3×3 convolution; `padding` is in pixels, of all sides or ((top, bottom), (left, right))."""
    return nn.Conv(
        channels,
        (3, 3),
        strides=stride,
        padding=padding,
        dtype=dtype,
        name=name,
        conv_general_dilated=convolve,
    )


LARGE = 2**22
"""Kernel size (in numbers) above which reading the weights from memory dominates."""


def convolve(
    x: Float[Array, "B h w C"], kernel: Float[Array, "I J C K"], strides: Any, padding: Any, **how
) -> Float[Array, "B H W K"]:
    """``jax.lax.conv_general_dilated`` as :class:`flax.linen.Conv` calls it.

    On a CPU, small maps with many channels are computed as one product of patches with the kernel.
    Kernels are far larger than the maps there, and a convolution that reads them, or transposes
    them for its gradient, takes two to ten times as long. ``jax.checkpoint`` delays each kernel's
    transpose to its own backward step; otherwise all are transposed before the backward pass
    begins.
    """

    def direct(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **how)

    def by_patches(x: Array, kernel: Array) -> Array:
        (height, width), (down, right) = kernel.shape[:2], strides
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        rows, columns = (x.shape[1] - height) // down + 1, (x.shape[2] - width) // right + 1
        patches = [
            x[:, i : i + down * (rows - 1) + 1 : down, j : j + right * (columns - 1) + 1 : right]
            for i in range(height)
            for j in range(width)
        ]
        matrix = kernel.reshape(-1, kernel.shape[-1])
        return jnp.concatenate(patches, axis=-1) @ matrix

    if platform() != "cpu":
        return direct(x, kernel)
    pixels = x.shape[0] * x.shape[1] * x.shape[2] // math.prod(strides)
    small = kernel.size >= LARGE and pixels <= kernel.shape[-1]
    return jax.checkpoint(by_patches if small else direct)(x, kernel)


class ResnetBlock2D(nn.Module):
    """(norm, SiLU, conv) twice, a time embedding added between them if given, and a shortcut."""

    channels: int
    groups: int
    epsilon: float
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], time: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B h w K"]:
        """[B, h, w, C] → [B, h, w, channels]."""
        shortcut = x
        if x.shape[-1] != self.channels:
            shortcut = conv1(self.channels, self.dtype, "conv_shortcut")(x)
            if platform() == "cpu":  # computed first, so that x can be freed
                x, shortcut = jax.lax.optimization_barrier((x, shortcut))
        h = normed(group_norm(self.groups, self.epsilon, self.dtype, "norm1"), x, nn.silu)
        h = conv3(self.channels, self.dtype, "conv1")(h)
        if time is not None:
            shift = nn.Dense(self.channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))
            h += shift[:, None, None, :]
        h = normed(group_norm(self.groups, self.epsilon, self.dtype, "norm2"), h, nn.silu)
        h = conv3(self.channels, self.dtype, "conv2")(h)
        return shortcut + h


class Upsample2D(nn.Module):
    """Nearest-neighbour doubling, then a 3×3 convolution."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
        """[B, h, w, C] → [B, 2h, 2w, C]."""
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return conv3(x.shape[-1], self.dtype, "conv")(x)


class Downsample2D(nn.Module):
    """3×3 convolution of stride 2. The UNet pads all sides (1), the VAE right and bottom (0)."""

    padding: int = 1
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
        """[B, h, w, C] → [B, h/2, w/2, C]."""
        pad = (self.padding, self.padding) if self.padding else (0, 1)
        return conv3(x.shape[-1], self.dtype, "conv", stride=2, padding=(pad, pad))(x)
