"""Bootstrap intervals against closed forms."""

import numpy as np
import pytest

from persona_jax.errors import UserError
from persona_jax.metrics.intervals import bootstrap


def test_one_run_gives_the_normal_interval_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, (1, 400))
    interval = bootstrap(values, draws=20000)
    error = values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(1)
    people = rng.normal(0, 0.1, (1, 300))
    runs = np.array([[-1.0], [0.0], [1.0]])
    alike, apart = bootstrap(people + 0 * runs), bootstrap(people + runs)
    # The spread of the mean of three seeds: sqrt(2/3) / sqrt(3).
    assert alike.high - alike.low < 0.04
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * (2 / 9) ** 0.5, rel=0.15)


def test_pairing_leaves_only_the_difference():
    people = np.random.default_rng(2).normal(0, 1, (1, 100))
    interval = bootstrap((people + 0.2) - people)
    assert (interval.low, interval.high) == pytest.approx((0.2, 0.2))
    assert str(interval) == "0.200 (0.200 to 0.200)"


@pytest.mark.parametrize("values", [np.ones((1, 1)), np.array([[1.0, np.nan]])])
def test_too_few_values(values):
    with pytest.raises(UserError, match="two or more"):
        bootstrap(values)
