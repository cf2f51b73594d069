"""The assembled system: towers, schedule and tokenizer of a diffusers-layout folder.

Stable Diffusion 1.5 and a base of our own are the same kind of folder and go through the same
code; stock diffusers opens what :func:`save` writes.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from persona_jax.diffusion.schedule import Schedule, for_ddim, sampler_of
from persona_jax.errors import UserError
from persona_jax.interop import folders, tensors
from persona_jax.interop.folders import Tower
from persona_jax.models.towers import TOWERS
from persona_jax.runtime import checksums
from persona_jax.runtime.mesh import shard_params


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Everything that a pipeline folder holds; towers that were not asked for are None."""

    unet: Tower | None
    vae: Tower | None
    text_encoder: Tower | None
    image_encoder: Tower | None
    schedule: Schedule
    scheduler_config: Mapping[str, Any]
    tokenizer: Any
    feature_extractor: Mapping[str, Any] | None
    source: str = ""  # the folder or hub id that was named

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of one picture's latents at the size the UNet was made for."""
        config = self.unet.module.config
        return (config.sample_size, config.sample_size, config.in_channels)

    @property
    def image_size(self) -> int:
        """Side of a picture in pixels."""
        return self.unet.module.config.sample_size * self.vae.module.config.downscale

    def tokenize(self, prompts: Sequence[str]) -> tuple[Int[np.ndarray, "B T"], list[str]]:
        """Token ids padded to the text tower's length, and warnings for prompts cut short."""
        tower = self.text_encoder
        return tokenize(self.tokenizer, prompts, tower and tower.module.config.vocab_size)


def tokenize(
    tokenizer: Any, prompts: Sequence[str], rows: int | None = None
) -> tuple[Int[np.ndarray, "B T"], list[str]]:
    """Token ids ``[B, model_max_length]``; and a warning for each prompt that had to be cut.

    Args:
      tokenizer: as from :func:`load_tokenizer`.
      prompts: texts.
      rows: of the text tower's embedding table; None: not known.

    Raises:
      UserError: a token whose id the table does not have.
    """
    length = tokenizer.model_max_length
    warnings = [
        f"prompt of {count} tokens cut to {length}: {prompt[:60]!r}…"
        for prompt in prompts
        if (count := len(tokenizer(prompt, verbose=False)["input_ids"])) > length
    ]
    told = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    ids = np.asarray(told["input_ids"], np.int32)
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
    """A pipeline from a diffusers-layout folder or a hub id.

    Args:
      path_or_id: local folder, or ``owner/name`` on the hub.
      only: which towers to load; the others are None.
      image_encoder: folder or hub id of the image encoder, where the pipeline has none of its
        own (Stable Diffusion 1.5's repository does not).
      dtype, param_dtype: see :func:`persona_jax.interop.folders.load_tower`.
      mesh: over which the UNet and the text tower lie from the start, as training has them
        (:func:`persona_jax.runtime.mesh.shard_params`); None: all on the default device.

    Raises:
      UserError: what is missing or does not fit, by name.
    """
    folder = folders.find(path_or_id)
    folders.refuse_other_families(folder)
    parts = [*only, "scheduler", "tokenizer", "feature_extractor"]
    checksums.verify(folder, parts, "fetch or make it again")

    def place(tower: str) -> Path:
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
            place(tower),
            tower,
            dtype=dtype,
            param_dtype=param_dtype,
            # The others are run by each process for itself.
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
            folder, place("image_encoder") if loaded["image_encoder"] else None
        ),
        source=path_or_id,
    )


def require_trained_on(
    run: Path, base: str, now: str, trained: str | None, what: str = "base"
) -> None:
    """Refuses what a run has learnt on another base, or with another image encoder, than this one.

    Args:
      run: its workdir.
      base: where this base lies: a folder or hub id.
      now, trained: the hash of what lies there, and of what the run was trained on.
      what: "base" or "image encoder".

    Raises:
      UserError: names both hashes.
    """
    if trained != now:
        raise UserError(
            f"{run}: the {what} at {base} now has hash {now:.80}, this run was trained on "
            f"{trained or 'an unknown one':.80}; restore the original"
        )


def refuse_parts_that_do_not_fit(folder: Path, loaded: Mapping[str, Tower | None]) -> None:
    """Refuses towers of different pipelines in one folder.

    Raises:
      UserError: names both settings.
    """
    for one, key, other, theirs in (
        ("unet", "in_channels", "vae", "latent_channels"),
        ("unet", "cross_attention_dim", "text_encoder", "hidden_size"),
    ):
        if loaded[one] is None or loaded[other] is None:
            continue
        have, want = (getattr(loaded[x].module.config, k) for x, k in ((one, key), (other, theirs)))
        if have != want:
            raise UserError(
                f"{folder}: {one}/config.json has {key}={have}, but {other}/config.json "
                f"{theirs}={want}; take both from one pipeline"
            )


def _feature_extractor(folder: Path, encoder: Path | None) -> dict[str, Any] | None:
    """A pipeline's own, or what lies beside the image encoder; None: nowhere."""
    beside = [encoder, encoder.parent / "feature_extractor"] if encoder else []
    for place in (folder / "feature_extractor", *beside):
        file = place / "preprocessor_config.json"
        if file.exists():
            return folders.read_json(file)
    return None


CLIP_LENGTH = 77
"""Tokens of a prompt where neither tokenizer nor text tower says."""


def load_tokenizer(folder: Path, positions: int | None = None) -> Any:
    """transformers' CLIPTokenizer from a folder with ``vocab.json`` and ``merges.txt``, or
    ``tokenizer.json``.

    Args:
      folder: of the tokenizer.
      positions: of the text tower, which a prompt's tokens must not exceed; None: not known. A
        tokenizer without ``model_max_length`` gets it from there.

    Raises:
      UserError: files that are missing or cannot be read.
    """
    from transformers import CLIPTokenizer

    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no {' and no '.join(missing)}; a tokenizer needs them")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder))
        length = int(tokenizer.model_max_length)
    except Exception as error:  # transformers' and tokenizers' own kinds, bare ones among them
        told = " ".join(str(error).split())
        raise UserError(
            f"{folder}: not a readable CLIP tokenizer ({told:.200}); fetch it again"
        ) from error
    if length > 10**6:  # transformers' 1e30: nobody said
        length = positions or CLIP_LENGTH
    length = min(length, positions or length)
    if length < 2:
        raise UserError(f"{folder}: model_max_length={length}; a prompt takes 2 tokens or more")
    tokenizer.model_max_length = length
    return tokenizer


def embed_captions(folder: Path, captions: Sequence[str]) -> Float[np.ndarray, "P D"]:
    """Captions in the space of the pipeline's image embeddings ``[P, D]``.

    Raises:
      UserError: a pipeline without ``text_projection.safetensors``; those trained here have it.
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
    embed = jax.jit(lambda p, x: text.module.apply({"params": p}, x).pooled @ kernel)
    parts = [embed(text.params, ids[i : i + 64]) for i in range(0, len(ids), 64)]
    return np.concatenate([np.asarray(part) for part in parts])


def save(pipeline: Pipeline, folder: Path) -> None:
    """Writes a pipeline folder that stock diffusers opens (``StableDiffusionPipeline``)."""
    for name in TOWERS:
        tower = getattr(pipeline, name)
        if tower:
            folders.save_tower(folder / name, name, tower.config, tower.params)
    pipeline.tokenizer.save_pretrained(str(folder / "tokenizer"))
    # vocab.json and merges.txt too: all that readers before transformers 5 know.
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
    """What a config's ``dtype`` stands for: "auto" is bfloat16 on accelerators, float32 where
    `platform` is "cpu".

    Raises:
      UserError: an unknown dtype.
    """
    dtypes = {"auto": jnp.float32 if platform == "cpu" else jnp.bfloat16}
    dtypes |= {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    if dtype not in dtypes:
        raise UserError(f"config.dtype={dtype!r}; known: {', '.join(dtypes)}")
    return dtypes[dtype]


def open_pipeline(config: ConfigDict, mesh: Mesh | None = None) -> Pipeline:
    """The pipeline that a method's config names, its frozen weights cast once (see
    :func:`dtype_on`); the image encoder only where the method reads with it. On a `mesh` that
    splits weights (fsdp > 1), no device ever holds the UNet or the text tower whole."""
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
    """What is said of a folder whose sampler is not DDIM; empty where it is."""
    name = sampler_of(pipeline.scheduler_config)
    if name == "DDIMScheduler":
        return ""
    clipped = (
        "; it clips, as diffusers' DDIM does where scheduler_config.json has no clip_sample: add "
        '"clip_sample": false there if pictures are dull'
    )
    return f"note: DDIM samples in place of {name}{clipped * pipeline.schedule.clip_sample}"
