"""LoRA files: read in the layouts of diffusers, PEFT and kohya, written in PEFT's with its α."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike
from safetensors import safe_open

from persona_jax.errors import UserError
from persona_jax.interop import tensors
from persona_jax.interop.lora_names import PEFT_PREFIX, parse_names
from persona_jax.interop.tensors import from_torch
from persona_jax.interop.torch_files import open_tensors
from persona_jax.models.lora import LoraTree

FILE = "pytorch_lora_weights.safetensors"
"""The name by which diffusers finds a LoRA in a folder."""
KOHYA_FILE = "lora_kohya.safetensors"
_METADATA = "lora_adapter_metadata"
_PEFT_CONFIG = "adapter_config.json"
_MORE = ("use_dora", "use_rslora", "lora_bias")
"""Settings of PEFT that ask for more than B · A · α/r."""


def save_lora(
    update: Mapping[str, Mapping], file: Path, alpha: float, dtype: DTypeLike = np.float32
) -> None:
    """Writes a UNet's update in PEFT's layout, its α in the metadata that diffusers and PEFT read.

    (A tensor for α makes diffusers refuse a file in this layout.)

    Args:
      update: A and B, α not counted in.
      file: where to.
      alpha: α; what is added to a kernel is A · B · α/r.
      dtype: of A and B.
    """
    settings = {
        "unet.r": max(halves["lora_A"]["kernel"].shape[-1] for halves in update.values()),
        "unet.lora_alpha": float(alpha),
        "unet.target_modules": sorted(update),
    }
    tree = jax.tree.map(lambda x: np.asarray(x, dtype), {"unet": dict(update)})
    tensors.save_tree(tree, file, {_METADATA: json.dumps(settings)})


def save_kohya(
    update: Mapping[str, Mapping], file: Path, alpha: float, dtype: DTypeLike = np.float32
) -> None:
    """The same in kohya's layout, α a tensor of each layer: for ComfyUI and A1111's web UI, which
    read no metadata."""
    tree = {
        f"lora_unet_{layer.replace('.', '_')}": {
            "lora_down": {"kernel": np.asarray(halves["lora_A"]["kernel"], dtype)},
            "lora_up": {"kernel": np.asarray(halves["lora_B"]["kernel"], dtype)},
            "alpha": np.asarray(alpha, np.float32),
        }
        for layer, halves in update.items()
    }
    tensors.save_tree(tree, file)


def load_lora(file: Path, towers: Mapping[str, Mapping]) -> dict[str, LoraTree]:
    """The updates that a LoRA file has for the base's towers, its α/r counted in.

    Args:
      file: safetensors, or torch's own; linear layers and convolutions of the UNet and the text
        tower. Of PEFT's own ``adapter_model`` files, ``adapter_config.json`` beside it is read too.
      towers: parameters, by name.

    Returns:
      For each tower that the file changes, what :func:`persona_jax.models.lora.merge` takes.

    Raises:
      UserError: no such file, another layout or kind, layers that the base does not have or that do
        not fit, halves without their other; names them.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected a LoRA, .safetensors or .bin")
    files = open_tensors(file)
    kernels = {tower: _kernels(params) for tower, params in towers.items()}
    layers = {tower: kernels[tower].keys() for tower in ("unet", "text_encoder")}
    halves: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, part in parse_names(files.shapes, layers, str(file)).items():
        array = files.read(name).astype(np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{file}: {name} has numbers that are not finite; fetch it again")
        own = halves.setdefault((part.tower, part.layer), {})
        if part.half in own:
            raise UserError(f"{file}: {name}: that part of the layer's update is there twice")
        own[part.half] = array
    settings, out = _settings(file, files), {}
    for (tower, layer), parts in halves.items():
        where = f"{file}: {tower}.{layer}"
        if "alpha" not in parts:
            parts["alpha"] = _alpha(where, settings, tower, layer)
        out.setdefault(tower, {})[layer] = _update(where, parts, kernels[tower][layer])
    return out


def _update(where: str, parts: Mapping, kernel: tuple[int, ...]) -> dict:
    """One layer's ``{"lora_A": {"kernel"}, "lora_B": {"kernel"}}``, B times α/r."""
    if missing := {"A", "B"} - parts.keys():
        raise UserError(f"{where}: half of the update is missing, {min(missing)}")
    down, up = (_kernel(parts[half]) for half in "AB")
    rank = down.shape[-1] if down.ndim else 0
    if up.ndim == 4 and up.shape[:2] == (1, 1):
        up = up[0, 0]
    if down.ndim == 4 and len(kernel) == 2 and down.shape[:2] == (1, 1):
        down = down[0, 0]
    fits = rank and up.ndim == 2 and (*down.shape[:-1], up.shape[-1]) == kernel
    if not fits or up.shape[0] != rank:
        raise UserError(
            f"{where}: {parts['A'].shape} and {parts['B'].shape} do not update a kernel of "
            f"{kernel}, as this base has"
        )
    up = up * (_number(where, rank if parts["alpha"] is None else parts["alpha"]) / rank)
    return {"lora_A": {"kernel": jnp.asarray(down)}, "lora_B": {"kernel": jnp.asarray(up)}}


def _kernel(array: np.ndarray) -> np.ndarray:
    return from_torch(("kernel",), array) if array.ndim in (2, 4) else np.zeros(())


def _number(where: str, alpha: Any) -> float:
    try:
        number = float(np.asarray(alpha, np.float64).item())
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        raise UserError(f"{where}: α is {alpha!s:.60}; expected a number")
    return number


def _kernels(params: Mapping) -> dict[str, tuple[int, ...]]:
    flat = traverse_util.flatten_dict(dict(params))
    return {".".join(path[:-1]): leaf.shape for path, leaf in flat.items() if path[-1] == "kernel"}


def _settings(file: Path, files: tensors.Tensors) -> Mapping[str, Any]:
    """What diffusers and PEFT write about a LoRA beside its tensors; empty where there is nothing.

    Raises:
      UserError: it cannot be read, or asks for more than low rank (DoRA, rank-stabilised).
    """
    if any(name.startswith(PEFT_PREFIX) for name in files.shapes):
        where = file.with_name(_PEFT_CONFIG)
        if not where.is_file():
            raise UserError(f"{file}: PEFT's own layout, whose α is in {where}, which is not there")
        text = where.read_bytes()
    elif file.suffix.lower() == ".safetensors":
        where = f"{file}: its {_METADATA}"
        with safe_open(file, framework="numpy") as handle:
            text = (handle.metadata() or {}).get(_METADATA)
    else:
        text = None
    if text is None:
        return {}
    try:
        found = json.loads(text)
        asked = [key for key, value in found.items() if value and key.split(".")[-1] in _MORE]
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} cannot be read ({error!s:.100})") from error
    if asked:
        raise UserError(f"{file}: {', '.join(asked)}: more than a low-rank update; not read here")
    return found


def _alpha(where: str, settings: Mapping, tower: str, layer: str) -> Any:
    """α of a layer; None, and then it is the rank, where nothing is said.

    PEFT's rule: the first pattern, a regular expression, that matches the end of the name.
    """

    def said(key: str) -> Any:
        return settings.get(f"{tower}.{key}", settings.get(key))

    patterns = said("alpha_pattern") or {}
    names = {layer, layer.removeprefix("text_model.")}
    try:
        for pattern, alpha in patterns.items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                return alpha
    except (re.error, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: its alpha_pattern cannot be read ({error!s:.100})") from error
    return said("lora_alpha")
