"""From noise to pixels: prompts, references and knobs in, pictures out, one compiled program."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key

from persona_jax.diffusion.sampler import ddim, guide, picture_noise
from persona_jax.diffusion.schedule import Schedule
from persona_jax.models import adapter
from persona_jax.models.aggregators import Aggregator
from persona_jax.models.attention import Source, project_keys_values
from persona_jax.models.unet import text_kernels
from persona_jax.models.vae import AutoencoderKL
from persona_jax.pipeline import Pipeline


@struct.dataclass
class References:
    """Photos of the person of each picture, and how much they count.

    Attributes:
      embeddings: Γ_image of the photos ``[B, N, D]``.
      weights: ``[B, N]``; 0 removes a photo, 2 counts it twice.
      scale: λ of the adapter's attention; one number, ``[B, 1]`` for one per picture, or a region
        mask per layer, ``{layer: [B, h·w]}``.
    """

    embeddings: Float[Array, "B N D"]
    weights: Float[Array, "B N"]
    scale: Float[Array, "..."] | float | Mapping[str, Array | float] = 1.0


@struct.dataclass
class Request:
    """What to paint; every field may change from call to call without recompilation.

    Attributes:
      keys: one key per picture ``[B]``: a picture depends on its own key alone.
      ids: token ids of the prompts ``[B, T]``.
      negative_ids: what to move away from, ``[B, T]``; the empty prompt by default practice.
      references: the person, or None for text alone.
      guidance: g of classifier-free guidance.
      eta: η of DDIM.
      noise: z_T ``[B, h, w, C]`` in place of the keys' own; None draws it.
    """

    keys: Key[Array, " B"]
    ids: Int[Array, "B T"]
    negative_ids: Int[Array, "B T"]
    references: References | None = None
    guidance: Float[Array, ""] | float = 7.5
    eta: Float[Array, ""] | float = 0.0
    noise: Float[Array, "B h w C"] | None = None


def text_source(
    text_encoder: Any, params: Mapping, unet_kernels: Mapping, ids: Int[Array, "B T"]
) -> Source:
    """The text's keys and values, projected once for the whole walk."""
    hidden = text_encoder.apply({"params": params}, ids).hidden
    return Source(*project_keys_values(unet_kernels, hidden))


def for_both_halves(scale: Float[Array, "..."] | float) -> Float[Array, "..."] | float:
    """A λ of ``[B, …]`` for the unconditional half too; one for all pictures stays as it is."""
    per_picture = jnp.ndim(scale) == 2 and len(scale) > 1
    return jnp.concatenate([scale, scale]) if per_picture else scale


def make_latent_painter(
    pipeline: Pipeline, aggregator: Aggregator | None, *, steps: int
) -> Callable[[Mapping, Mapping | None, Request], Array]:
    """(frozen params, adapter params, request) → scaled latents ``[B, h, w, C]``; not jitted.

    The unconditional half sees the negative prompt and the zero embedding, as stock IP-Adapter's.
    """
    unet, text_encoder = pipeline.unet.module, pipeline.text_encoder.module
    schedule: Schedule = pipeline.schedule
    shape = pipeline.latent_shape

    def paint(frozen: Mapping, adapter_params: Mapping | None, request: Request) -> Array:
        kernels = text_kernels(frozen["unet"], unet.config)
        ids = jnp.concatenate([request.negative_ids, request.ids])
        sources = [text_source(text_encoder, frozen["text_encoder"], kernels, ids)]
        if request.references is not None:
            references = request.references
            image = adapter.aggregate(
                adapter_params, aggregator, references.embeddings, references.weights
            )
            image = jnp.concatenate([jnp.zeros_like(image), image])
            scale = jax.tree.map(for_both_halves, references.scale)
            sources.append(adapter.source(adapter_params, image, scale, unet.dtype))

        def denoise_both(latents: Array, t: Array) -> Array:
            t = jnp.broadcast_to(t, (len(latents),))
            return unet.apply({"params": frozen["unet"]}, latents, t, sources)

        noise = request.noise
        if noise is None:
            noise = picture_noise(request.keys, 0, shape)
        denoise = guide(denoise_both, request.guidance)
        return ddim(denoise, schedule, noise, steps=steps, eta=request.eta, keys=request.keys)

    return paint


def make_painter(
    pipeline: Pipeline, aggregator: Aggregator | None = None, *, steps: int
) -> Callable[[Mapping, Mapping | None, Request], Array]:
    """(frozen params, adapter params, request) → pictures ``[B, H, W, 3]`` in [−1, 1]; jitted.

    `frozen` has ``unet``, ``text_encoder`` and ``vae``. New prompts, seeds, photos, scale, guidance
    or η do not recompile; another number of pictures, of reference slots or of `steps` does.
    """
    paint_latents = make_latent_painter(pipeline, aggregator, steps=steps)
    vae = pipeline.vae.module

    @jax.jit
    def paint(frozen: Mapping, adapter_params: Mapping | None, request: Request) -> Array:
        latents = paint_latents(frozen, adapter_params, request)
        pixels = vae.apply({"params": frozen["vae"]}, latents, method=AutoencoderKL.decode)
        return jnp.clip(pixels, -1.0, 1.0)

    return paint


def in_batches(
    painter: Callable[[Mapping, Mapping | None, Request], Array],
    frozen: Mapping,
    adapter_params: Mapping | None,
    request: Request,
    size: int = 32,
) -> Float[np.ndarray, "P H W C"]:
    """A request for any number of pictures, or of latents, `size` at a time: one compilation."""
    count, parts = len(request.keys), []
    for start in range(0, count, size):
        part = some_of(request, np.minimum(np.arange(start, start + size), count - 1))
        parts.append(np.asarray(painter(frozen, adapter_params, part)))
    return np.concatenate(parts)[:count]


def some_of(request: Request, rows: np.ndarray) -> Request:
    """The request for some of its pictures; what is not per picture stays."""
    count = len(request.keys)
    return jax.tree.map(lambda x: x[rows] if jnp.shape(x)[:1] == (count,) else x, request)


def frozen_params(pipeline: Pipeline) -> dict:
    """The frozen tree that a painter takes."""
    return {name: getattr(pipeline, name).params for name in ("unet", "text_encoder", "vae")}


def picture_keys(seed: int, count: int, first: int = 0) -> Key[Array, " B"]:
    """Keys ``[count]`` of the pictures `first`, `first` + 1, … of a seed."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(first, first + count))
