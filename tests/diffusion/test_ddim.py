"""DDIM and guidance against diffusers: golden sums of its test suite, and step by step."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from persona_jax.diffusion.ddim import ddim, guide, picture_noise
from persona_jax.diffusion.schedule import STABLE_DIFFUSION, Schedule

LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # clips, as default
# diffusers' deterministic sample, (4, 3, 8, 8) there.
SAMPLE = (jnp.arange(768) / 768).reshape(3, 8, 8, 4).transpose(3, 1, 2, 0)


def dummy(z, t):
    """The network of diffusers' scheduler tests."""
    return z * (t / (t + 1))


def stock_trajectory(config: dict, z: jax.Array, steps: int, eta=0.0, noises=None) -> np.ndarray:
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    z = torch.from_numpy(np.array(z))
    for i, t in enumerate(scheduler.timesteps):
        noise = torch.from_numpy(noises[i]) if noises is not None else None
        z = scheduler.step(dummy(z, t), t, z, eta=eta, variance_noise=noise).prev_sample
    return z.numpy()


@pytest.mark.parametrize(
    ("config", "total", "mean"),
    [
        (LINEAR, 172.0067, 0.223967),
        (LINEAR | {"prediction_type": "v_prediction"}, 52.5302, None),
        (STABLE_DIFFUSION, 183.2582, None),
    ],
    ids=["epsilon", "v", "stable-diffusion"],
)
def test_golden_sums(config, total, mean):
    out = np.abs(ddim(dummy, Schedule.from_json(config), SAMPLE, steps=10))
    assert out.sum() == pytest.approx(total, abs=2e-2)
    assert mean is None or out.mean() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_any_spacing_and_prediction_samples_as_diffusers(spacing, prediction):
    config = STABLE_DIFFUSION | {"timestep_spacing": spacing, "prediction_type": prediction}
    ours = ddim(dummy, Schedule.from_json(config), SAMPLE, steps=7)
    np.testing.assert_allclose(ours, stock_trajectory(config, SAMPLE, 7), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, LINEAR], ids=["sd", "linear"])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_eta_puts_back_as_noise_what_it_takes_from_the_direction(config, eta):
    """With the same noise, diffusers' step gives the same trajectory."""
    keys, steps = jax.random.split(jax.random.key(3), len(SAMPLE)), 6
    noises = [np.array(picture_noise(keys, i + 1, SAMPLE.shape[1:])) for i in range(steps)]
    ours = ddim(dummy, Schedule.from_json(config), SAMPLE, steps=steps, eta=eta, keys=keys)
    theirs = stock_trajectory(config, SAMPLE, steps, eta, noises)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert np.abs(theirs - stock_trajectory(config, SAMPLE, steps)).max() > 0.05


class Seen(Exception):
    pass


def test_variance_of_a_step():
    """diffusers' test suite: variance(420, 400) = 0.14771, for linear betas."""
    linear = Schedule.from_json(LINEAR)
    # A schedule that ends at 420, so that a trajectory in steps of 20 starts with 420 → 400.
    schedule = linear.replace(alphas_cumprod=linear.alphas_cumprod[:421], steps_offset=20)
    keys = jax.random.split(jax.random.key(0), 1)
    noise = picture_noise(keys, 1, (4, 4, 3))

    def denoise(z, t):
        """Predicts no signal and no noise: the second step sees only the noise that η added."""
        if t == 400:
            np.testing.assert_allclose((z / noise) ** 2, 0.14771, rtol=1e-3)
            raise Seen
        assert t == 420
        return jnp.zeros_like(z)

    with jax.disable_jit(), pytest.raises(Seen):
        ddim(denoise, schedule, jnp.zeros((1, 4, 4, 3)), steps=21, eta=1.0, keys=keys)


def test_noise_beyond_eta_zero_changes_nothing():
    schedule = Schedule.from_json(STABLE_DIFFUSION)
    keys = jax.random.split(jax.random.key(0), len(SAMPLE))
    with_keys = ddim(dummy, schedule, SAMPLE, steps=4, keys=keys)
    # (two programs: their last bits may differ)
    np.testing.assert_allclose(with_keys, ddim(dummy, schedule, SAMPLE, steps=4), atol=1e-6)


def test_guidance():
    """ε_u + g (ε_c − ε_u), the unconditional half first: g 1 is conditional, g 0 is not."""

    def both(z, t):
        assert len(z) == 2 * len(SAMPLE)
        return jnp.concatenate([z[: len(SAMPLE)] * 2, z[len(SAMPLE) :] * 3])

    for g, factor in ((0.0, 2.0), (1.0, 3.0), (7.5, 9.5)):
        np.testing.assert_allclose(
            guide(both, g)(SAMPLE, jnp.array(0)), factor * np.array(SAMPLE), rtol=1e-6
        )


def test_a_pictures_noise_is_its_own():
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (2, 2, 4)
    np.testing.assert_array_equal(
        picture_noise(keys, 1, shape)[:2], picture_noise(keys[:2], 1, shape)
    )
    assert not np.array_equal(picture_noise(keys, 1, shape), picture_noise(keys, 2, shape))
