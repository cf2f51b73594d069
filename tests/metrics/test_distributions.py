"""FID, KID and Inception Score against torchmetrics, torch-fidelity's figures and closed forms."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from persona_jax.errors import UserError
from persona_jax.metrics import distributions as d


class Given(torch.nn.Module):
    """A feature network that returns its input."""

    def forward(self, features):
        return features


def two_sets(seed: int, count: int, dim: int):
    rng = np.random.RandomState(seed)
    return rng.randn(count, dim), rng.randn(count, dim)


@pytest.mark.parametrize(
    ("seed", "count", "dim", "fid"),
    [(2023, 512, 64, 4.4480752635), (1, 4, 4, 4.7538376175)],  # torch-fidelity
)
def test_fid_is_what_torch_fidelity_computes(seed, count, dim, fid):
    one, other = map(d.moments, two_sets(seed, count, dim))
    assert d.frechet_distance(one, other) == pytest.approx(fid, rel=1e-8)


def test_fid_of_shifted_unit_gaussians_is_the_squared_shift():
    dim, many = 2048, 10
    unit = d.Moments(many, np.zeros(dim), (many - 1) * np.eye(dim))
    shifted = d.Moments(many, np.ones(dim), (many - 1) * np.eye(dim))
    assert d.frechet_distance(unit, shifted) == pytest.approx(dim, abs=1e-6)


def test_fid_is_what_torchmetrics_computes():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(32, 32))
    one, other = rng.normal(size=(300, 32)) @ mix, 0.3 + rng.normal(size=(200, 32))
    distance = d.frechet_distance(d.moments(one), d.moments(other))
    theirs = _compute_fid(
        *(
            torch.from_numpy(x)
            for features in (one, other)
            for x in (features.mean(axis=0), np.cov(features.T))
        )
    )
    assert distance == pytest.approx(float(theirs), rel=1e-6)


def test_moments_add_up_however_the_pictures_are_split():
    features = np.random.default_rng(0).normal(size=(97, 8)).astype(np.float32)
    whole = d.moments(features)
    np.testing.assert_allclose(whole.covariance, np.cov(features.T.astype(np.float64)), rtol=1e-10)
    for cuts in ([10], [1, 2, 50], list(range(8, 97, 8))):
        parts = [d.moments(part) for part in np.split(features, cuts)]
        merged = d.merge(parts[::-1])
        assert merged.count == 97
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_fid_of_streamed_moments_is_that_of_all_features_at_once(offset, monkeypatch):
    """However far the mean lies from 0, where sums of squares would lose digits."""
    sets = [(x + offset).astype(np.float32) for x in two_sets(0, 3000, 48)]
    wide = [x.astype(np.float64) for x in sets]
    at_once = [SimpleNamespace(mean=x.mean(axis=0), covariance=np.cov(x.T)) for x in wide]
    monkeypatch.setattr(d, "BLOCK", 100)
    streamed = [d.moments(x) for x in sets]
    expected = d.frechet_distance(*at_once)
    assert d.frechet_distance(*streamed) == pytest.approx(expected, rel=1e-6)
    parts = [d.merge(d.moments(part) for part in np.array_split(x, 7)) for x in sets]
    assert d.frechet_distance(*parts) == pytest.approx(expected, rel=1e-6)
    rows = np.random.default_rng(0).permutation(3000)[:777]
    some = d.moments(sets[0], rows)
    np.testing.assert_allclose(some.covariance, np.cov(wide[0][rows].T), rtol=1e-8, atol=1e-8)


def test_50000_pictures_take_little_memory_beside_their_features():
    features = np.random.default_rng(0).standard_normal((50_000, 64), np.float32)
    tracemalloc.start()
    real = d.moments(features)
    d.frechet_distance_infinity(features, real, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < features.nbytes
    small = features[:3000]
    tracemalloc.start()
    d.precision_recall(small, small)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000**2 * 8


def test_fid_infinity_leaves_less_of_the_bias():
    rng = np.random.default_rng(0)
    reference = d.moments(rng.normal(size=(50_000, 16)))
    features = rng.normal(size=(1000, 16))
    biased = d.frechet_distance(d.moments(features), reference)
    assert biased > 0.1
    assert abs(d.frechet_distance_infinity(features, reference, seed=0)) < 0.3 * biased


def test_kid_is_what_torchmetrics_computes():
    one, other = two_sets(3, 50, 16)
    other = other + 0.2
    theirs = float(poly_mmd(torch.from_numpy(one), torch.from_numpy(other)))
    assert d.squared_mmd(one, other) == pytest.approx(theirs, rel=1e-9)
    # The subset size is clamped to the size of the sets, so both are used whole.
    mean, spread = d.kernel_distance(one, other, seed=0, subsets=3)
    assert mean == pytest.approx(theirs, rel=1e-9)
    assert spread < 1e-12


def test_kid_of_one_distribution_is_around_0():
    one, other = two_sets(0, 2000, 16)
    mean, spread = d.kernel_distance(one, other, seed=1, subsets=20, subset_size=500)
    assert abs(mean) < spread


@pytest.mark.parametrize(("splits", "score"), [(1, 31.9358), (10, 21.9755)])  # torch-fidelity
def test_inception_score_is_what_torch_fidelity_computes(splits, score):
    logits = np.random.RandomState(7).randn(1000, 1008) * 3
    assert d.inception_score(logits, 2020, splits)[0] == pytest.approx(score, abs=1e-4)


def test_inception_score_is_what_torchmetrics_computes():
    logits = np.random.RandomState(1).randn(200, 20) * 2
    metric = InceptionScore(feature=Given(), splits=1)
    metric.update(torch.from_numpy(logits))
    assert d.inception_score(logits, 0, 1)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-6)


@pytest.mark.parametrize("uniform", [False, True])
def test_inception_scores_with_closed_forms(uniform):
    assert d.inception_score(np.zeros((100, 10)), 0, 1, uniform)[0] == pytest.approx(1.0)
    sure = np.tile(np.eye(10) * 1e4, (10, 1))
    assert d.inception_score(sure, 0, 1, uniform)[0] == pytest.approx(10.0)


def test_a_uniform_marginal_rewards_a_single_class():
    one_class = np.tile(np.eye(10)[:1] * 1e4, (100, 1))
    assert d.inception_score(one_class, 0, 1)[0] == pytest.approx(1.0)
    assert d.inception_score(one_class, 0, 1, uniform=True)[0] == pytest.approx(10.0)


def manifold(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """Returns the share of points within the k-th-neighbour balls of the centres, by definition."""
    hits = 0
    for point in points:
        for i, centre in enumerate(centres):
            others = np.delete(centres, i, axis=0)
            radius = np.sort(np.linalg.norm(others - centre, axis=1))[k - 1]
            if np.linalg.norm(point - centre) <= radius:
                hits += 1
                break
    return hits / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_definition(k):
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(40, 3)), rng.normal(0.8, 0.7, size=(30, 3))
    precision, recall = d.precision_recall(generated, real, k)
    assert precision == pytest.approx(manifold(generated, real, k))
    assert recall == pytest.approx(manifold(real, generated, k))
    assert precision > recall  # narrower than the real ones


def test_precision_and_recall_of_the_same_and_of_far_pictures():
    real = np.random.default_rng(0).normal(size=(20, 4))
    assert d.precision_recall(real, real) == (1.0, 1.0)
    assert d.precision_recall(real + 100, real) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (lambda: d.inception_score(np.zeros((5, 3)), 0), "5 pictures in 10 splits"),
        (lambda: d.kernel_distance(np.zeros((1, 3)), np.zeros((9, 3)), 0), "KID needs 2"),
        (lambda: d.precision_recall(np.zeros((3, 2)), np.zeros((9, 2))), "more than 3"),
        (lambda: d.moments(np.full((3, 2), np.nan)), "not finite"),
        (lambda: d.moments(np.zeros((1, 2))).covariance, "needs 2 pictures"),
        (
            lambda: d.frechet_distance_infinity(np.zeros((9, 2)), d.moments(np.zeros((9, 2))), 0),
            "20",
        ),
    ],
)
def test_too_few_or_broken_pictures_are_refused(wrong, word):
    with pytest.raises(UserError, match=word):
        wrong()
