"""The noise schedule: z_t = α_t z_0 + σ_t ε (Ho et al. 2020; Stable Diffusion's settings)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from persona_jax.errors import UserError

_BETAS = ("linear", "scaled_linear")
_PREDICTIONS = ("epsilon", "v_prediction")
_SPACINGS = ("leading", "trailing", "linspace")


@struct.dataclass
class Schedule:
    """ᾱ of each step, and the settings that select sampling steps.

    Attributes:
      alphas_cumprod: ᾱ_t, float32 ``[steps]``; α_t = √ᾱ_t, σ_t = √(1 − ᾱ_t).
      final_alpha_cumprod: ᾱ after the last sampling step.
      prediction: what the network predicts, ``epsilon`` or ``v_prediction``.
      spacing: how sampling steps are spaced, ``leading``, ``trailing`` or ``linspace``.
      steps_offset: added to the steps of ``leading`` spacing.
      clip_sample: clamp predicted z_0 to ±1 (pixel models; False for Stable Diffusion).
    """

    alphas_cumprod: Float[Array, " S"] | Float[np.ndarray, " S"]
    final_alpha_cumprod: float = struct.field(pytree_node=False)
    prediction: str = struct.field(pytree_node=False, default="epsilon")
    spacing: str = struct.field(pytree_node=False, default="leading")
    steps_offset: int = struct.field(pytree_node=False, default=1)
    clip_sample: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Schedule":
        """From the content of ``scheduler_config.json``, of any sampler.

        Missing settings take the defaults of diffusers' DDIMScheduler.

        Raises:
          UserError: a setting outside Stable Diffusion's family.
        """
        beta_schedule = raw.get("beta_schedule", "linear")
        prediction = raw.get("prediction_type", "epsilon")
        spacing = raw.get("timestep_spacing", "leading")
        for key, value, known in (
            ("beta_schedule", beta_schedule, _BETAS),
            ("prediction_type", prediction, _PREDICTIONS),
            ("timestep_spacing", spacing, _SPACINGS),
            ("rescale_betas_zero_snr", raw.get("rescale_betas_zero_snr", False), (False,)),
            ("thresholding", raw.get("thresholding", False), (False,)),
            ("trained_betas", raw.get("trained_betas"), (None,)),
            ("clip_sample_range", raw.get("clip_sample_range", 1.0), (1.0,)),
        ):
            if value not in known:
                raise UserError(f"scheduler_config.json: {key}={value!r}; supported: {known}")
        power = 0.5 if beta_schedule == "scaled_linear" else 1.0
        start, end = raw.get("beta_start", 0.0001), raw.get("beta_end", 0.02)
        steps = raw.get("num_train_timesteps", 1000)
        betas = np.linspace(start**power, end**power, steps) ** (1 / power)
        alphas_cumprod = np.cumprod(1.0 - betas)
        final = 1.0 if raw.get("set_alpha_to_one", True) else float(alphas_cumprod[0])
        return cls(
            alphas_cumprod=alphas_cumprod.astype(np.float32),
            final_alpha_cumprod=final,
            prediction=prediction,
            spacing=spacing,
            steps_offset=raw.get("steps_offset", 0),
            clip_sample=raw.get("clip_sample", True),
        )

    @property
    def steps(self) -> int:
        """Number of training steps (1000)."""
        return len(self.alphas_cumprod)


STABLE_DIFFUSION = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "timestep_spacing": "leading",
}
"""``scheduler_config.json`` of Stable Diffusion 1.x, for DDIM."""


_SAMPLERS = (
    "DDIMScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""diffusers' samplers of the same diffusion process: their settings describe one noise schedule."""


def sampler_of(raw: Mapping[str, Any]) -> str:
    """Name of the diffusers class that a ``scheduler_config.json`` is of; DDIM's if it has none.

    Raises:
      UserError: flow matching, EDM, or an unknown class.
    """
    name = raw.get("_class_name", "DDIMScheduler")
    known = isinstance(name, str) and name in _SAMPLERS
    if known and raw.get("use_flow_sigmas") is not True:
        return name
    kind = f"{name:.80}" if isinstance(name, str) else repr(name)[:80]
    for mark, process in (("EDM", "EDM's preconditioned model"), ("Flow", "flow matching")):
        if mark in kind or (mark == "Flow" and known):
            kind += f" ({process})"
    raise UserError(
        f"scheduler_config.json: _class_name={kind}; supported are Stable Diffusion's samplers, "
        "such as DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler"
    )


def for_ddim(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``DDIMScheduler.from_config(pipe.scheduler.config)``, where `pipe` is
    diffusers' StableDiffusionPipeline of the same folder.

    That pipeline sets clip_sample to False and steps_offset to 1 where the file has these settings.
    Files saved by other samplers often lack them; then DDIM's defaults apply, which clip.

    Args:
      raw: the content of ``scheduler_config.json``.

    Raises:
      UserError: see :func:`sampler_of`.
    """
    own = sampler_of(raw) == "DDIMScheduler"
    set_ = {"clip_sample": False, "steps_offset": 1}
    return {**raw, **{key: value for key, value in set_.items() if own or key in raw}}


def sampling_steps(schedule: Schedule, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The diffusion steps of a sampling trajectory, from noise to image.

    Args:
      schedule: sets the number of steps and their spacing.
      count: number of sampling steps.

    Returns:
      (t, previous), int32 ``[count]`` each: every step and the one that follows it, which is
      negative at the end of the trajectory.

    Raises:
      UserError: more steps than the schedule has, or fewer than one.
    """
    total = schedule.steps
    if not 1 <= count <= total:
        raise UserError(f"steps={count}: between 1 and {total} sampling steps are possible")
    t: np.ndarray
    if schedule.spacing == "leading":
        t = (np.arange(count) * (total // count)).round()[::-1] + schedule.steps_offset
    elif schedule.spacing == "trailing":
        t = np.round(np.arange(total, 0, -total / count)) - 1
    else:
        t = np.linspace(0, total - 1, count).round()[::-1]
    t = np.minimum(t, total - 1).astype(np.int32)
    return t, t - total // count


def _at(values: Array | np.ndarray, t: Array, ndim: int) -> Array:
    return jnp.asarray(values)[t].reshape(t.shape + (1,) * (ndim - t.ndim))


def add_noise(
    schedule: Schedule,
    latents: Float[Array, "B h w C"],
    noise: Float[Array, "B h w C"],
    t: Int[Array, " B"],
) -> Float[Array, "B h w C"]:
    """z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) ε, all ``[B, h, w, C]``; `t` is ``[B]``."""
    alpha_bar = _at(schedule.alphas_cumprod, t, latents.ndim)
    return jnp.sqrt(alpha_bar) * latents + jnp.sqrt(1 - alpha_bar) * noise


def prediction_target(
    schedule: Schedule,
    latents: Float[Array, "B h w C"],
    noise: Float[Array, "B h w C"],
    t: Int[Array, " B"],
) -> Float[Array, "B h w C"]:
    """The regression target: ε, or v = √ᾱ ε − √(1 − ᾱ) z_0 (Salimans & Ho 2022)."""
    if schedule.prediction == "epsilon":
        return noise
    alpha_bar = _at(schedule.alphas_cumprod, t, latents.ndim)
    return jnp.sqrt(alpha_bar) * noise - jnp.sqrt(1 - alpha_bar) * latents


def min_snr_weight(schedule: Schedule, t: Int[Array, " B"], gamma: float) -> Float[Array, " B"]:
    """Loss weight min(SNR, γ)/SNR, or /(SNR + 1) for v-prediction (Hang et al. 2023), ``[B]``."""
    alpha_bar = _at(schedule.alphas_cumprod, t, 1)
    snr = alpha_bar / (1 - alpha_bar)
    return jnp.minimum(snr, gamma) / (snr if schedule.prediction == "epsilon" else snr + 1)
