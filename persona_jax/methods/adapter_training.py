"""Adapter training: aggregator, initial parameters, loss and training step.

The adapters ``ip``, ``max``, ``avg`` and ``sa`` are one method with different aggregators.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from persona_jax.diffusion.loss import denoising_loss, draw_steps, example_keys
from persona_jax.errors import UserError
from persona_jax.interop import folders
from persona_jax.interop.checkpoints import load_params
from persona_jax.interop.ip_adapter import load_ip_adapter
from persona_jax.models import adapter, aggregators
from persona_jax.models.aggregators import Aggregator
from persona_jax.models.attention import Source, project_keys_values
from persona_jax.models.clip import TextOutput
from persona_jax.models.unet import REMAT, UNet2DConditionModel, text_kernels
from persona_jax.models.vae import draw_latents
from persona_jax.pipelines.pipeline import Pipeline
from persona_jax.runtime import buckets
from persona_jax.runtime.run_folder import read_run
from persona_jax.training.state import StepFn, make_step

LossFn = Callable[[Mapping, Mapping, Mapping, Array | int], tuple[Array, dict[str, Array]]]


def make_aggregator(config: ConfigDict) -> Aggregator:
    """Builds the aggregator from a config's ``aggregator`` section."""
    return aggregators.build(config.kind, config.to_dict())


def init_adapter(config: ConfigDict, pipeline: Pipeline, embedding_dim: int) -> dict:
    """Initialises the trainable tree, at random or from ``config.init_from``.

    ``init_from`` is the workdir of a run, an IP-Adapter file (plain or Plus layout,
    ``.safetensors`` or ``.bin``), or the name of a shipped base, whose own adapter is then loaded.
    A file has no aggregator; it is initialised at random.

    Raises:
      UserError: the weights of ``init_from`` are for another pipeline, are missing or do not fit.
    """
    unet = pipeline.tower("unet")
    kernels = text_kernels(unet.params, unet.module.config)
    fresh = adapter.init(
        jax.random.key(config.seed),
        make_aggregator(config.aggregator),
        embedding_dim,
        unet.module.config.cross_attention_dim,
        kernels,
    )
    if not config.init_from:
        return fresh
    shipped = folders.SHIPPED.get(config.init_from)
    if shipped and config.pipeline != config.init_from:
        raise UserError(
            f"config.init_from={config.init_from}: its adapter is for the shipped pipeline, not "
            f"for {config.pipeline}; set config.init_from= to start afresh"
        )
    path = shipped / "ip_adapter.safetensors" if shipped else buckets.local(config.init_from)
    if path.suffix.lower() in (".safetensors", ".bin"):
        loaded = load_ip_adapter(path, unet.module.config, kernels, embedding_dim)
        if loaded["image_proj"].keys() != fresh["image_proj"].keys():
            plus = "latents" in loaded["image_proj"]
            resamplers = " and ".join(aggregators.UNPOOLED)
            raise UserError(
                f"config.init_from={config.init_from}: in the {'Plus' if plus else 'plain'} layout,"
                f" which config.aggregator.kind={config.aggregator.kind} does not have; "
                + (f"{resamplers} do" if plus else f"all but {resamplers} do")
            )
        return fresh | loaded
    return init_from_run(path, fresh)


def init_from_run(workdir: Path, fresh: Mapping) -> dict:
    """Replaces arrays of `fresh` by the trained ones of an earlier run.

    The projection and W'_k, W'_v must exist and fit. The aggregator is loaded only if its shapes
    are the same; otherwise (from ``ip`` to ``sa``, say) it stays as in `fresh`, and a line is
    printed.

    Raises:
      UserError: arrays do not fit; up to six are named.
    """
    which = "ema" if read_run(workdir).optimizer.ema_decay else "params"
    trained = load_params(workdir / "checkpoints", which)

    def shapes(tree: Mapping) -> dict:
        return {path: np.shape(leaf) for path, leaf in traverse_util.flatten_dict(tree).items()}

    params = dict(fresh)
    for part in ("image_proj", "ip_adapter", "aggregator"):
        have, want = shapes(trained.get(part, {})), shapes(fresh[part])
        if have == want:
            params[part] = jax.tree.map(jnp.asarray, trained[part]) if want else {}
        elif part == "aggregator":
            print(f"init_from {workdir}: its aggregator does not fit; a fresh one is trained")
        else:
            paths = sorted(p for p in have.keys() | want.keys() if have.get(p) != want.get(p))
            mismatches = ", ".join(
                f"{'.'.join(p)}: {have.get(p)} there, {want.get(p)} here" for p in paths[:6]
            )
            raise UserError(f"init_from {workdir}: {part} does not fit ({mismatches})")
    return params


def adapter_frozen_params(pipeline: Pipeline, blank: Array | None = None) -> dict:
    """The frozen tree of adapter training.

    Args:
      pipeline: the base model.
      blank: the image encoder's (:class:`persona_jax.pipelines.image_encoders.ImageEncoder`).

    Returns:
      Parameters of UNet and text encoder, the empty prompt's token ids, and `blank`.
    """
    empty, _ = pipeline.tokenize([""])
    return {
        "unet": pipeline.tower("unet").params,
        "text_encoder": pipeline.tower("text_encoder").params,
        "empty": empty,
        "blank": blank,
    }


def drop_conditions(key: Array, config: ConfigDict) -> tuple[Array, Array]:
    """Draws whether an example loses its conditions, for classifier-free guidance.

    Args:
      key: of the example.
      config: probabilities of dropping ``image`` alone, ``text`` alone, or ``both``.

    Returns:
      Two booleans: the image condition is dropped, the text condition is dropped.
    """
    draw = jax.random.uniform(key)
    image, text, both = config.image, config.text, config.both
    drops_both = draw < both
    drops_image = (draw >= both) & (draw < both + image)
    drops_text = (draw >= both + image) & (draw < both + image + text)
    return drops_both | drops_image, drops_both | drops_text


def trained_unet(config: ConfigDict, pipeline: Pipeline) -> UNet2DConditionModel:
    """The pipeline's UNet with the rematerialisation policy ``config.remat``.

    Raises:
      UserError: the policy is unknown.
    """
    if config.remat not in REMAT:
        raise UserError(f"config.remat={config.remat!r}; known: {', '.join(REMAT)}")
    unet = pipeline.tower("unet").module
    assert isinstance(unet, UNet2DConditionModel)
    return unet.clone(remat=config.remat)


def adapter_loss(config: ConfigDict, pipeline: Pipeline) -> LossFn:
    """The loss E ‖ε − ε_θ(z_t, t, c_text, c_image)‖² over a leave-one-out batch.

    Batches come from :func:`persona_jax.data.loader.batches`, the frozen tree from
    :func:`adapter_frozen_params`.

    Source: docs/design.md, "The method" (equation and conditions).
    """
    unet, text = trained_unet(config, pipeline), pipeline.tower("text_encoder").module
    schedule = pipeline.schedule
    scaling = pipeline.tower("vae").module.config.scaling_factor
    aggregator, seed = make_aggregator(config.aggregator), config.seed
    gamma = config.min_snr_gamma or None

    def loss(params: Mapping, frozen: Mapping, batch: Mapping, step: Array | int):
        keys = example_keys(seed, step, batch["index"])
        drop_key, latent_key, noise_key, t_key = jax.vmap(lambda k: jax.random.split(k, 4))(keys).T
        no_image, no_text = jax.vmap(lambda k: drop_conditions(k, config.drop))(drop_key)

        image = adapter.aggregate(params, aggregator, batch["embeddings"], batch["mask"])
        dropped = no_image.reshape(-1, *[1] * (image.ndim - 1))
        image = jnp.where(dropped, adapter.unconditional(image, frozen["blank"]), image)
        ids = jnp.where(no_text[:, None], frozen["empty"], batch["tokens"])
        # apply returns a tuple where collections are mutable
        hidden = cast(TextOutput, text.apply({"params": frozen["text_encoder"]}, ids)).hidden
        kernels = text_kernels(frozen["unet"], unet.config)
        sources = (
            Source(*project_keys_values(kernels, hidden)),
            adapter.source(params, image, dtype=unet.dtype, weights=batch["mask"]),
        )

        latents = jax.vmap(lambda k, m: draw_latents(k, m, scaling))(latent_key, batch["moments"])
        noise = jax.vmap(lambda k: jax.random.normal(k, latents.shape[1:]))(noise_key)

        def predict(z: Array, t: Array) -> Array:
            return cast(Array, unet.apply({"params": frozen["unet"]}, z, t, sources))

        # Timesteps are uniform: identity, skin and hair first, is decided at high noise levels.
        t = draw_steps(t_key, schedule)
        return denoising_loss(predict, schedule, latents, noise, t, gamma).mean(), {}

    return loss


def adapter_step(
    config: ConfigDict, pipeline: Pipeline, optimizer: optax.GradientTransformation, mesh: Mesh
) -> StepFn:
    """The compiled training step of :func:`adapter_loss`: what train runs and plan compiles."""
    return make_step(
        adapter_loss(config, pipeline),
        optimizer,
        mesh,
        accumulate=config.accumulate,
        ema_decay=config.optimizer.ema_decay or None,
    )
