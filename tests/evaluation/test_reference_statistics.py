"""Statistics of real photos in files, with and without the photos' features."""

import numpy as np

from persona_jax.evaluation import reference_statistics

NETWORK = "Inception, clean"


def test_what_is_saved_is_what_is_loaded(tmp_path):
    features = np.random.default_rng(0).normal(size=(9, 4))
    saved = reference_statistics.of(features)
    reference_statistics.save(tmp_path / "real.npz", {NETWORK: saved})
    loaded = reference_statistics.load(tmp_path / "real.npz")[NETWORK]
    np.testing.assert_allclose(loaded.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(loaded.covariance, np.cov(features.T), rtol=1e-12)
    np.testing.assert_array_equal(loaded.features, features)
    assert loaded.count == 9


def test_statistics_without_features_can_be_saved_again(tmp_path):
    """As of pytorch-fid's files, which hold mu and sigma alone."""
    mean, covariance = np.arange(3.0), np.eye(3)
    np.savez(tmp_path / "fid.npz", mu=mean, sigma=covariance)
    reference_statistics.save(
        tmp_path / "again.npz", reference_statistics.load(tmp_path / "fid.npz")
    )
    (loaded,) = reference_statistics.load(tmp_path / "again.npz").values()
    np.testing.assert_array_equal(loaded.mean, mean)
    np.testing.assert_array_equal(loaded.covariance, covariance)
    assert loaded.features is None
    assert loaded.count is None
