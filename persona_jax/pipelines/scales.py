"""λ in its forms: one number, numbers by block or by layer, and regions of the picture."""

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from persona_jax.errors import UserError
from persona_jax.models.attention import LayerName
from persona_jax.models.unet import UNetConfig, cross_attention_layers
from persona_jax.runtime import outside, settings

Scale = float | dict[LayerName, float]


Number = float | int
"""(Checkers of types at run time take no int for a float.)"""
ByBlock = Mapping[str, Number | Mapping[str, Number | Sequence[Number]]]
"""``{"down": 0, "mid": 1, "up": {"block_0": [0, 1, 0]}}``."""


def read_scale(text: str, config: UNetConfig) -> Scale:
    """:func:`parse_scale` of JSON, as on a command line."""
    try:
        found = outside.parse_json(text, "scale")
    except UserError as error:
        raise _wrong(f"scale {text:.60}: neither a number nor JSON") from error
    return parse_scale(found, config)


def parse_scale(found: object, config: UNetConfig) -> Scale:
    """λ of every layer: from a number, or from numbers by block as diffusers'
    ``set_ip_adapter_scale`` takes them, ``{"down": 0, "mid": 1, "up": {"block_0": [0, 1, 0]}}``:
    blocks by number, layers in their order, and what is not named is 0.

    Raises:
      UserError: neither, or blocks that this UNet does not have; names them.
    """
    if _is_number(found):
        return float(found)
    if not isinstance(found, Mapping):
        raise _wrong(
            f'scale {found!r:.60}: {settings.FACTOR}, or blocks: {{"up": {{"block_0": 1}}}}'
        )
    layers = cross_attention_layers(config)
    out = dict.fromkeys(layers, 0.0)
    sides = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
    for side, value in found.items():
        prefix = sides.get(side)
        there = [layer for layer in layers if prefix and layer.startswith(prefix)]
        if not there:
            raise _wrong(f"scale: no {side!r:.60}; a UNet has down, mid and up")
        blocks = sorted({int(layer.split(".")[1]) for layer in there if side != "mid"})
        if not isinstance(value, Mapping):
            named: Mapping = {f"block_{i}": value for i in blocks} if blocks else {"": value}
        else:
            named = value
        for block, numbers in named.items():
            number = str(block).removeprefix("block_")
            own = [x for x in there if not block or x.startswith(f"{prefix}.{number}.")]
            if not own:
                known = ", ".join(f"block_{i}" for i in blocks)
                raise _wrong(f"scale: {side} has no {block!r:.60}; here it has {known or 'none'}")
            several = isinstance(numbers, Sequence) and not isinstance(numbers, str)
            numbers = list(numbers) if several else [numbers] * len(own)
            if len(numbers) != len(own) or not all(map(_is_number, numbers)):
                raise _wrong(f"scale: {side} {block}: {numbers!r:.60}; one number, or {len(own)}")
            out |= dict(zip(own, map(float, numbers), strict=True))
    return out


def _wrong(message: str) -> UserError:
    return UserError(message, argument="scale")


def regions(
    mask: Image.Image, config: UNetConfig, size: tuple[int, int]
) -> dict[LayerName, Float[np.ndarray, "1 _"]]:
    """How much a mask covers of each place of each layer.

    Args:
      mask: white where something counts; of any size, stretched over the picture.
      config: of the UNet.
      size: height and width of its latents.
    """
    grey = np.asarray(mask.convert("L"))
    out = {}
    for layer in cross_attention_layers(config):
        halved = 2 ** _level(layer, len(config.block_out_channels) - 1)
        rows, columns = (_bicubic(n, m // halved) for n, m in zip(grey.shape, size, strict=True))
        down, across = rows.any(axis=0), columns.any(axis=0)  # of a large mask, few pixels count
        read = grey[np.ix_(down, across)] / 255.0
        out[layer] = (rows[:, down] @ read @ columns[:, across].T).astype(np.float32).reshape(1, -1)
    return out


def _level(layer: LayerName, deepest: int) -> int:
    """How often latents have been halved where a layer is."""
    part, number = layer.split(".")[:2]
    if part == "mid_block":
        return deepest
    return int(number) if part == "down_blocks" else deepest - int(number)


def _bicubic(before: int, after: int) -> Float[np.ndarray, "{after} {before}"]:
    """What shrinks a line as ``torch.nn.functional.interpolate`` does, and so stock diffusers:
    Keys' cubic convolution with a = −3/4, no antialiasing, edges repeated. Rows sum to 1: masks
    that share a picture out do so at every layer."""
    places = (np.arange(after) + 0.5) * before / after - 0.5
    taps = np.floor(places)[:, None] + np.arange(-1, 3)
    far, a = np.abs(places[:, None] - taps), -0.75
    near = (a + 2) * far**3 - (a + 3) * far**2 + 1
    beyond = a * (far**3 - 5 * far**2 + 8 * far - 4)
    out = np.zeros((after, before))
    columns = np.clip(taps, 0, before - 1).astype(int)
    np.add.at(out, (np.arange(after)[:, None], columns), np.where(far <= 1, near, beyond))
    return out


def combine(
    scale: Scale, places: Mapping[LayerName, Float[np.ndarray, "1 _"]] | None
) -> Scale | dict[LayerName, Array]:
    """λ of each place, where there is a mask."""
    if places is None:
        return scale
    by_layer = scale if isinstance(scale, dict) else dict.fromkeys(places, scale)
    return {layer: jnp.asarray(by_layer[layer] * covered) for layer, covered in places.items()}


def _is_number(value: object) -> TypeGuard[float | int]:
    return value in settings.FACTOR
