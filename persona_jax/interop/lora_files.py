"""LoRA files in diffusers' layouts: PEFT's, and the two that came before it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import safe_open

from persona_jax.errors import UserError
from persona_jax.interop.tensors import from_torch
from persona_jax.interop.torch_files import open_tensors
from persona_jax.models.lora import LoraTree

TOWERS = ("unet", "text_encoder")
_HALVES = {"lora_A": "A", "lora_B": "B", "lora.down": "A", "lora.up": "B"}
_HALVES |= {"lora_linear_layer.down": "A", "lora_linear_layer.up": "B"}
_NAME = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, _HALVES))})\.weight")
_OLDEST = re.compile(r"(.+)\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight")
_METADATA = "lora_adapter_metadata"


def load_lora(file: Path, towers: Mapping[str, Mapping]) -> dict[str, LoraTree]:
    """The updates that a LoRA file has for the base's towers, its α/r counted in.

    Args:
      file: safetensors, or torch's own; linear layers and convolutions of the UNet and the text
        tower.
      towers: parameters, by name.

    Returns:
      For each tower that the file changes, what :func:`persona_jax.models.lora.merge` takes.

    Raises:
      UserError: no such file, another layout, layers that the base does not have or that do not
        fit, halves without their other; names them.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected a LoRA, .safetensors or .bin")
    files = open_tensors(file)
    if any(name.startswith(("lora_unet_", "lora_te_")) for name in files.shapes):
        raise UserError(
            f"{file}: a LoRA in kohya's layout; load it with diffusers (load_lora_weights) and "
            "save it again (save_lora_weights), which writes the one that is read here"
        )
    halves: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    strange = []
    for name in files.shapes:
        place, half = _parse(name)
        if place is None:
            strange.append(name)
            continue
        array = files.read(name).astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{file}: {name} has numbers that are not finite; fetch it again")
        halves.setdefault(place, {})[half] = array
    if strange or not halves:
        raise UserError(
            f"{file}: not a LoRA for {' and '.join(TOWERS)} in diffusers' layout; unknown: "
            f"{', '.join(strange[:6]) or 'nothing at all'}"
        )
    settings, out = _settings(file), {}
    for (tower, layer), parts in halves.items():
        kernels = _kernels(towers[tower])
        name = layer if layer in kernels else f"text_model.{layer}"
        if name not in kernels:
            raise UserError(f"{file}: {tower}.{layer}: the base has no such layer")
        if "alpha" not in parts:
            parts["alpha"] = _alpha(settings, tower, layer)
        where = f"{file}: {tower}.{layer}"
        out.setdefault(tower, {})[name] = _update(where, parts, kernels[name])
    return out


def _parse(name: str) -> tuple[tuple[str, str] | None, str]:
    """``((tower, layer), half)``; half is A, B or alpha."""
    tower, _, rest = name.partition(".")
    if tower not in TOWERS:
        return None, ""
    if found := _OLDEST.fullmatch(rest):
        attention, projection, half = found.groups()
        projection += ".0" * (projection == "to_out")
        return (tower, f"{attention}.{projection}"), "A" if half == "down" else "B"
    if rest.endswith(".alpha"):
        return (tower, rest.removesuffix(".alpha")), "alpha"
    if found := _NAME.fullmatch(rest):
        layer, half = found.groups()
        return (tower, layer), _HALVES[half]
    return None, ""


def _update(where: str, parts: Mapping, kernel: tuple[int, ...]) -> dict:
    """One layer's ``{"lora_A": {"kernel"}, "lora_B": {"kernel"}}``, B times α/r."""
    if missing := {"A", "B"} - parts.keys():
        raise UserError(f"{where}: half of the update is missing, {min(missing)}")
    down, up = (from_torch(("kernel",), parts[half]) for half in "AB")
    rank = parts["A"].shape[0]
    if up.ndim == 4:
        up = up[0, 0]
    if down.ndim == 4 and len(kernel) == 2:
        down = down[0, 0]
    if (*down.shape[:-1], up.shape[-1]) != kernel or up.shape[0] != rank:
        raise UserError(
            f"{where}: {parts['A'].shape} and {parts['B'].shape} do not update a kernel of "
            f"{kernel}, as this base has"
        )
    alpha = rank if parts["alpha"] is None else float(parts["alpha"])
    up = up * (alpha / rank)
    return {"lora_A": {"kernel": jnp.asarray(down)}, "lora_B": {"kernel": jnp.asarray(up)}}


def _kernels(params: Mapping) -> dict[str, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(dict(params))
    return {".".join(path[:-1]): leaf.shape for path, leaf in flat.items() if path[-1] == "kernel"}


def _settings(file: Path) -> Mapping:
    """What diffusers and PEFT write about a LoRA beside its tensors; empty where there is nothing.

    Raises:
      UserError: it cannot be read, or asks for more than low rank (DoRA, rank-stabilised).
    """
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, framework="numpy") as handle:
        text = (handle.metadata() or {}).get(_METADATA)
    if text is None:
        return {}
    try:
        found = json.loads(text)
        asked = [
            key
            for key, value in found.items()
            if value and key.split(".")[-1] in ("use_dora", "use_rslora", "lora_bias")
        ]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file}: its {_METADATA} cannot be read ({error})") from error
    if asked:
        raise UserError(f"{file}: {', '.join(asked)}: more than a low-rank update; not read here")
    return found


def _alpha(settings: Mapping, tower: str, layer: str) -> float | None:
    """α of a layer; None, and then it is the rank, where nothing is said."""
    patterns = settings.get(f"{tower}.alpha_pattern") or {}
    for pattern, alpha in patterns.items():
        if re.fullmatch(rf"(?:.*\.)?{re.escape(pattern)}", layer):
            return float(alpha)
    return settings.get(f"{tower}.lora_alpha")
