"""Forms of λ: one number, numbers by block or by layer, and regions of the image."""

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from persona_jax.errors import UserError
from persona_jax.models.attention import LayerName
from persona_jax.models.unet import UNetConfig, cross_attention_layers
from persona_jax.runtime import settings, untrusted

Scale = float | dict[LayerName, float]


Number = float | int
"""Includes int, because run-time type checkers do not accept an int for a float."""
ByBlock = Mapping[str, Number | Mapping[str, Number | Sequence[Number]]]
"""``{"down": 0, "mid": 1, "up": {"block_0": [0, 1, 0]}}``."""


def read_scale(text: str, config: UNetConfig) -> Scale:
    """Applies :func:`parse_scale` to JSON, as given on a command line."""
    try:
        value = untrusted.parse_json(text, "scale")
    except UserError as error:
        raise _wrong(f"scale {text:.60}: neither a number nor JSON") from error
    return parse_scale(value, config)


def parse_scale(value: object, config: UNetConfig) -> Scale:
    """Parses λ: one number, or numbers by block.

    Numbers by block are given as for diffusers' ``set_ip_adapter_scale``, for example
    ``{"down": 0, "mid": 1, "up": {"block_0": [0, 1, 0]}}``: blocks by number, layers in order.
    Layers that are not named get 0.

    Args:
      value: a number, or a mapping by block.
      config: of the UNet.

    Returns:
      A number, or a number for each layer.

    Raises:
      UserError: the value is neither, or names blocks that this UNet does not have.
    """
    if _is_number(value):
        return float(value)
    if not isinstance(value, Mapping):
        raise _wrong(
            f'scale {value!r:.60}: {settings.FACTOR}, or blocks: {{"up": {{"block_0": 1}}}}'
        )
    layers = cross_attention_layers(config)
    by_layer = dict.fromkeys(layers, 0.0)
    sides = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
    for side, by_block in value.items():
        prefix = sides.get(side)
        in_side = [layer for layer in layers if prefix and layer.startswith(prefix)]
        if not in_side:
            raise _wrong(f"scale: no {side!r:.60}; a UNet has down, mid and up")
        blocks = sorted({int(layer.split(".")[1]) for layer in in_side if side != "mid"})
        if not isinstance(by_block, Mapping):
            named: Mapping = {f"block_{i}": by_block for i in blocks} if blocks else {"": by_block}
        else:
            named = by_block
        for block, numbers in named.items():
            number = str(block).removeprefix("block_")
            in_block = [x for x in in_side if not block or x.startswith(f"{prefix}.{number}.")]
            if not in_block:
                known = ", ".join(f"block_{i}" for i in blocks)
                raise _wrong(f"scale: {side} has no {block!r:.60}; here it has {known or 'none'}")
            several = isinstance(numbers, Sequence) and not isinstance(numbers, str)
            numbers = list(numbers) if several else [numbers] * len(in_block)
            if len(numbers) != len(in_block) or not all(map(_is_number, numbers)):
                raise _wrong(
                    f"scale: {side} {block}: {numbers!r:.60}; one number, or {len(in_block)}"
                )
            by_layer |= dict(zip(in_block, map(float, numbers), strict=True))
    return by_layer


def _wrong(message: str) -> UserError:
    return UserError(message, argument="scale")


def regions(
    mask: Image.Image, config: UNetConfig, size: tuple[int, int]
) -> dict[LayerName, Float[np.ndarray, "1 _"]]:
    """Resizes a mask to the resolution of each cross-attention layer.

    Args:
      mask: white where the person is to be; of any size, stretched over the image.
      config: of the UNet.
      size: height and width of its latents.

    Returns:
      For each layer, the coverage of each position, 0 to 1 ``[1, h·w]``. Bicubic resizing may
      overshoot slightly.
    """
    grey = np.asarray(mask.convert("L"))
    coverage = {}
    for layer in cross_attention_layers(config):
        halved = 2 ** _level(layer, len(config.block_out_channels) - 1)
        rows, columns = (_bicubic(n, m // halved) for n, m in zip(grey.shape, size, strict=True))
        # Few pixels of a large mask have a weight that is not 0: only these are read.
        down, across = rows.any(axis=0), columns.any(axis=0)
        values = grey[np.ix_(down, across)] / 255.0
        coverage[layer] = (
            (rows[:, down] @ values @ columns[:, across].T).astype(np.float32).reshape(1, -1)
        )
    return coverage


def _level(layer: LayerName, deepest: int) -> int:
    """How many times latents have been halved at a layer."""
    part, number = layer.split(".")[:2]
    if part == "mid_block":
        return deepest
    return int(number) if part == "down_blocks" else deepest - int(number)


def _bicubic(before: int, after: int) -> Float[np.ndarray, "{after} {before}"]:
    """The matrix that resizes a line of `before` values to `after` values, bicubic.

    It is Keys' cubic convolution with a = −3/4, no antialiasing and repeated edges, the same as
    ``torch.nn.functional.interpolate``, which diffusers uses. Rows sum to 1, so masks that sum to 1
    at each pixel do so at every layer.
    """
    positions = (np.arange(after) + 0.5) * before / after - 0.5
    taps = np.floor(positions)[:, None] + np.arange(-1, 3)
    far, a = np.abs(positions[:, None] - taps), -0.75
    near = (a + 2) * far**3 - (a + 3) * far**2 + 1
    beyond = a * (far**3 - 5 * far**2 + 8 * far - 4)
    matrix = np.zeros((after, before))
    columns = np.clip(taps, 0, before - 1).astype(int)
    np.add.at(matrix, (np.arange(after)[:, None], columns), np.where(far <= 1, near, beyond))
    return matrix


def combine(
    scale: Scale, places: Mapping[LayerName, Float[np.ndarray, "1 _"]] | None
) -> Scale | dict[LayerName, Array]:
    """Multiplies λ by a mask's coverage of each position; without a mask, λ is unchanged."""
    if places is None:
        return scale
    by_layer = scale if isinstance(scale, dict) else dict.fromkeys(places, scale)
    return {layer: jnp.asarray(by_layer[layer] * covered) for layer, covered in places.items()}


def _is_number(value: object) -> TypeGuard[float | int]:
    return value in settings.FACTOR
