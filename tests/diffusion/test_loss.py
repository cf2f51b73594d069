"""The training loss in closed form, and the source of its randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax.diffusion.loss import denoising_loss, draw_steps, example_keys
from persona_jax.diffusion.schedule import STABLE_DIFFUSION, Schedule, add_noise

SD = Schedule.from_json(STABLE_DIFFUSION)
T = jnp.array([0, 100, 500])


def drawn(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (3, 2, 2, 4))


def test_the_network_sees_the_noised_latents_and_is_asked_for_the_noise():
    z, noise = drawn(0), drawn(1)
    seen = {}

    def predict(z_t, t):
        seen["z_t"], seen["t"] = z_t, t
        return jnp.zeros_like(z_t)

    loss = denoising_loss(predict, SD, z, noise, T)
    np.testing.assert_array_equal(seen["z_t"], add_noise(SD, z, noise, T))
    np.testing.assert_array_equal(seen["t"], T)
    np.testing.assert_allclose(loss, (noise**2).mean(axis=(1, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_network_has_no_loss(prediction):
    schedule = SD.replace(prediction=prediction)
    z, noise = drawn(0), drawn(1)

    def predict(z_t, t):
        bar = SD.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        v = np.sqrt(bar) * noise - np.sqrt(1 - bar) * z
        return jnp.asarray(noise if prediction == "epsilon" else v)

    np.testing.assert_allclose(denoising_loss(predict, schedule, z, noise, T), 0, atol=1e-10)


def test_min_snr_weighs_examples_by_their_own_step():
    z, noise = drawn(0), drawn(1)
    plain = denoising_loss(lambda z_t, t: z_t, SD, z, noise, T)
    weighed = denoising_loss(lambda z_t, t: z_t, SD, z, noise, T, min_snr_gamma=5.0)
    np.testing.assert_allclose(weighed / plain, [0.0042537, 0.591446, 1.0], rtol=1e-4)


def test_loss_is_float32_whatever_the_network_computes_in():
    loss = denoising_loss(lambda z_t, t: z_t.astype(jnp.bfloat16), SD, drawn(0), drawn(1), T)
    assert loss.dtype == jnp.float32


def test_an_examples_key_depends_on_seed_step_and_index_alone():
    def bits(seed, step, index):
        return jax.random.key_data(example_keys(seed, step, jnp.array(index)))

    all_ = bits(0, 7, [4, 5, 6, 7])
    np.testing.assert_array_equal(bits(0, 7, [6, 4]), all_[jnp.array([2, 0])])
    assert not np.array_equal(bits(0, 8, [4]), all_[:1])
    assert not np.array_equal(bits(1, 7, [4]), all_[:1])


def test_steps_are_uniform_over_the_schedule():
    t = np.asarray(draw_steps(example_keys(0, 0, jnp.arange(20000)), SD))
    assert t.min() >= 0
    assert t.max() <= 999
    share = np.histogram(t, bins=10, range=(0, 1000))[0] / len(t)
    np.testing.assert_allclose(share, 0.1, atol=0.01)


def test_a_share_of_the_steps_is_low():
    t = np.asarray(draw_steps(example_keys(0, 0, jnp.arange(20000)), SD, low=0.75, below=500))
    share = np.histogram(t, bins=10, range=(0, 1000))[0] / len(t)
    np.testing.assert_allclose(share, [0.175] * 5 + [0.025] * 5, atol=0.01)
