"""The benchmark items in persona_jax: each maker returns a function that runs the item once.

Batches are split over the devices, CPU cores included, as in training and sampling.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from benchmarks.sizes import MATRIX, PHOTOS, SCHEDULE, TEXT_LENGTH, Size
from persona_jax.diffusion.ddim import ddim, guide
from persona_jax.diffusion.loss import denoising_loss
from persona_jax.diffusion.schedule import Schedule
from persona_jax.interop.folders import load_tower
from persona_jax.models import adapter
from persona_jax.models.aggregators import Aggregator
from persona_jax.models.attention import Source, project_keys_values
from persona_jax.models.unet import text_kernels
from persona_jax.models.vae import AutoencoderKL
from persona_jax.runtime import memory
from persona_jax.runtime.compilation import compiler_options
from persona_jax.runtime.mesh import (
    batch_sharding,
    local_sharding,
    make_mesh,
    place,
    replicated,
    shard_params,
    use_cpu_cores,
)
from persona_jax.training.state import init_state, make_step


def make(what: str, size: Size, folder: Path, dtype: str) -> Callable[[], None]:
    """Returns the function that runs an item; it is compiled at its first call."""
    use_cpu_cores()
    memory.give_back_after_compilation()
    return {
        "matmul": _matmul,
        "unet": _unet,
        "sampling": _sampling,
        "step": _step,
        "whole_step": _whole_step,
        "vae_encode": _vae_encode,
        "vae_decode": _vae_decode,
        "clip": _clip,
    }[what](size, folder, jnp.dtype(dtype))


def device_memory() -> int | None:
    """Returns the accelerator's peak memory in bytes; None without an accelerator."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _matmul(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    side = MATRIX["cpu" if jax.default_backend() == "cpu" else "gpu"]
    a, b = jnp.asarray(_normal(2, side, side), dtype)
    run = jax.jit(jnp.matmul)
    return lambda: run(a, b).block_until_ready()


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _tower(folder: Path, name: str, dtype: jnp.dtype):
    tower = load_tower(folder / name, name, dtype=dtype, param_dtype=dtype)
    return tower.module, tower.params


def _inputs(size: Size, dtype: jnp.dtype) -> tuple:
    side, text = size.unet["sample_size"], size.unet["cross_attention_dim"]
    channels = size.vae["latent_channels"]
    latents = jnp.asarray(_normal(size.batch, side, side, channels))
    hidden = jnp.asarray(_normal(size.batch, TEXT_LENGTH, text), dtype)
    photos = jnp.asarray(_normal(size.batch, PHOTOS, size.image_encoder["projection_dim"]))
    return latents, hidden, photos


def _adapter(unet, params: Mapping, size: Size) -> dict:
    kernels = text_kernels(params, unet.config)
    dim, text = size.image_encoder["projection_dim"], size.unet["cross_attention_dim"]
    return adapter.init(jax.random.key(0), Aggregator("avg"), dim, text, kernels)


def _unet(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    unet, params = _tower(folder, "unet", dtype)
    latents, hidden, _ = _inputs(size, dtype)

    def predict(params, latents, hidden):
        source = Source(*project_keys_values(text_kernels(params, unet.config), hidden))
        t = jnp.full((len(latents),), 500)
        return unet.apply({"params": params}, latents, t, (source,))

    run, params = _split_among_devices(predict, size.batch, (params,), 2)
    return lambda: run(*params, latents, hidden).block_until_ready()


def _split_among_devices(
    function: Callable, batch: int, weights: tuple, inputs: int
) -> tuple[Callable, tuple]:
    """Splits a function's batches over the devices, as generation.split_among_devices does.

    Args:
      function: of the weights, then `inputs` arrays with a leading batch axis.

    Returns:
      the compiled function, and the weights replicated on all devices.
    """
    mesh = local_sharding(batch).mesh
    share = PartitionSpec(mesh.axis_names)
    shared = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(*(PartitionSpec(),) * len(weights), *(share,) * inputs),
        out_specs=share,
        check_vma=False,
    )
    run = jax.jit(shared, compiler_options=compiler_options(mesh))
    return run, jax.device_put(weights, replicated(mesh))


def _sampling(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    """Guided DDIM with an adapter, followed by the VAE's decoder."""
    unet, params = _tower(folder, "unet", dtype)
    vae, vae_params = _tower(folder, "vae", dtype)
    latents, hidden, photos = _inputs(size, dtype)
    adapter_params = _adapter(unet, params, size)

    def generate(params, vae_params, adapter_params, latents, hidden, photos):
        text = Source(
            *project_keys_values(
                text_kernels(params, unet.config), jnp.concatenate([hidden, hidden])
            )
        )
        image = photos.mean(axis=1)
        image = jnp.concatenate([jnp.zeros_like(image), image])
        photo_source = adapter.source(adapter_params, image, dtype=dtype)

        def both(z, t):
            t = jnp.broadcast_to(t, (len(z),))
            return unet.apply({"params": params}, z, t, (text, photo_source))

        z = ddim(guide(both, 7.5), Schedule.from_json(SCHEDULE), latents, steps=size.steps)
        return vae.apply({"params": vae_params}, z, method=AutoencoderKL.decode)

    run, weights = _split_among_devices(
        generate, size.batch, (params, vae_params, adapter_params), 3
    )
    return lambda: run(*weights, latents, hidden, photos).block_until_ready()


def _whole_step(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    """One training step of the whole UNet, conditioned on text."""
    unet, params = _tower(folder, "unet", dtype)
    latents, hidden, _ = _inputs(size, dtype)

    def sources(params, frozen, batch):
        return (Source(*project_keys_values(text_kernels(params, unet.config), batch["hidden"])),)

    batch = {"latents": latents, "hidden": hidden}
    return _training(size, unet, params, None, lambda params, frozen: params, sources, batch)


def _step(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    """One training step of an adapter: image projection, W'_k and W'_v; the UNet is frozen."""
    unet, params = _tower(folder, "unet", dtype)
    latents, hidden, photos = _inputs(size, dtype)

    def sources(trainable, frozen, batch):
        return (
            Source(*project_keys_values(text_kernels(frozen, unet.config), batch["hidden"])),
            adapter.source(trainable, batch["photos"].mean(axis=1), dtype=dtype),
        )

    trainable = _adapter(unet, params, size)
    del trainable["aggregator"]
    batch = {"latents": latents, "hidden": hidden, "photos": photos}
    return _training(
        size, unet, trainable, params, lambda trainable, frozen: frozen, sources, batch
    )


def _training(
    size: Size,
    unet: Any,
    trainable: Mapping,
    frozen: Mapping | None,
    unet_params: Callable[[Any, Any], Mapping],
    sources: Callable[[Any, Any, Mapping], tuple[Source, ...]],
    batch: Mapping,
) -> Callable[[], None]:
    """Returns a function that runs one training step: noise prediction and parameter update.

    Args:
      unet_params: function of (trainable, frozen).
      sources: function of (trainable, frozen, batch).
    """
    schedule = Schedule.from_json(SCHEDULE)
    mesh = make_mesh(devices=local_sharding(size.batch).mesh.devices.flatten())

    def loss(trainable, frozen, batch, step):
        conditions = sources(trainable, frozen, batch)

        def predict(z, t):
            return unet.apply({"params": unet_params(trainable, frozen)}, z, t, conditions)

        t = jnp.full((len(batch["latents"]),), 500)
        noise = batch["latents"][::-1] * 0.5
        return denoising_loss(predict, schedule, batch["latents"], noise, t).mean(), {}

    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    state = init_state(trainable, optimizer, mesh)
    frozen = place(frozen, shard_params(mesh, frozen))
    batch = jax.device_put(batch, batch_sharding(mesh))
    step = make_step(loss, optimizer, mesh)
    held = [state]

    def once() -> None:
        held[0], metrics = step(held[0], frozen, batch)
        jax.block_until_ready(metrics)

    return once


def _vae(size: Size, folder: Path, dtype: jnp.dtype, method, shape: tuple) -> Callable[[], None]:
    vae, params = _tower(folder, "vae", dtype)
    x = jnp.asarray(_normal(*shape))
    run = jax.jit(
        lambda params, x: vae.apply({"params": params}, x, method=method),
        compiler_options=compiler_options(),
    )
    return lambda: run(params, x).block_until_ready()


def _vae_encode(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    side = size.vae["sample_size"]
    return _vae(size, folder, dtype, AutoencoderKL.encode, (1, side, side, 3))


def _vae_decode(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    side = size.unet["sample_size"]
    shape = (1, side, side, size.vae["latent_channels"])
    return _vae(size, folder, dtype, AutoencoderKL.decode, shape)


def _clip(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    encoder, params = _tower(folder, "image_encoder", dtype)
    side = size.image_encoder["image_size"]
    pixels = jnp.asarray(_normal(1, side, side, 3))
    run = jax.jit(lambda params, x: encoder.apply({"params": params}, x).embedding)
    return lambda: run(params, pixels).block_until_ready()
