"""Pipelines: towers, noise schedule and tokenizer of a folder in diffusers' layout.

Stable Diffusion 1.5 and the bases trained by this package are folders of the same layout, read by
the same code. diffusers opens what :func:`save` writes.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from persona_jax.diffusion.schedule import Schedule, for_ddim, sampler_of
from persona_jax.errors import UserError
from persona_jax.interop import folders, tensors
from persona_jax.interop.folders import Tower
from persona_jax.models.clip import TextOutput
from persona_jax.models.towers import TOWERS
from persona_jax.runtime import checksums
from persona_jax.runtime.mesh import shard_params


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The contents of a pipeline folder; towers that were not requested are None."""

    unet: Tower | None
    vae: Tower | None
    text_encoder: Tower | None
    image_encoder: Tower | None
    schedule: Schedule
    scheduler_config: Mapping[str, Any]
    tokenizer: Any
    feature_extractor: Mapping[str, Any] | None
    source: str = ""  # the folder or hub id that was named

    def tower(self, name: str) -> Tower:
        """A tower that this pipeline must have.

        Raises:
          ValueError: it was not requested.
        """
        tower = getattr(self, name)
        if tower is None:
            raise ValueError(f"a pipeline opened without its {name}")
        return tower

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of one image's latents at the UNet's ``sample_size``."""
        config = self.tower("unet").module.config
        return (config.sample_size, config.sample_size, config.in_channels)

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        unet, vae = self.tower("unet").module.config, self.tower("vae").module.config
        return unet.sample_size * vae.downscale

    def tokenize(self, prompts: Sequence[str]) -> tuple[Int[np.ndarray, "B T"], list[str]]:
        """Token ids padded to the text encoder's length, and warnings for truncated prompts."""
        tower = self.text_encoder
        rows = tower.module.config.vocab_size if tower else None
        return tokenize(self.tokenizer, prompts, rows)


def tokenize(
    tokenizer: Any, prompts: Sequence[str], rows: int | None = None
) -> tuple[Int[np.ndarray, "B T"], list[str]]:
    """Tokenizes prompts.

    Args:
      tokenizer: as from :func:`load_tokenizer`.
      prompts: texts.
      rows: number of rows of the text encoder's embedding table; None: not known.

    Returns:
      Token ids ``[B, model_max_length]``, and a warning for each truncated prompt.

    Raises:
      UserError: a token id is outside the embedding table.
    """
    length = tokenizer.model_max_length
    warnings = [
        f"prompt of {count} tokens cut to {length}: {prompt[:60]!r}…"
        for prompt in prompts
        if (count := len(tokenizer(prompt, verbose=False)["input_ids"])) > length
    ]
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    ids = np.asarray(encoded["input_ids"], np.int32)
    if rows is not None and ids.size and not 0 <= ids.max() < rows:
        token = tokenizer.convert_ids_to_tokens(int(ids.max()))
        raise UserError(
            f"tokenizer: token {token!r:.60} has the id {ids.max()}, but the text tower's table "
            f"has {rows} rows, 0 to {rows - 1}; take the tokenizer and text_encoder of one pipeline"
        )
    return ids, warnings


def load(
    path_or_id: str,
    *,
    only: Sequence[str] = TOWERS,
    image_encoder: str | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Pipeline:
    """Loads a pipeline from a folder in diffusers' layout or a hub id.

    Args:
      path_or_id: local folder, or ``owner/name`` on the hub.
      only: which towers to load; the others are None.
      image_encoder: folder or hub id of the image encoder, if the pipeline has none (as Stable
        Diffusion 1.5's repository).
      dtype, param_dtype: see :func:`persona_jax.interop.folders.load_tower`.
      mesh: over which the UNet and the text encoder are sharded as they are loaded, as in training
        (:func:`persona_jax.runtime.mesh.shard_params`); None: all on the default device.

    Raises:
      UserError: files are missing or do not fit; they are named.
    """
    folder = folders.find(path_or_id)
    folders.refuse_other_families(folder)
    parts = [*only, "scheduler", "tokenizer", "feature_extractor"]
    checksums.verify(folder, parts, "fetch or make it again")

    def folder_of(tower: str) -> Path:
        if tower != "image_encoder" or (not image_encoder and (folder / tower).is_dir()):
            return folder / tower
        if not image_encoder:
            raise UserError(
                f"{folder}: it has no image_encoder/; name an image_encoder "
                "(config.image_encoder.path=FOLDER_OR_HUB_ID)",
                argument="image_encoder",
            )
        other = folders.find(image_encoder)
        return other / "image_encoder" if (other / "image_encoder").exists() else other

    sharding = None if mesh is None else functools.partial(shard_params, mesh)
    loaded = {
        tower: folders.load_tower(
            folder_of(tower),
            tower,
            dtype=dtype,
            param_dtype=param_dtype,
            # Each process runs the other towers on its own devices.
            sharding=sharding if tower in ("unet", "text_encoder") else None,
        )
        if tower in only
        else None
        for tower in TOWERS
    }
    refuse_parts_that_do_not_fit(folder, loaded)
    scheduler = folders.read_json(folder / "scheduler" / "scheduler_config.json")
    schedule = Schedule.from_json(for_ddim(scheduler))
    text = loaded["text_encoder"]
    positions = text.module.config.max_position_embeddings if text else None
    return Pipeline(
        **loaded,
        schedule=schedule,
        scheduler_config=scheduler,
        tokenizer=load_tokenizer(folder / "tokenizer", positions),
        feature_extractor=_feature_extractor(
            folder, folder_of("image_encoder") if loaded["image_encoder"] else None
        ),
        source=path_or_id,
    )


def require_trained_on(
    run: Path, base: str, now: str, trained: str | None, what: str = "base"
) -> None:
    """Raises an error if a run was trained on another base, or with another image encoder.

    Args:
      run: its workdir.
      base: folder or hub id.
      now, trained: hash of what is at `base`, and of what the run was trained on.
      what: "base" or "image encoder".

    Raises:
      UserError: the hashes differ; both are named.
    """
    if trained != now:
        raise UserError(
            f"{run}: the {what} at {base} now has hash {now:.80}, this run was trained on "
            f"{trained or 'an unknown one':.80}; restore the original, or open the one of this run"
        )


def refuse_parts_that_do_not_fit(folder: Path, loaded: Mapping[str, Tower | None]) -> None:
    """Raises an error if a folder has towers of different pipelines.

    Raises:
      UserError: two settings do not match; both are named.
    """
    for one, key, other, other_key in (
        ("unet", "in_channels", "vae", "latent_channels"),
        ("unet", "cross_attention_dim", "text_encoder", "hidden_size"),
    ):
        first, second = loaded[one], loaded[other]
        if first is None or second is None:
            continue
        have, want = getattr(first.module.config, key), getattr(second.module.config, other_key)
        if have != want:
            raise UserError(
                f"{folder}: {one}/config.json has {key}={have}, but {other}/config.json "
                f"{other_key}={want}; take both from one pipeline"
            )


def _feature_extractor(folder: Path, encoder: Path | None) -> dict[str, Any] | None:
    """The preprocessor_config.json of the pipeline, or beside the image encoder; None: neither."""
    beside = [encoder, encoder.parent / "feature_extractor"] if encoder else []
    for parent in (folder / "feature_extractor", *beside):
        file = parent / "preprocessor_config.json"
        if file.exists():
            return folders.read_json(file)
    return None


CLIP_LENGTH = 77
"""Maximal tokens of a prompt if neither tokenizer nor text encoder specifies it."""


def load_tokenizer(folder: Path, positions: int | None = None) -> Any:
    """Loads transformers' CLIPTokenizer.

    Args:
      folder: with ``vocab.json`` and ``merges.txt``, or ``tokenizer.json``.
      positions: number of position embeddings of the text encoder, the maximal length of a prompt
        and the default of ``model_max_length``; None: not known.

    Raises:
      UserError: files are missing or cannot be read.
    """
    from transformers import CLIPTokenizer

    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no {' and no '.join(missing)}; a tokenizer needs them")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder))
        length = int(tokenizer.model_max_length)
    except Exception as error:  # transformers and tokenizers also raise plain Exception
        message = " ".join(str(error).split())
        raise UserError(
            f"{folder}: not a readable CLIP tokenizer ({message:.200}); fetch it again"
        ) from error
    if length > 10**6:  # transformers' 1e30 means: not specified
        length = positions or CLIP_LENGTH
    length = min(length, positions or length)
    if length < 2:
        raise UserError(f"{folder}: model_max_length={length}; a prompt takes 2 tokens or more")
    tokenizer.model_max_length = length
    return tokenizer


def embed_captions(folder: Path, captions: Sequence[str]) -> Float[np.ndarray, "P D"]:
    """Embeds captions in the space of the pipeline's image embeddings ``[P, D]``.

    Raises:
      UserError: the pipeline has no ``text_projection.safetensors``; pipelines trained by this
        package have it.
    """
    text = folders.load_tower(folder / "text_encoder", "text_encoder")
    config = text.module.config
    tokenizer = load_tokenizer(folder / "tokenizer", config.max_position_embeddings)
    ids, _ = tokenize(tokenizer, captions, config.vocab_size)
    files = tensors.TensorFiles([folder / "text_projection.safetensors"], str(folder))
    shape = (config.hidden_size, config.projection_dim)
    abstract = {
        "text_projection": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)},
        "logit_scale": jax.ShapeDtypeStruct((), jnp.float32),
    }
    kernel = tensors.load_tree(abstract, files, dtype=jnp.float32)["text_projection"]["kernel"]

    @jax.jit
    def embed(params: Mapping, ids: Int[Array, "B T"]) -> Float[Array, "B D"]:
        # apply returns a tuple where collections are mutable
        return cast(TextOutput, text.module.apply({"params": params}, ids)).pooled @ kernel

    parts = [embed(text.params, ids[i : i + 64]) for i in range(0, len(ids), 64)]
    return np.concatenate([np.asarray(part) for part in parts])


def save(pipeline: Pipeline, folder: Path) -> None:
    """Writes a pipeline folder that diffusers opens (``StableDiffusionPipeline``)."""
    for name in TOWERS:
        tower = getattr(pipeline, name)
        if tower:
            folders.save_tower(folder / name, name, tower.config, tower.params)
    pipeline.tokenizer.save_pretrained(str(folder / "tokenizer"))
    # Also vocab.json and merges.txt: transformers before 5 reads no other files.
    pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    folders.write_json(folder / "scheduler/scheduler_config.json", pipeline.scheduler_config)
    if pipeline.feature_extractor:
        file = folder / "feature_extractor/preprocessor_config.json"
        folders.write_json(file, pipeline.feature_extractor)
    index = folders.model_index(
        pipeline.scheduler_config.get("_class_name", "DDIMScheduler"),
        image_encoder=pipeline.image_encoder is not None,
        feature_extractor=pipeline.feature_extractor is not None,
    )
    folders.write_json(folder / "model_index.json", index)


def dtype_on(dtype: str, platform: str) -> DTypeLike:
    """The dtype of computations; "auto" is float32 on CPU, bfloat16 elsewhere.

    Args:
      dtype: as in ``config.dtype``.
      platform: of the devices, as JAX names it.

    Raises:
      UserError: the dtype is unknown.
    """
    dtypes = {"auto": jnp.float32 if platform == "cpu" else jnp.bfloat16}
    dtypes |= {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    if dtype not in dtypes:
        raise UserError(f"config.dtype={dtype!r}; known: {', '.join(dtypes)}")
    return dtypes[dtype]


def open_pipeline(config: ConfigDict, mesh: Mesh | None = None) -> Pipeline:
    """Opens the pipeline of a method's config, with weights cast to :func:`dtype_on`.

    The image encoder is loaded only if the method uses it (``image_encoder.kind=clip``). With a
    `mesh` whose "fsdp" axis is above 1, no device holds the UNet or the text encoder whole.
    """
    dtype = dtype_on(config.dtype, jax.default_backend())
    own_encoder = "image_encoder" in config and config.image_encoder.kind == "clip"
    pipeline = load(
        config.pipeline,
        only=TOWERS if own_encoder else [tower for tower in TOWERS if tower != "image_encoder"],
        image_encoder=config.image_encoder.path if own_encoder else None,
        dtype=dtype,
        param_dtype=dtype,
        mesh=mesh if mesh is not None and mesh.shape["fsdp"] > 1 else None,
    )
    if note := sampler_note(pipeline):
        print(note, file=sys.stderr)
    return pipeline


def sampler_note(pipeline: Pipeline) -> str:
    """A note for a folder whose scheduler is not DDIM; empty if it is."""
    name = sampler_of(pipeline.scheduler_config)
    if name == "DDIMScheduler":
        return ""
    clipped = (
        "; it clips, as diffusers' DDIM does where scheduler_config.json has no clip_sample: add "
        '"clip_sample": false there if pictures are dull'
    )
    return f"note: DDIM samples in place of {name}{clipped * pipeline.schedule.clip_sample}"
