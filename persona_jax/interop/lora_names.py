"""What a tensor's name in a LoRA file says: the tower, the layer, and which part of its update.

Read are PEFT's own layout, diffusers' (PEFT's with the tower in front, and the two before it) and
kohya's, whose names have underscores for dots.
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
    "a LyCORIS update ({}), which is no product of two matrices and not read here; merge it into "
    "a base with the tool that made it, and give that base as the pipeline"
)
_OTHER_KINDS = {
    "hada_": _LYCORIS.format("LoHa"),
    "lokr_": _LYCORIS.format("LoKr"),
    "oft_": _LYCORIS.format("OFT"),
    "boft_": _LYCORIS.format("BOFT"),
    "glora_": _LYCORIS.format("GLoRA"),
    "lora_mid": _LYCORIS.format("LoCon with lora_mid"),
    ".diff": _LYCORIS.format("full differences"),
    "dora_scale": "a DoRA: more than a low-rank update; not read here",
    "lora_magnitude_vector": "a DoRA: more than a low-rank update; not read here",
    "lora_B.bias": "a LoRA with biases (lora_bias): not read here; train it without",
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
    """A part of one layer's update: `half` is ``A``, ``B`` or ``alpha``."""

    tower: str
    layer: str
    half: str


def parse_names(
    names: Iterable[str], layers: Mapping[str, Set[str]], where: str
) -> dict[str, Part]:
    """Which part of which layer's update each tensor is.

    Args:
      names: of the tensors.
      layers: those of the base with a kernel, by tower, in torch's names.
      where: what to call the file in an error.

    Raises:
      UserError: a LoRA of another kind or for another base, or no LoRA; names the first few.
    """
    flat = {
        tower: {layer.replace(".", "_"): layer for layer in own} for tower, own in layers.items()
    }
    found, strange, absent = {}, [], []
    for name in names:
        part = _parse(name, layers, flat)
        if part is None:
            strange.append(name)
        elif part.layer not in layers[part.tower]:
            absent.append(f"{part.tower}.{part.layer}")
        else:
            found[name] = part
    if strange or absent:
        _refuse_other_kinds([*strange, *absent, *found], where)
    if strange or not (found or absent):
        raise UserError(
            f"{where}: not a LoRA for {' and '.join(TOWERS)} in the layout of diffusers, PEFT or "
            f"kohya; unknown: {listed(strange) or 'nothing at all'}",
            strange,
        )
    if absent:
        raise UserError(
            f"{where}: the base has no such layer: {listed(sorted(set(absent)))}; is it for "
            "another base?",
            absent,
        )
    return found


def _parse(name: str, layers: Mapping[str, Set[str]], flat: Mapping[str, Mapping]) -> Part | None:
    if found := _KOHYA_NAME.fullmatch(name):
        prefix, stem, half = found.groups()
        tower = _KOHYA[prefix]
        return Part(tower, flat[tower].get(stem, stem), _KOHYA_HALVES[half])
    if name.startswith(PEFT_PREFIX):
        found = _NAME.fullmatch(name.removeprefix(PEFT_PREFIX))
        return found and _in_one_of(layers, found[1], _HALVES[found[2]])
    tower, _, rest = name.partition(".")
    if tower not in TOWERS:
        return None
    if found := _OLDEST.fullmatch(rest):
        attention, projection, half = found.groups()
        projection += ".0" * (projection == "to_out")
        return Part(tower, f"{attention}.{projection}", "A" if half == "down" else "B")
    if rest.endswith(".alpha"):
        return _in_one_of({tower: layers[tower]}, rest.removesuffix(".alpha"), "alpha")
    if found := _NAME.fullmatch(rest):
        return _in_one_of({tower: layers[tower]}, found[1], _HALVES[found[2]])
    return None


def _in_one_of(layers: Mapping[str, Set[str]], layer: str, half: str) -> Part:
    """transformers 5 leaves the text tower's prefix out."""
    for tower, own in layers.items():
        for name in (layer, f"text_model.{layer}"):
            if name in own:
                return Part(tower, name, half)
    return Part(next(iter(layers)), layer, half)


def _refuse_other_kinds(names: list[str], where: str) -> None:
    for name in names:
        for mark, told in _OTHER_KINDS.items():
            if mark in name:
                raise UserError(f"{where}: {told} ({name:.100})")
    if (kind := foreign_kind(names)) and "a LoRA" not in kind:
        raise UserError(f"{where}: {kind}")
