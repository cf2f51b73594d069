"""A training step or a sampler without weights: arrays are shapes, dtypes and shardings."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from persona_jax.diffusion.schedule import Schedule, for_ddim
from persona_jax.errors import UserError
from persona_jax.interop import folders
from persona_jax.interop.folders import Tower
from persona_jax.methods import adapter_training, finetuning
from persona_jax.models import aggregators, face_resnet, facenet
from persona_jax.models.adapter import Adapter
from persona_jax.models.towers import abstract_params, build
from persona_jax.pipelines import generation
from persona_jax.pipelines.image_encoders import KINDS
from persona_jax.pipelines.pipeline import Pipeline
from persona_jax.planning import published
from persona_jax.runtime import buckets
from persona_jax.runtime.compilation import compiler_options
from persona_jax.runtime.mesh import batch_sharding, replicated, shard_params
from persona_jax.training.state import fresh_state, make_optimizer

Program = tuple[Any, tuple]
"""A jitted function and the abstract arguments to lower it with."""


def training_step(config: ConfigDict, mesh: Mesh, dtype: DTypeLike) -> Program:
    """The training step of :mod:`persona_jax.train`, and its arguments (state, frozen, batch).

    Args:
      config: of a run; ``batch_size`` is global.
      mesh: of the devices to plan for, which need not be present.
      dtype: of the frozen weights and of the computation.

    Raises:
      UserError: the pipeline's sizes are not known, or the batch does not divide among the devices.
    """
    if config.batch_size % (config.accumulate * mesh.size):
        raise UserError(
            f"config.batch_size={config.batch_size} (all chips together): must be a multiple of "
            f"accumulate x chips = {config.accumulate} x {mesh.size}; or change batch_per_chip",
            argument="batch_per_chip",
        )
    if config.method in finetuning.METHODS:
        return people_step(config, mesh, dtype)
    pipeline, encoder = open_abstract(config, dtype), abstract_image_encoder(config)
    trainable = adapter_shapes(config, pipeline, encoder)
    optimizer = make_optimizer(config.optimizer)
    ema = bool(config.optimizer.ema_decay)
    state = jax.eval_shape(lambda params: fresh_state(params, optimizer, ema=ema), trainable)
    frozen = adapter_training.adapter_frozen_params(pipeline) | {"blank": encoder.blank}
    frozen = shapes(frozen)
    step = adapter_training.adapter_step(config, pipeline, optimizer, mesh)
    return step, (
        at(state, shard_params(mesh, state)),
        at(frozen, shard_params(mesh, frozen)),
        at(batch_shapes(config, pipeline, encoder), batch_sharding(mesh)),
    )


def people_step(config: ConfigDict, mesh: Mesh, dtype: DTypeLike) -> Program:
    """The step of :mod:`persona_jax.methods.finetuning_loop` for ``config.people.at_once`` people,
    and its arguments, as for :func:`training_step`."""
    pipeline, at_once = open_abstract(config, dtype), config.people.at_once
    fresh = without_start(config)

    def make(towers: Any, key: Any) -> Any:
        unet, text_encoder = (
            dataclasses.replace(pipeline.tower(name), params=towers[name])
            for name in ("unet", "text_encoder")
        )
        traced = dataclasses.replace(pipeline, unet=unet, text_encoder=text_encoder)
        return finetuning.init(fresh, traced, jax.random.split(key, at_once))

    towers = {name: pipeline.tower(name).params for name in finetuning.TOWERS}
    trainable = jax.eval_shape(make, towers, jax.eval_shape(lambda: jax.random.key(0)))
    optimizer = finetuning.make_people_optimizer(config)
    state = jax.eval_shape(lambda params: fresh_state(params, optimizer), trainable)
    frozen = shapes(finetuning.person_frozen_params(config, pipeline))
    count, (h, w, channels) = config.batch_size, pipeline.latent_shape
    length, of = pipeline.tokenizer.model_max_length, jax.ShapeDtypeStruct
    batch = {
        "moments": of((count, at_once, h, w, 2 * channels), jnp.float32),
        "tokens": of((count, at_once, length), jnp.int32),
        "class_latents": of((count, h, w, channels), jnp.float32),
        "class_tokens": of((count, length), jnp.int32),
        "index": of((count,), jnp.int32),
    }
    return finetuning.people_step(config, pipeline, optimizer, mesh), (
        at(state, shard_params(mesh, state)),
        at(frozen, shard_params(mesh, frozen)),
        at(batch, batch_sharding(mesh)),
    )


def sampler(config: ConfigDict, mesh: Mesh, dtype: DTypeLike) -> Program:
    """The sampler of :mod:`persona_jax.pipelines.generation`, and its arguments.

    It generates ``config.batch_size`` images with ``n - 1`` references each, split among the
    devices.

    Args:
      config: as in :func:`training_step`.
      mesh: as in :func:`training_step`.
      dtype: as in :func:`training_step`.

    Raises:
      UserError: as in :func:`training_step`; the config is not of an adapter.
    """
    if config.method != "adapter":
        raise UserError(
            f"sampler: config.method={config.method} has no adapter; give configs/sa.py",
            argument="sampler",
        )
    pipeline, encoder = open_abstract(config, dtype), abstract_image_encoder(config)
    if config.batch_size % mesh.size:
        raise UserError(
            f"config.batch_size={config.batch_size} images: must be a multiple of the "
            f"{mesh.size} chips; or give another batch_per_chip",
            argument="batch_per_chip",
        )
    sampler = generation.make_pixel_sampler(pipeline, steps=config.sampling.steps)
    sampler = generation.split_among_devices(sampler, mesh)
    aggregator = adapter_training.make_aggregator(config.aggregator)

    def generate_batch(
        frozen: Any, learnt: Any, blank: Any, batch: Any, settings: Any
    ) -> jax.Array:
        references = generation.References(batch["embeddings"], batch["mask"], settings["scale"])
        request = generation.Request(
            keys=jax.vmap(jax.random.key)(batch["index"]),
            ids=batch["tokens"],
            negative_ids=batch["tokens"],
            references=(references,),
            guidance=settings["guidance"],
            eta=settings["eta"],
        )
        return sampler(frozen, (Adapter(aggregator, learnt, blank),), request)

    frozen, learnt = generation.sampler_params(pipeline), adapter_shapes(config, pipeline, encoder)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.jit(generate_batch, compiler_options=compiler_options(mesh)), (
        at(frozen, shard_params(mesh, frozen)),
        at(learnt, shard_params(mesh, learnt)),
        at(encoder.blank, replicated(mesh)),
        at(batch_shapes(config, pipeline, encoder), batch_sharding(mesh)),
        at(dict.fromkeys(("scale", "guidance", "eta"), number), replicated(mesh)),
    )


def open_abstract(config: ConfigDict, dtype: DTypeLike) -> Pipeline:
    """The pipeline of a config as by ``open_pipeline``, with shapes in place of weights.

    Raises:
      UserError: its sizes are neither in a local folder nor in :mod:`.published`.
    """
    towers = {
        name: abstract_tower(name, tower_config(config.pipeline, name), dtype)
        for name in ("unet", "vae", "text_encoder")
    }
    scheduler = tower_config(config.pipeline, "scheduler")
    length = towers["text_encoder"].module.config.max_position_embeddings
    return Pipeline(
        **towers,
        image_encoder=None,
        schedule=Schedule.from_json(for_ddim(scheduler)),
        scheduler_config=scheduler,
        tokenizer=_Tokenizer(length),
        feature_extractor=None,
        source=config.pipeline,
    )


class _Tokenizer(SimpleNamespace):
    """Turns any prompts into zeros of the right length."""

    def __init__(self, length: int):
        super().__init__(model_max_length=length)

    def __call__(self, prompts: Any, **_: Any) -> dict:
        count = 1 if isinstance(prompts, str) else len(prompts)
        return {"input_ids": np.zeros((count, self.model_max_length), np.int32)}


def abstract_tower(name: str, config: Mapping[str, Any], dtype: DTypeLike) -> Tower:
    """A tower whose parameters are shapes."""
    module = build(name, config, dtype)
    cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(module))
    return Tower(module, cast, config)


class EncoderSizes(NamedTuple):
    """What a plan needs to know of an image encoder.

    Attributes:
      dim: D of its embeddings, or patches.
      blank: shape of the patches ``[L, D]`` of one photo; None for an encoder of whole photos.
    """

    dim: int
    blank: jax.ShapeDtypeStruct | None = None


def abstract_image_encoder(config: ConfigDict) -> EncoderSizes:
    """The sizes of a config's image encoder.

    Raises:
      UserError: the kind is unknown, or the tower's sizes are not known.
    """
    kind = config.image_encoder.kind
    if kind not in KINDS:
        raise UserError(f"image_encoder.kind={kind!r}; known: {', '.join(KINDS)}")
    if kind != "clip":
        return EncoderSizes({"dlib": face_resnet.DIM, "facenet": facenet.DIM}[kind])
    sizes = build("image_encoder", image_encoder_config(config)).config
    if not aggregators.known_kind(config.aggregator.kind).patches:
        return EncoderSizes(sizes.projection_dim)
    patches = 1 + (sizes.image_size // sizes.patch_size) ** 2
    blank = jax.ShapeDtypeStruct((patches, sizes.hidden_size), jnp.float32)
    return EncoderSizes(sizes.hidden_size, blank)


def image_encoder_config(config: ConfigDict) -> Mapping[str, Any]:
    """``config.json`` of the image encoder: of ``image_encoder.path``, or else the pipeline's."""
    path = config.image_encoder.path
    if not path:
        return tower_config(config.pipeline, "image_encoder")
    folder = local_folder(path)
    if folder is None and path in published.IMAGE_ENCODERS:
        return published.IMAGE_ENCODERS[path]
    if folder is None:
        raise _not_known(path, published.IMAGE_ENCODERS)
    inner = folder / "image_encoder"
    return folders.read_json((inner if inner.is_dir() else folder) / "config.json")


def tower_config(pipeline: str, part: str) -> Mapping[str, Any]:
    """The JSON config of one part of a pipeline.

    Args:
      pipeline: a local folder, a shipped base, or a hub id in :mod:`.published`.
      part: a tower's folder, or "scheduler".

    Raises:
      UserError: the pipeline is none of these, or the file is missing.
    """
    folder = local_folder(pipeline)
    if folder is not None:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return folders.read_json(folder / part / name)
    if pipeline not in published.PIPELINES:
        raise _not_known(pipeline, published.PIPELINES)
    if part not in published.PIPELINES[pipeline]:
        raise UserError(f"{pipeline}: it has no {part}/; name one with config.{part}.path=FOLDER")
    return published.PIPELINES[pipeline][part]


def _not_known(path: str, known: Mapping) -> UserError:
    return UserError(
        f"{path}: no such folder, and no sizes known for that name; give a local folder (its "
        f"config.json files suffice) or one of {', '.join(known)}"
    )


def local_folder(path: str) -> Path | None:
    """The folder of a shipped base, or a local folder; None if `path` is neither."""
    if path in folders.SHIPPED or buckets.local(path).is_dir():
        return folders.find(path)
    return None


def adapter_shapes(config: ConfigDict, pipeline: Pipeline, encoder: EncoderSizes) -> Any:
    """The trainable tree as shapes, which do not depend on ``init_from``."""
    fresh = without_start(config)

    def make(params: Any) -> Any:
        unet = dataclasses.replace(pipeline.tower("unet"), params=params)
        return adapter_training.init_adapter(
            fresh, dataclasses.replace(pipeline, unet=unet), encoder.dim
        )

    return jax.eval_shape(make, pipeline.tower("unet").params)


def without_start(config: ConfigDict) -> ConfigDict:
    """A copy of the config with ``init_from`` cleared, so that no file is read."""
    fresh = config.copy_and_resolve_references()
    with fresh.unlocked():
        fresh.init_from = ""
    return fresh


def batch_shapes(config: ConfigDict, pipeline: Pipeline, encoder: EncoderSizes) -> dict:
    """Shapes of a batch from :func:`persona_jax.data.loader.batches`."""
    count, slots = config.batch_size, config.references.n - 1
    h, w, channels = pipeline.latent_shape
    patches = () if encoder.blank is None else encoder.blank.shape[:1]
    of = jax.ShapeDtypeStruct
    return {
        "moments": of((count, h, w, 2 * channels), jnp.float32),
        "tokens": of((count, pipeline.tokenizer.model_max_length), jnp.int32),
        "embeddings": of((count, slots, *patches, encoder.dim), jnp.float32),
        "mask": of((count, slots), jnp.float32),
        "index": of((count,), jnp.int32),
    }


def shapes(tree: Any) -> Any:
    """Shapes and dtypes of a tree of arrays or shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def at(tree: Any, shardings: Any) -> Any:
    """Adds shardings to a tree of shapes; `shardings` is a tree, or one for all leaves."""

    def put(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
    return jax.tree.map(put, tree, shardings)
