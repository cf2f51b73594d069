"""The items in diffusers' last release with Flax (0.39.0), which needs its own environment.

It has no IP-Adapter: sampling uses text guidance alone, and a step is the gradient for the text's
hidden states through the frozen UNet. So both do less work than in persona_jax.
"""

from collections.abc import Callable
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
from diffusers.models.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax
from safetensors.torch import load_file

from benchmarks.sizes import SCHEDULE, TEXT_LENGTH, Size


def device_memory() -> int | None:
    """Returns the accelerator's peak memory in bytes; None without an accelerator."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def make(what: str, size: Size, folder: Path, dtype: str) -> Callable[[], None]:
    """Returns the function that runs an item; it is compiled at its first call."""
    return {
        "unet": _unet,
        "sampling": _sampling,
        "step": _step,
        "vae_encode": _vae_encode,
        "vae_decode": _vae_decode,
    }[what](size, folder, jnp.dtype(dtype))


def _load(cls: type, folder: Path, name: str, dtype: jnp.dtype) -> tuple:
    config = {k: v for k, v in cls.load_config(folder / name).items() if not k.startswith("_")}
    module = cls.from_config(config, dtype=dtype, return_unused_kwargs=True)[0]
    weights = load_file(folder / name / "diffusion_pytorch_model.safetensors")
    params = convert_pytorch_state_dict_to_flax(weights, module)
    return module, jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _inputs(size: Size, dtype: jnp.dtype) -> tuple:
    side, text = size.unet["sample_size"], size.unet["cross_attention_dim"]
    latents = jnp.asarray(_normal(size.batch, size.vae["latent_channels"], side, side))
    return latents, jnp.asarray(_normal(size.batch, TEXT_LENGTH, text), dtype)


def _unet(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    unet, params = _load(diffusers.FlaxUNet2DConditionModel, folder, "unet", dtype)
    latents, hidden = _inputs(size, dtype)
    predict = jax.jit(lambda p, z, c: unet.apply({"params": p}, z, 500, c).sample)
    return lambda: predict(params, latents, hidden).block_until_ready()


def _sampling(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    unet, params = _load(diffusers.FlaxUNet2DConditionModel, folder, "unet", dtype)
    vae, vae_params = _load(diffusers.FlaxAutoencoderKL, folder, "vae", dtype)
    latents, hidden = _inputs(size, dtype)
    scheduler = diffusers.FlaxDDIMScheduler.from_config(SCHEDULE)
    state = scheduler.set_timesteps(scheduler.create_state(), size.steps, latents.shape)

    @jax.jit
    def generate(params, vae_params, latents, hidden):
        hidden = jnp.concatenate([hidden, hidden])

        def denoise(i, carry):
            z, state = carry
            t = state.timesteps[i]
            both = jnp.concatenate([z, z])
            both = unet.apply({"params": params}, both, jnp.broadcast_to(t, len(both)), hidden)
            negative, positive = jnp.split(both.sample, 2)
            return scheduler.step(state, negative + 7.5 * (positive - negative), t, z).to_tuple()

        z, _ = jax.lax.fori_loop(0, size.steps, denoise, (latents, state))
        z = z / vae.config.scaling_factor
        return vae.apply({"params": vae_params}, z, method=vae.decode).sample

    return lambda: generate(params, vae_params, latents, hidden).block_until_ready()


def _step(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    unet, params = _load(diffusers.FlaxUNet2DConditionModel, folder, "unet", dtype)
    latents, hidden = _inputs(size, dtype)
    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    noise = latents[::-1] * 0.5

    @jax.jit
    def step(hidden, state, params, latents):
        def loss(hidden):
            predicted = unet.apply({"params": params}, latents, 500, hidden).sample
            return jnp.square(predicted - noise).mean()

        updates, state = optimizer.update(jax.grad(loss)(hidden), state, hidden)
        return optax.apply_updates(hidden, updates), state

    held = [hidden, optimizer.init(hidden)]

    def once() -> None:
        held[:] = step(*held, params, latents)
        jax.block_until_ready(held)

    return once


def _vae_encode(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    vae, params = _load(diffusers.FlaxAutoencoderKL, folder, "vae", dtype)
    pixels = jnp.asarray(_normal(1, 3, size.vae["sample_size"], size.vae["sample_size"]))
    run = jax.jit(lambda p, x: vae.apply({"params": p}, x, method=vae.encode).latent_dist.mean)
    return lambda: run(params, pixels).block_until_ready()


def _vae_decode(size: Size, folder: Path, dtype: jnp.dtype) -> Callable[[], None]:
    vae, params = _load(diffusers.FlaxAutoencoderKL, folder, "vae", dtype)
    side = size.unet["sample_size"]
    latents = jnp.asarray(_normal(1, size.vae["latent_channels"], side, side))
    run = jax.jit(lambda p, z: vae.apply({"params": p}, z, method=vae.decode).sample)
    return lambda: run(params, latents).block_until_ready()
