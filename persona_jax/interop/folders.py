"""Pipeline folders in diffusers' layout, local or on the hub; one folder per tower."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
from jax.typing import DTypeLike

from persona_jax.errors import UserError
from persona_jax.interop import tensors
from persona_jax.models.towers import abstract_params, build
from persona_jax.runtime import buckets, files, untrusted


@dataclasses.dataclass(frozen=True)
class Tower:
    """A pretrained network: the module, its parameters, and its files' content hash.

    Attributes:
      module: the Flax module.
      params: its parameter tree, or the tree of their shapes.
      config: the content of its ``config.json``, as published.
      hash: sha256 of its files, hex; identifies the tower in caches and checkpoints.
    """

    module: nn.Module
    params: Mapping
    config: Mapping[str, Any]
    hash: str = ""


SHIPPED = {"tiny": Path(__file__).parents[1] / "assets" / "tiny"}
"""Bases in the package, by name. Each folder has ``pipeline/``, ``reader/`` (the trait classifier)
and ``ip_adapter.safetensors``."""

_OLD_VAE_ATTENTION = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


def _rename_vae(name: str) -> str:
    for old, new in _OLD_VAE_ATTENTION.items():
        name = name.replace(old, new)
    return name


_BARE_CLIP = ("embeddings.", "encoder.", "final_layer_norm.", "pre_layrnorm.", "post_layernorm.")


_OTHER_HALF = {
    "text_model": ("text_projection.weight",),  # of CLIPTextModelWithProjection
    "vision_model": ("text_model.", "text_projection.", "logit_scale"),  # of CLIPModel
}


def _rename_clip(prefix: str) -> Callable[[str], str | None]:
    def rename(name: str) -> str | None:
        if name.endswith("embeddings.position_ids"):  # a constant in old files
            return None
        if name.startswith(_OTHER_HALF[prefix]):  # transformers ignores these, too
            return None
        return f"{prefix}.{name}" if name.startswith(_BARE_CLIP) else name

    return rename


_RENAME: dict[str, Callable[[str], str | None]] = {
    "unet": lambda name: name,
    "vae": _rename_vae,
    "text_encoder": _rename_clip("text_model"),
    "image_encoder": _rename_clip("vision_model"),
}


def find(path_or_id: str) -> Path:
    """Finds a pipeline folder, downloading it from the hub if need be.

    Args:
      path_or_id: a name in :data:`SHIPPED`, a local folder, or a hub id, ``owner/name`` or
        ``owner/name/folder``. The name of a shipped base takes precedence over a local folder of
        the same name, which is given as ``./name``.

    Raises:
      UserError: no such folder, a single file, or the download fails.
    """
    if path_or_id in SHIPPED:
        return SHIPPED[path_or_id] / "pipeline"
    local = buckets.local(path_or_id)
    if path_or_id and local.is_dir():
        return local
    if path_or_id and local.is_file():
        raise UserError(
            f"{path_or_id}: a single file; expected a folder: open it with diffusers "
            "(StableDiffusionPipeline.from_single_file), save_pretrained(FOLDER), and give FOLDER"
        )
    owner, name, *inside = [*path_or_id.split("/"), ""]
    here = local.exists() or buckets.is_bucket(path_or_id)
    if not owner or owner in (".", "..", "~") or not name or here:
        raise UserError(f"{path_or_id}: no such folder (nor a hub id of the form owner/name)")
    from huggingface_hub import snapshot_download

    prefix = "/".join(part for part in inside if part)
    stems = ("diffusion_pytorch_model", "model")
    weights = [f"{stem}{end}.safetensors" for stem in stems for end in ("", "-*-of-*")]
    places = (f"{prefix}/", f"{prefix}/*/") if prefix else ("", "*/")
    try:
        snapshot = snapshot_download(
            f"{owner}/{name}",
            allow_patterns=[p + file for p in places for file in ("*.json", "*.txt", *weights)],
            ignore_patterns=["safety_checker/*"],
        )
    except Exception as error:
        # Offline, missing, gated or misspelt: the classes differ, but what to do is the same.
        raise UserError(
            f"{path_or_id}: no local folder of that name, and the hub raised "
            f"{type(error).__name__}; check the name and the network, or give a local folder"
        ) from error
    return Path(snapshot) / prefix


def refuse_other_families(folder: Path) -> None:
    """Refuses pipeline folders that are not of Stable Diffusion 1.x or 2.x.

    Raises:
      UserError: the pipeline is of another family, which is named.
    """
    index = folder / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    parts = [part for part in ("transformer", "text_encoder_2") if (folder / part).is_dir()]
    other = isinstance(name, str) and re.match(r"StableDiffusion(XL|3|Cascade)|(?!Stable)", name)
    if other or parts:
        has = f"has {' and '.join(f'{part}/' for part in parts)}"
        raise UserError(
            f"{folder}: {f'a {name:.60}' if other else has}; supported are pipelines of "
            "Stable Diffusion 1.x and 2.x (StableDiffusionPipeline)"
        )


def content_hash(folder: Path) -> str:
    """sha256 (hex) of a tower folder's config.json and weights, in order of file name."""
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *tensors.weight_files(folder)]):
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def read_json(file: Path) -> dict:
    """A JSON file of a pipeline folder (see :func:`persona_jax.runtime.untrusted.read_json`).

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        return untrusted.read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: missing; is {file.parent.parent} a pipeline folder?") from None


def vision_half(config: Mapping[str, Any]) -> dict[str, Any]:
    """The vision tower's settings from a full CLIPModel's, as in a file of that tower alone."""
    own = {key: value for key, value in config["vision_config"].items() if key != "architectures"}
    return own | {key: config[key] for key in ("projection_dim",) if key in config}


def load_tower(
    folder: Path,
    tower: str,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    sharding: Callable[[Mapping], Any] | None = None,
) -> Tower:
    """Loads a tower from its folder.

    Args:
      folder: holds ``config.json`` and safetensors.
      tower: one of :data:`persona_jax.models.towers.TOWERS`.
      dtype: computation dtype; None computes in the wider of the parameters' and the inputs'.
      param_dtype: dtype of the parameters; None keeps the stored one.
      sharding: a function from the tree of shapes to a tree of shardings; None: the default device.

    Raises:
      UserError: settings are not supported, or tensors do not fit; all are named.
    """
    config = read_json(folder / "config.json")
    if tower == "image_encoder" and isinstance(config.get("vision_config"), dict):
        config = vision_half(config)
    try:
        module = build(tower, config, dtype)
    except UserError as error:
        where = folder / "config.json"
        raise UserError(f"{where}: {error}", error.details, argument=error.argument) from error
    try:
        abstract = abstract_params(module)
    except (TypeError, ValueError, IndexError, AssertionError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder / 'config.json'}: its sizes are invalid for a {tower} ({reason})"
        ) from error
    params = tensors.load_tree(
        abstract,
        tensors.TensorFiles(tensors.weight_files(folder), str(folder)),
        rename=_RENAME[tower],
        dtype=param_dtype,
        sharding=sharding(abstract) if sharding else None,
    )
    return Tower(module, params, config, content_hash(folder))


_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("diffusers", "AutoencoderKL", "diffusion_pytorch_model"),
    "text_encoder": ("transformers", "CLIPTextModel", "model"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection", "model"),
}


def save_tower(folder: Path, tower: str, config: Mapping, params: Mapping) -> None:
    """Writes a tower's ``config.json`` and safetensors for diffusers or transformers."""
    library, cls, stem = _CLASSES[tower]
    folder.mkdir(parents=True, exist_ok=True)
    key = "_class_name" if library == "diffusers" else "architectures"
    named = {key: cls if library == "diffusers" else [cls], **config}
    if library == "transformers":
        # transformers loads in the dtype that is named here, diffusers in float32 by default. All
        # towers of a pipeline need the same dtype.
        named.pop("torch_dtype", None)
        named["dtype"] = "float32"
    write_json(folder / "config.json", named)
    tensors.save_tree(params, folder / f"{stem}.safetensors")


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file of a pipeline folder, and creates the folder if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.whole_file(file) as part:
        part.write_text(json.dumps(dict(content), indent=2) + "\n")


def model_index(
    scheduler: str = "DDIMScheduler", *, image_encoder: bool = True, feature_extractor: bool = True
) -> dict[str, Any]:
    """``model_index.json``: the diffusers or transformers class of each part of the folder.

    Args:
      scheduler: diffusers' name of the scheduler class.
      image_encoder: whether the folder has one.
      feature_extractor: whether the folder has one.
    """
    absent, processor = [None, None], ["transformers", "CLIPImageProcessor"]
    towers = {tower: [library, cls] for tower, (library, cls, _) in _CLASSES.items()}
    return {
        "_class_name": "StableDiffusionPipeline",
        **towers,
        "image_encoder": towers["image_encoder"] if image_encoder else absent,
        "feature_extractor": processor if feature_extractor else absent,
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler],
        "safety_checker": absent,
        "requires_safety_checker": False,
    }


def clip_preprocessing(size: int) -> dict[str, Any]:
    """``preprocessor_config.json`` of an image encoder: crops to `size` pixels, in [−1, 1]."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }
