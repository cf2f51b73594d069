"""Image generation from noise to pixels, as one compiled program of prompts and references."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from persona_jax.diffusion.ddim import ddim, guide, picture_noise
from persona_jax.diffusion.schedule import Schedule, sampling_steps
from persona_jax.errors import UserError
from persona_jax.models import adapter
from persona_jax.models.adapter import Adapter
from persona_jax.models.attention import Source, project_keys_values
from persona_jax.models.unet import text_kernels
from persona_jax.models.vae import AutoencoderKL
from persona_jax.pipelines.pipeline import Pipeline
from persona_jax.runtime import finite
from persona_jax.runtime.compilation import compiler_options
from persona_jax.runtime.mesh import gathered, local_sharding, replicated, traced_for

LARGE = 2**30
"""Bytes of weights, above which CPU cores generate together and not each with a copy."""
USUAL = 1e4
"""Maximal magnitude of valid latents, whose standard deviation is 1."""


@struct.dataclass
class References:
    """Reference photos of the person on each image, and their weights.

    Attributes:
      embeddings: Γ_image of the photos ``[B, N, D]``, or of their patches ``[B, N, L, D]``.
      weights: ``[B, N]``; 0 removes a photo, 2 counts it twice.
      scale: λ of the adapter's attention: one number, ``[B, 1]`` for one per image, or a region
        mask per layer, ``{layer: [B, h·w]}`` (:mod:`persona_jax.pipelines.scales`).
      negative: photos for the unconditional half of classifier-free guidance, embeddings and
        weights as above, with as many slots; None: the adapter's unconditional embedding.
      window: (start, end), shares of the steps: λ is 0 before start and from end on; None: λ counts
        in all steps.
    """

    embeddings: Float[Array, "B N *D"]
    weights: Float[Array, "B N"]
    scale: Float[Array, "..."] | float | Mapping[str, Array | float] = 1.0
    negative: tuple[Float[Array, "B N *D"], Float[Array, "B N"]] | None = None
    window: tuple[Array | float, Array | float] | None = None


@struct.dataclass
class Request:
    """The inputs of a sampler; values of all fields may change without recompilation.

    Attributes:
      keys: one key per image ``[B]``; an image depends on no other key.
      ids: token ids of the prompts ``[B, T]``.
      negative_ids: token ids of the negative prompts ``[B, T]``, usually of the empty prompt.
      references: one for each adapter; empty for text alone.
      guidance: g of classifier-free guidance.
      eta: η of DDIM.
      noise: z_T ``[B, h, w, C]``; None: drawn from the keys, of the pipeline's size.
      step: computes this step of the trajectory alone, counted from 0, from the latents in
        `noise`; None: all steps.
    """

    keys: Key[Array, " B"]
    ids: Int[Array, "B T"]
    negative_ids: Int[Array, "B T"]
    references: tuple[References, ...] = ()
    guidance: Float[Array, ""] | float = 7.5
    eta: Float[Array, ""] | float = 0.0
    noise: Float[Array, "B h w C"] | None = None
    step: Int[Array, ""] | int | None = None


def make_request(
    keys: Key[Array, " B"],
    ids: Int[Array | np.ndarray, "B T"],
    negative_ids: Int[Array | np.ndarray, "1 T"],
    *,
    references: Sequence[References] = (),
    guidance: float | int = 7.5,
    eta: float | int = 0.0,
    noise: Float[Array | np.ndarray, "B h w C"] | None = None,
) -> Request:
    """A :class:`Request` from host arrays; `negative_ids` are one prompt's, for all pictures."""
    ids = jnp.asarray(ids)
    return Request(
        keys=keys,
        ids=ids,
        negative_ids=jnp.broadcast_to(jnp.asarray(negative_ids), ids.shape),
        references=tuple(references),
        guidance=guidance,
        eta=eta,
        noise=None if noise is None else jnp.asarray(noise, jnp.float32),
    )


def text_source(
    text_encoder: Any, params: Mapping, unet_kernels: Mapping, ids: Int[Array, "B T"]
) -> Source:
    """The text's keys and values, projected once for the whole sampling trajectory."""
    hidden = text_encoder.apply({"params": params}, ids).hidden
    return Source(*project_keys_values(unet_kernels, hidden))


def per_picture(scale: Float[Array, "..."] | float) -> bool:
    """Whether λ has a row for each image ``[B, …]``, rather than one value for all images."""
    shape = jnp.shape(scale)
    return len(shape) == 2 and shape[0] > 1


def for_both_halves(scale: Float[Array, "..."] | float) -> Float[Array, "..."] | float:
    """Repeats a λ of ``[B, …]`` for the unconditional half; one for all images is unchanged."""
    return jnp.concatenate([scale, scale]) if per_picture(scale) else scale


def image_source(loaded: Adapter, references: References, dtype: jnp.dtype | None) -> Source:
    """The attention source ``[2B, …]`` of an adapter's references, the unconditional half first."""

    def aggregate(embeddings: Array, weights: Array) -> Array:
        return adapter.aggregate(loaded.params, loaded.aggregator, embeddings, weights)

    image, weights = aggregate(references.embeddings, references.weights), references.weights
    if references.negative is None:
        negative, negative_weights = adapter.unconditional(image, loaded.blank), weights
    else:
        negative, negative_weights = aggregate(*references.negative), references.negative[1]
    return adapter.source(
        loaded.params,
        jnp.concatenate([negative, image]),
        jax.tree.map(for_both_halves, references.scale),
        dtype,
        weights=jnp.concatenate([negative_weights, weights]),
    )


def in_window(source: Source, window: tuple | None, done: Array) -> Source:
    """The source with λ set to 0 if `done`, the share of completed steps, is outside the window."""
    if window is None:
        return source
    start, end = window
    counts = jnp.where((done >= start) & (done < end), 1.0, 0.0)
    scale = jax.tree.map(lambda scale: scale * counts, source.scale)
    return dataclasses.replace(source, scale=scale)


Sampler = Callable[[Mapping, Sequence[Adapter], Request], Array]
"""(frozen params, adapters, request) → images or latents; ``request.references`` has one entry
for each adapter."""


def make_latent_sampler(pipeline: Pipeline, *, steps: int) -> Sampler:
    """Makes a sampler of scaled latents ``[B, h, w, C]``; not jitted.

    The unconditional half gets the negative prompt and the zero embedding, as in the original
    IP-Adapter.

    Args:
      pipeline: the base.
      steps: of DDIM.
    """
    unet, text_encoder = pipeline.tower("unet").module, pipeline.tower("text_encoder").module
    schedule: Schedule = pipeline.schedule
    shape = pipeline.latent_shape
    all_steps = jnp.asarray(sampling_steps(schedule, steps)[0])

    def sample(frozen: Mapping, adapters: Sequence[Adapter], request: Request) -> Array:
        kernels = text_kernels(frozen["unet"], unet.config)
        ids = jnp.concatenate([request.negative_ids, request.ids])
        text = text_source(text_encoder, frozen["text_encoder"], kernels, ids)
        image_sources = [
            (image_source(loaded, references, unet.dtype), references.window)
            for loaded, references in zip(adapters, request.references, strict=True)
        ]

        def denoise_both(latents: Array, t: Array) -> Array:
            done = (all_steps > t).mean()
            sources = [text, *(in_window(source, window, done) for source, window in image_sources)]
            t = jnp.broadcast_to(t, (len(latents),))
            out = unet.apply({"params": frozen["unet"]}, latents, t, sources)
            return cast(Array, out)  # apply returns a tuple where collections are mutable

        noise = request.noise
        if noise is None:
            noise = picture_noise(request.keys, 0, shape)
        denoise = guide(denoise_both, request.guidance)
        return ddim(
            denoise,
            schedule,
            noise,
            steps=steps,
            eta=request.eta,
            keys=request.keys,
            only=request.step,
        )

    return sample


def split_among_devices(sampler: Sampler, mesh: Mesh | None = None) -> Sampler:
    """Shards a sampler's batch over devices, which generate without communication.

    Args:
      sampler: for one device.
      mesh: of the devices; None: of this process (:func:`sampling_mesh`).
    """

    def sample(frozen: Mapping, adapters: Sequence[Adapter], request: Request) -> Array:
        devices = mesh or sampling_mesh(frozen, len(request.keys))
        if devices.size == 1:
            with traced_for(devices):
                return sampler(frozen, adapters, request)
        replicated_spec, sharded_spec = PartitionSpec(), PartitionSpec(devices.axis_names)
        leaves, structure = jax.tree.flatten(request)

        def sample_share(frozen: Mapping, adapters: Sequence[Adapter], leaves: list) -> Array:
            return sampler(frozen, adapters, jax.tree.unflatten(structure, leaves))

        return jax.shard_map(
            sample_share,
            mesh=devices,
            in_specs=(
                replicated_spec,
                replicated_spec,
                [sharded_spec if x else replicated_spec for x in of_each_picture(request)],
            ),
            out_specs=sharded_spec,
            check_vma=False,  # kernels do not declare over which axes their outputs vary
        )(frozen, adapters, leaves)

    return sample


def sampling_mesh(frozen: Mapping, count: int) -> Mesh:
    """The local devices for a batch of `count` images: the largest number that divides it.

    With large weights (:data:`LARGE`) on CPU cores this is one device: each would hold a copy of
    the weights, and large matrix products use all cores anyway.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))
    alone = jax.local_devices()[0].platform == "cpu" and size > LARGE
    return cast(Mesh, local_sharding(1 if alone else count).mesh)  # of devices, so not abstract


def of_each_picture(request: Request) -> list[bool]:
    """Which of the request's arrays have a row for each image, in the order of its leaves."""

    def each(path: Any, leaf: Array | float) -> bool:
        fields = {getattr(step, "name", None) for step in path}
        if "scale" in fields:
            return per_picture(leaf)
        return not fields & {"window", "guidance", "eta", "step"}

    return [each(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(request)]


def make_pixel_sampler(pipeline: Pipeline, *, steps: int) -> Sampler:
    """Makes a sampler of images ``[B, H, W, 3]`` in [−1, 1]; not jitted.

    An image is NaN if its latents exceed :data:`USUAL`. The sampler's frozen params are ``unet``,
    ``text_encoder`` and ``vae``.
    """
    sample_latents = make_latent_sampler(pipeline, steps=steps)

    def sample(frozen: Mapping, adapters: Sequence[Adapter], request: Request) -> Array:
        latents = sample_latents(frozen, adapters, request)
        return decode(pipeline, frozen["vae"], latents)

    return sample


def decode(
    pipeline: Pipeline, params: Mapping, latents: Float[Array, "B h w C"]
) -> Float[Array, "B H W 3"]:
    """Decodes scaled latents to images in [−1, 1].

    Args:
      pipeline: its VAE module is used.
      params: of the VAE.
      latents: scaled. An image is NaN if its latents exceed :data:`USUAL`.
    """
    vae = pipeline.tower("vae").module
    out = vae.apply({"params": params}, latents, method=AutoencoderKL.decode)
    pixels = cast(Array, out)  # apply returns a tuple where collections are mutable
    sound = (jnp.abs(latents) <= USUAL).all(axis=(1, 2, 3), keepdims=True)
    return jnp.where(sound, jnp.clip(pixels, -1.0, 1.0), jnp.nan)


def make_sampler(pipeline: Pipeline, *, steps: int) -> Sampler:
    """Makes a jitted sampler of images (:func:`make_pixel_sampler`), sharded over local devices.

    Changes of prompts, seeds, photos, scale, guidance or η do not recompile it. Another number of
    images, of reference slots or of `steps` does, and so does another kind of adapter.
    """
    sampler = split_among_devices(make_pixel_sampler(pipeline, steps=steps))
    return jax.jit(sampler, compiler_options=compiler_options())


def in_batches(
    sampler: Sampler,
    frozen: Mapping,
    adapters: Sequence[Adapter],
    request: Request,
    size: int = 32,
) -> Float[np.ndarray, "P H W C"]:
    """Samples a request for any number of images or latents, `size` at a time.

    The last batch is padded, so that one compiled program serves all batches.

    Raises:
      UserError: see :func:`each_batch`.
    """
    count = len(request.keys)
    parts = (
        some_of(request, np.minimum(np.arange(start, start + size), count - 1))
        for start in range(0, count, size)
    )
    return np.concatenate(list(each_batch(sampler, frozen, adapters, parts, size)))[:count]


def each_batch(
    sampler: Sampler,
    frozen: Mapping,
    adapters: Sequence[Adapter],
    requests: Iterable[Request],
    size: int,
) -> Iterator[Float[np.ndarray, "{size} H W C"]]:
    """Samples requests one after the other, each for `size` images, and yields each batch.

    Raises:
      UserError: a result is not finite; the likely cause is named.
    """
    # Transferred once, not with every batch.
    everywhere = replicated(sampling_mesh(frozen, size))
    frozen, adapters = jax.device_put((frozen, tuple(adapters)), everywhere)
    for request in requests:
        batch = np.asarray(sampler(frozen, adapters, request))
        refuse_not_finite(batch, frozen, adapters, request)
        yield batch


def refuse_not_finite(
    sampled: np.ndarray, frozen: Mapping, adapters: Sequence[Adapter], request: Request
) -> None:
    """Raises UserError, with the likely cause, if images or latents are not finite."""
    if np.isfinite(sampled).all():
        return
    adapter_params = {str(i): adapter.params for i, adapter in enumerate(adapters)}
    weights = {**frozen, "adapter": adapter_params}
    inputs = {"references": request.references, "settings": (request.guidance, request.eta)}
    cause = finite.beyond(weights) or finite.beyond(jax.tree.map(jnp.asarray, inputs))
    remedy = "fetch, train or export that again"
    if cause is None:
        cause = finite.beyond(weights, float(np.finfo(np.float16).max))
    if cause is None:
        cause = f"guidance {float(request.guidance):g} and the scales given are too large"
        remedy = "or the weights are damaged; take smaller ones"
    raise UserError(f"what was sampled is not finite: {cause}; {remedy}")


def each_step(
    sampler: Sampler, frozen: Mapping, adapters: Sequence[Adapter], request: Request, steps: int
) -> Iterator[Float[Array, "B h w C"]]:
    """Yields the latents after each step of a sampling trajectory; each step is one program run.

    Args:
      sampler: of latents, for `steps` steps.
      frozen: see :func:`sampler_params`.
      adapters: one for each of the request's references.
      request: with its noise.
      steps: of the trajectory.
    """
    everywhere = replicated(sampling_mesh(frozen, len(request.keys)))
    frozen, adapters = jax.device_put((frozen, tuple(adapters)), everywhere)
    latents = request.noise
    for step in range(steps):
        latents = sampler(frozen, adapters, dataclasses.replace(request, noise=latents, step=step))
        yield latents


def some_of(request: Request, rows: np.ndarray) -> Request:
    """The request for some of its images; arrays that are not per image are unchanged."""
    leaves, structure = jax.tree.flatten(request)
    flags = of_each_picture(request)
    selected = [x[rows] if each else x for x, each in zip(leaves, flags, strict=True)]
    return jax.tree.unflatten(structure, selected)


def sampler_params(pipeline: Pipeline) -> dict:
    """The frozen tree that a sampler takes; sharded towers are gathered
    (:func:`persona_jax.runtime.mesh.gathered`)."""
    names = ("unet", "text_encoder", "vae")
    return {name: gathered(pipeline.tower(name).params) for name in names}


def picture_keys(seed: int, count: int, first: int = 0) -> Key[Array, " B"]:
    """Keys ``[count]`` of the images `first`, `first` + 1, … of a seed."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(first, first + count))
