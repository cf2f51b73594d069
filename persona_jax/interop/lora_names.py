"""Parses tensor names in LoRA files into tower, layer, and part of the update (A, B or α).

Supported are PEFT's own layout, those of diffusers (PEFT's with the tower as prefix, and its two
older ones), and kohya's, whose names have underscores in place of dots.
"""

import re
from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple

from persona_jax.errors import UserError, listed
from persona_jax.interop.tensors import foreign_kind

TOWERS = ("unet", "text_encoder")
PEFT_PREFIX = "base_model.model."

_HALVES = {"lora_A": "A", "lora_B": "B", "lora.down": "A", "lora.up": "B"}
_HALVES |= {"lora_linear_layer.down": "A", "lora_linear_layer.up": "B"}
_NAME = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, _HALVES))})\.weight")
_OLDEST = re.compile(r"(.+)\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight")
_KOHYA = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder"}
_KOHYA_NAME = re.compile(
    rf"({'|'.join(_KOHYA)})_([^.]+)\.(lora_down\.weight|lora_up\.weight|alpha)"
)
_KOHYA_HALVES = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}

_LYCORIS = (
    "a LyCORIS update ({}), which is not a product of two matrices; not supported: merge it into a "
    "base with the tool that made it, and give that base as the pipeline"
)
_OTHER_KINDS = {
    "hada_": _LYCORIS.format("LoHa"),
    "lokr_": _LYCORIS.format("LoKr"),
    "oft_": _LYCORIS.format("OFT"),
    "boft_": _LYCORIS.format("BOFT"),
    "glora_": _LYCORIS.format("GLoRA"),
    "lora_mid": _LYCORIS.format("LoCon with lora_mid"),
    ".diff": _LYCORIS.format("full differences"),
    "dora_scale": "a DoRA, which is not a plain low-rank update; not supported",
    "lora_magnitude_vector": "a DoRA, which is not a plain low-rank update; not supported",
    "lora_B.bias": "a LoRA with biases (lora_bias): not supported; train it without",
    "lora_te2_": "for Stable Diffusion XL, which has two text towers; use one for 1.x or 2.x",
    "text_encoder_2.": "for Stable Diffusion XL, which has two text towers; use one for 1.x or 2.x",
    "transformer.": "for a transformer (FLUX, Stable Diffusion 3); use one for 1.x or 2.x",
    "lora_transformer_": "for a transformer (FLUX, Stable Diffusion 3); use one for 1.x or 2.x",
    "diffusion_model.": "for a transformer (FLUX, Stable Diffusion 3); use one for 1.x or 2.x",
    "lora_unet_double_blocks": "for FLUX; use one for Stable Diffusion 1.x or 2.x",
    "lora_unet_input_blocks": "for Stable Diffusion XL, by the names of its layers; use one for "
    "1.x or 2.x",
    "image_proj.": "an IP-Adapter; load it as an adapter",
    "ip_adapter.": "an IP-Adapter; load it as an adapter",
}


class Part(NamedTuple):
    """A part of a layer's update; `half` is ``A``, ``B`` or ``alpha``."""

    tower: str
    layer: str
    half: str


def parse_names(
    names: Iterable[str], layers: Mapping[str, Set[str]], where: str
) -> dict[str, Part]:
    """Finds the tower, layer and part of each tensor.

    Args:
      names: of the tensors.
      layers: layers of the base that have a kernel, by tower, with torch's names.
      where: the file, for errors.

    Returns:
      ``{tensor name: part}``.

    Raises:
      UserError: the file is a LoRA of another kind or for another base, or not a LoRA.
    """
    flat = {
        tower: {layer.replace(".", "_"): layer for layer in own} for tower, own in layers.items()
    }
    parts, unknown, absent = {}, [], []
    for name in names:
        part = _parse(name, layers, flat)
        if part is None:
            unknown.append(name)
        elif part.layer not in layers[part.tower]:
            absent.append(f"{part.tower}.{part.layer}")
        else:
            parts[name] = part
    if unknown or absent:
        _refuse_other_kinds([*unknown, *absent, *parts], where)
    if unknown or not (parts or absent):
        raise UserError(
            f"{where}: not a LoRA for {' and '.join(TOWERS)} in the layout of diffusers, PEFT or "
            f"kohya; unknown: {listed(unknown) or 'nothing at all'}",
            unknown,
        )
    if absent:
        raise UserError(
            f"{where}: the base has no such layer: {listed(sorted(set(absent)))}; is it for "
            "another base?",
            absent,
        )
    return parts


def _parse(name: str, layers: Mapping[str, Set[str]], flat: Mapping[str, Mapping]) -> Part | None:
    if match := _KOHYA_NAME.fullmatch(name):
        prefix, stem, half = match.groups()
        tower = _KOHYA[prefix]
        return Part(tower, flat[tower].get(stem, stem), _KOHYA_HALVES[half])
    if name.startswith(PEFT_PREFIX):
        match = _NAME.fullmatch(name.removeprefix(PEFT_PREFIX))
        return match and _in_one_of(layers, match[1], _HALVES[match[2]])
    tower, _, rest = name.partition(".")
    if tower not in TOWERS:
        return None
    if match := _OLDEST.fullmatch(rest):
        attention, projection, half = match.groups()
        projection += ".0" * (projection == "to_out")
        return Part(tower, f"{attention}.{projection}", "A" if half == "down" else "B")
    if rest.endswith(".alpha"):
        return _in_one_of({tower: layers[tower]}, rest.removesuffix(".alpha"), "alpha")
    if match := _NAME.fullmatch(rest):
        return _in_one_of({tower: layers[tower]}, match[1], _HALVES[match[2]])
    return None


def _in_one_of(layers: Mapping[str, Set[str]], layer: str, half: str) -> Part:
    """The part, in the tower that has `layer`, with or without the prefix ``text_model.``, which
    transformers 5 omits."""
    for tower, own in layers.items():
        for name in (layer, f"text_model.{layer}"):
            if name in own:
                return Part(tower, name, half)
    return Part(next(iter(layers)), layer, half)


def _refuse_other_kinds(names: list[str], where: str) -> None:
    for name in names:
        for mark, description in _OTHER_KINDS.items():
            if mark in name:
                raise UserError(f"{where}: {description} ({name:.100})")
    if (kind := foreign_kind(names)) and "a LoRA" not in kind:
        raise UserError(f"{where}: {kind}")
