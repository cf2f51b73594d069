"""LoRA files: reads the layouts of diffusers, PEFT and kohya; writes PEFT's and kohya's."""

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
"""The file name that diffusers looks for in a folder."""
KOHYA_FILE = "lora_kohya.safetensors"
_METADATA = "lora_adapter_metadata"
_PEFT_CONFIG = "adapter_config.json"
_MORE = ("use_dora", "use_rslora", "lora_bias")
"""Settings of PEFT for updates other than B · A · α/r."""


def save_lora(
    update: Mapping[str, Mapping], file: Path, alpha: float, dtype: DTypeLike = np.float32
) -> None:
    """Writes a UNet's update in PEFT's layout, with α in the metadata.

    diffusers and PEFT read α there; diffusers refuses files of this layout with a tensor for α.

    Args:
      update: A and B of each layer, not multiplied by α.
      file: where to write.
      alpha: α; A · B · α/r is added to a kernel.
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
    """Writes a UNet's update in kohya's layout, with α as a tensor of each layer.

    This is for ComfyUI and A1111's web UI, which do not read metadata.

    Args:
      update: as in :func:`save_lora`.
      file: where to write.
      alpha: as in :func:`save_lora`.
      dtype: of A and B.
    """
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
    """Reads a LoRA's updates of the base's towers, multiplied by α/r.

    Linear layers and convolutions of the UNet and the text tower may be updated.

    Args:
      file: safetensors, or torch's own format. For PEFT's ``adapter_model`` files,
        ``adapter_config.json`` in the same folder is read as well.
      towers: parameters of the base's towers, by name.

    Returns:
      For each tower that the file changes, a tree for :func:`persona_jax.models.lora.merge`.

    Raises:
      UserError: the file is missing, or of another layout or kind; layers are not in the base, do
        not fit, or lack A or B (named).
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
    settings = _settings(file, files)
    out: dict[str, dict[str, dict]] = {}
    for (tower, layer), parts in halves.items():
        where = f"{file}: {tower}.{layer}"
        if "alpha" not in parts:
            parts["alpha"] = _alpha(where, settings, tower, layer)
        out.setdefault(tower, {})[layer] = _update(where, parts, kernels[tower][layer])
    return dict(out)


def _update(where: str, parts: Mapping, kernel: tuple[int, ...]) -> dict:
    """A layer's ``{"lora_A": {"kernel"}, "lora_B": {"kernel"}}``, with B multiplied by α/r."""
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
    """PEFT's settings of a LoRA, from the file's metadata or PEFT's JSON; empty if there are none.

    Raises:
      UserError: they cannot be read, or are not of a plain LoRA (DoRA, rank-stabilised).
    """
    text: str | bytes | None
    if any(name.startswith(PEFT_PREFIX) for name in files.shapes):
        beside = file.with_name(_PEFT_CONFIG)
        where = str(beside)
        if not beside.is_file():
            raise UserError(f"{file}: PEFT's own layout; its α is in {where}, which is missing")
        text = beside.read_bytes()
    elif file.suffix.lower() == ".safetensors":
        where = f"{file}: its {_METADATA}"
        with safe_open(file, framework="numpy") as handle:
            text = (handle.metadata() or {}).get(_METADATA)
    else:
        text = None
    if text is None:
        return {}
    try:
        settings = json.loads(text)
        other = [key for key, value in settings.items() if value and key.split(".")[-1] in _MORE]
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} cannot be read ({error!s:.100})") from error
    if other:
        raise UserError(f"{file}: {', '.join(other)}: not a plain low-rank update; not supported")
    return settings


def _alpha(where: str, settings: Mapping, tower: str, layer: str) -> Any:
    """α of a layer by PEFT's settings; None, which means the rank, if they have none.

    As in PEFT, the first regular expression in ``alpha_pattern`` that matches the end of the
    layer's name sets α, and else ``lora_alpha``.
    """

    def setting(key: str) -> Any:
        return settings.get(f"{tower}.{key}", settings.get(key))

    patterns = setting("alpha_pattern") or {}
    names = {layer, layer.removeprefix("text_model.")}
    try:
        for pattern, alpha in patterns.items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                return alpha
    except (re.error, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: its alpha_pattern cannot be read ({error!s:.100})") from error
    return setting("lora_alpha")
