"""The training loss: E ‖ε − ε_θ(z_t, t, c)‖² (docs/design.md, "The method")."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from persona_jax.diffusion.schedule import (
    Schedule,
    add_noise,
    min_snr_weight,
    prediction_target,
)


def example_keys(
    seed: Int[Array, ""] | int, step: Int[Array, ""] | int, index: Int[Array, " B"]
) -> Key[Array, " B"]:
    """A key per example, ``[B]``, from (seed, step, global index) alone: the same whatever the
    number of devices or processes (docs/design.md, "Seeds and data order")."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def draw_steps(
    keys: Key[Array, " B"], schedule: Schedule, low: float = 0.0, below: int = 0
) -> Int[Array, " B"]:
    """A diffusion step per example, ``[B]``: uniform, but of a share `low` of them uniform below
    `below`. Small pictures need less noise before nothing is left to see (Chen 2023, "On the
    importance of noise scheduling for diffusion models")."""

    def draw(key: Array) -> Array:
        step_key, low_key = jax.random.split(key)
        favoured = jax.random.uniform(low_key) < low
        return jax.random.randint(step_key, (), 0, jnp.where(favoured, below, schedule.steps))

    return jax.vmap(draw)(keys)


def denoising_loss(
    predict: Callable[[Array, Array], Array],
    schedule: Schedule,
    latents: Float[Array, "B h w C"],
    noise: Float[Array, "B h w C"],
    t: Int[Array, " B"],
    min_snr_gamma: float | None = None,
) -> Float[Array, " B"]:
    """Mean squared error of the prediction, per example, float32 ``[B]``.

    Args:
      predict: (z_t, t) → ε or v, both ``[B, h, w, C]``.
      schedule: noise levels and what is predicted.
      latents: z_0, scaled.
      noise: ε.
      t: diffusion step per example.
      min_snr_gamma: γ of min-SNR weighting; None weighs every step alike.
    """
    prediction = predict(add_noise(schedule, latents, noise, t), t)
    target = prediction_target(schedule, latents, noise, t)
    loss = jnp.mean((prediction.astype(jnp.float32) - target) ** 2, axis=(1, 2, 3))
    if min_snr_gamma is None:
        return loss
    return loss * min_snr_weight(schedule, t, min_snr_gamma)
