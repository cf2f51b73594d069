"""DDIM (Song et al. 2021) as one ``lax.scan``, and classifier-free guidance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from persona_jax.diffusion.schedule import Schedule, sampling_steps

Denoise = Callable[[Array, Array], Array]
"""(latents [B, h, w, C], scalar diffusion step t) → the network's prediction [B, h, w, C]."""


def guide(denoise_both: Denoise, guidance: Float[Array, ""] | float) -> Denoise:
    """Classifier-free guidance in one batch (Ho & Salimans 2022): ε_u + g (ε_c − ε_u).

    Args:
      denoise_both: predicts for ``[2B, h, w, C]``, the unconditional half first.
      guidance: g; 1 is the conditional prediction alone.

    Returns:
      The guided prediction, of ``[B, h, w, C]``.
    """

    def guided(latents: Array, t: Array) -> Array:
        both = denoise_both(jnp.concatenate([latents, latents]), t)
        unconditional, conditional = jnp.split(both, 2)
        return unconditional + guidance * (conditional - unconditional)

    return guided


def picture_noise(
    keys: Key[Array, " B"], step: Array | int, shape: tuple[int, int, int]
) -> Float[Array, "B h w C"]:
    """Standard normal noise of each image, drawn from its own key.

    An image therefore does not depend on the number of images in the batch.

    Args:
      keys: one per image ``[B]``.
      step: position in the sampling trajectory; 0 is the initial noise.
      shape: (h, w, C) of the latents.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape))(keys)


def predicted_original(
    schedule: Schedule, z: Array, prediction: Array, alpha_bar: Array
) -> tuple[Array, Array]:
    """(z_0, ε) that follow from the network's prediction for `z` at noise level `alpha_bar`."""
    signal, sigma = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
    if schedule.prediction == "epsilon":
        original, noise = (z - sigma * prediction) / signal, prediction
    else:
        original, noise = signal * z - sigma * prediction, signal * prediction + sigma * z
    if schedule.clip_sample:
        # As by default in diffusers, ε is not recomputed from the clipped z_0.
        original = jnp.clip(original, -1.0, 1.0)
    return original, noise


def ddim(
    denoise: Denoise,
    schedule: Schedule,
    noise: Float[Array, "B h w C"],
    *,
    steps: int,
    eta: Float[Array, ""] | float = 0.0,
    keys: Key[Array, " B"] | None = None,
    only: Int[Array, ""] | int | None = None,
) -> Float[Array, "B h w C"]:
    """DDIM sampling from noise to latents, eq. (12) of Song et al. 2021.

    Args:
      denoise: the network, guidance included.
      schedule: noise levels and spacing.
      noise: z_T ``[B, h, w, C]``, float32.
      steps: number of sampling steps (static: a new value recompiles).
      eta: η, how much of the predicted noise each step replaces by fresh noise: 0 is deterministic,
        1 is ancestral sampling.
      keys: one key per image ``[B]`` for that noise; None draws none (η = 0).
      only: take only this step (0 is the first), starting from latents given as `noise`.

    Returns:
      z_0 ``[B, h, w, C]``, or the latents after step `only` if that is given.

    Raises:
      UserError: more steps than the schedule has, or fewer than one.
    """
    t, previous = sampling_steps(schedule, steps)
    alpha_bars = jnp.asarray(schedule.alphas_cumprod)
    now = alpha_bars[t]
    after = jnp.where(
        jnp.asarray(previous) >= 0,
        alpha_bars[jnp.maximum(previous, 0)],
        schedule.final_alpha_cumprod,
    )

    def step(z: Array, inputs: tuple) -> tuple[Array, None]:
        i, t, now, after = inputs
        original, epsilon = predicted_original(schedule, z, denoise(z, t), now)
        variance = (1 - after) / (1 - now) * (1 - now / after)
        std = eta * jnp.sqrt(variance) if keys is not None else 0.0
        z = jnp.sqrt(after) * original + jnp.sqrt(1 - after - std**2) * epsilon
        if keys is not None:
            _, h, w, c = z.shape
            z += std * picture_noise(keys, i + 1, (h, w, c))
        return z, None

    inputs = (jnp.arange(steps), jnp.asarray(t), now, after)
    if only is not None:
        return step(noise, jax.tree.map(lambda x: x[only], inputs))[0]
    latents, _ = jax.lax.scan(step, noise, inputs)
    return latents
