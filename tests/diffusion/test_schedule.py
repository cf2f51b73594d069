"""The noise schedule against diffusers' DDIMScheduler and published numbers."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from persona_jax.diffusion.schedule import (
    STABLE_DIFFUSION,
    Schedule,
    add_noise,
    for_ddim,
    min_snr_weight,
    prediction_target,
    sampling_steps,
)
from persona_jax.errors import UserError

SD = Schedule.from_json(STABLE_DIFFUSION)
T = jnp.array([0, 100, 500, 999])


def stock(**changes) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler.from_config(STABLE_DIFFUSION | changes)


def drawn(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (4, 2, 2, 3))


def to_torch(x: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


def test_noise_levels_of_stable_diffusion():
    np.testing.assert_allclose(
        SD.alphas_cumprod[[0, 500, 999]], [0.99914998, 0.27633247, 0.0046601], rtol=1e-5
    )
    assert SD.final_alpha_cumprod == pytest.approx(0.99914998)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_noise_levels_are_diffusers(beta_schedule):
    config = {"beta_schedule": beta_schedule, "beta_start": 0.001, "beta_end": 0.02}
    ours = Schedule.from_json(config)
    theirs = diffusers.DDIMScheduler(**config)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5)
    assert ours.final_alpha_cumprod == float(theirs.final_alpha_cumprod) == 1.0


def test_what_a_config_leaves_out_has_the_defaults_of_diffusers():
    ours, theirs = Schedule.from_json({}), diffusers.DDIMScheduler()
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4)
    config = theirs.config
    assert (ours.prediction, ours.spacing, ours.steps_offset, ours.clip_sample) == (
        config.prediction_type,
        config.timestep_spacing,
        config.steps_offset,
        config.clip_sample,
    )


def test_published_pndm_config_is_read():
    published = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    ours = Schedule.from_json(published)
    assert np.array_equal(ours.alphas_cumprod, SD.alphas_cumprod)
    assert (ours.prediction, ours.steps_offset, ours.clip_sample) == ("epsilon", 1, False)


def test_steps_of_stable_diffusion():
    assert sampling_steps(SD, 5)[0].tolist() == [801, 601, 401, 201, 1]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [1, 3, 7, 10, 50, 999])
def test_steps_are_diffusers(spacing, count):
    theirs = stock(timestep_spacing=spacing)
    theirs.set_timesteps(count)
    t, previous = sampling_steps(SD.replace(spacing=spacing), count)
    assert t.tolist() == theirs.timesteps.tolist()
    assert previous.tolist() == (theirs.timesteps - 1000 // count).tolist()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_as_many_steps_as_the_schedule_has(spacing):
    """diffusers exceeds its table here (step 1000 of 0 … 999); we repeat the last step."""
    t, _ = sampling_steps(SD.replace(spacing=spacing), 1000)
    assert t.max() == 999
    assert t.min() == (1 if spacing == "leading" else 0)


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_impossible_numbers_of_steps(count):
    with pytest.raises(UserError, match=f"steps={count}"):
        sampling_steps(SD, count)


def test_noise_is_added_as_in_diffusers():
    z, noise = drawn(0), drawn(1)
    theirs = stock().add_noise(to_torch(z), to_torch(noise), to_torch(T))
    np.testing.assert_allclose(add_noise(SD, z, noise, T), theirs, rtol=1e-4, atol=1e-5)


def test_targets_are_diffusers():
    z, noise = drawn(0), drawn(1)
    v = stock().get_velocity(to_torch(z), to_torch(noise), to_torch(T))
    target = prediction_target(SD.replace(prediction="v_prediction"), z, noise, T)
    np.testing.assert_allclose(target, v, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(prediction_target(SD, z, noise, T), noise)


def test_min_snr_weights():
    t = jnp.array([0, 100, 500])
    np.testing.assert_allclose(min_snr_weight(SD, t, 5.0), [0.0042537, 0.591446, 1.0], rtol=1e-4)
    snr = SD.alphas_cumprod[t] / (1 - SD.alphas_cumprod[t])
    np.testing.assert_allclose(
        min_snr_weight(SD.replace(prediction="v_prediction"), t, 5.0),
        np.minimum(snr, 5.0) / (snr + 1),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_schedule", "squaredcos_cap_v2"),
        ("prediction_type", "sample"),
        ("timestep_spacing", "karras"),
        ("rescale_betas_zero_snr", True),
        ("thresholding", True),
        ("trained_betas", [0.1, 0.2]),
        ("clip_sample_range", 2.0),
    ],
)
def test_settings_of_other_families_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        Schedule.from_json(STABLE_DIFFUSION | {key: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "flow matching"),
        ({"_class_name": "EDMEulerScheduler"}, "EDM"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDM"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "flow matching"),
        ({"_class_name": "VQDiffusionScheduler"}, "VQDiffusionScheduler"),
        ({"_class_name": "Mine" * 1000}, "MineMine"),
        ({"_class_name": ["a"]}, "a"),
    ],
)
def test_other_processes_are_refused_by_name(changes, words):
    with pytest.raises(UserError, match=words) as error:
        for_ddim(STABLE_DIFFUSION | changes)
    assert len(str(error.value)) < 500
