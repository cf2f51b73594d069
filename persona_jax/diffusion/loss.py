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
    """Random key of each example, ``[B]``.

    It depends on (seed, step, global index) only, so it is the same for any number of devices or
    processes (docs/design.md, "Seeds and data order").
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def draw_steps(
    keys: Key[Array, " B"], schedule: Schedule, low: float = 0.0, below: int = 0
) -> Int[Array, " B"]:
    """Random diffusion step of each example, ``[B]``.

    Steps are uniform over the schedule; a share `low` of the examples draws uniformly from the
    steps below `below` instead. Less noise destroys a small image than a large one, so low noise
    levels matter more there (Chen 2023, "On the importance of noise scheduling for diffusion
    models").

    Args:
      keys: one per example ``[B]``.
      schedule: sets the number of steps.
      low: share of examples, from 0 to 1, that draw a low step.
      below: bound of the low steps.
    """

    def draw(key: Array) -> Array:
        step_key, low_key = jax.random.split(key)
        is_low = jax.random.uniform(low_key) < low
        return jax.random.randint(step_key, (), 0, jnp.where(is_low, below, schedule.steps))

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
      schedule: noise levels and the kind of prediction (ε or v).
      latents: z_0, scaled.
      noise: ε.
      t: diffusion step per example.
      min_snr_gamma: γ of min-SNR weighting; None weighs all steps equally.
    """
    prediction = predict(add_noise(schedule, latents, noise, t), t)
    target = prediction_target(schedule, latents, noise, t)
    loss = jnp.mean((prediction.astype(jnp.float32) - target) ** 2, axis=(1, 2, 3))
    if min_snr_gamma is None:
        return loss
    return loss * min_snr_weight(schedule, t, min_snr_gamma)
