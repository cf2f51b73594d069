"""Columns of a table, and when they are left out."""

import numpy as np
import pytest

from persona_jax.evaluation import reference_statistics, report
from persona_jax.evaluation.networks import NetworkOutput


def row(count: int, photos: int, fid: bool) -> dict:
    random = np.random.default_rng(0)
    output = NetworkOutput(random.normal(size=(count, 8)), random.normal(size=(count, 5)))
    real = reference_statistics.of(random.normal(size=(photos, 8)))
    return report.realism([output], real, "encoder", fid)


@pytest.mark.parametrize(("count", "photos"), [(8, 40), (40, 8)])
def test_fid_of_fewer_pictures_than_features_is_reported_on_request_and_marked(count, photos):
    assert not any("FID" in title for title in row(count, photos, fid=False))
    marked = [title for title in row(count, photos, fid=True) if "FID" in title]
    assert marked
    assert all("too few pictures" in title for title in marked)


def test_fid_of_enough_pictures():
    titles = row(40, 40, fid=False)
    assert {"FID (encoder) ↓", "FID∞ (encoder) ↓"} <= titles.keys()
    assert (
        titles["IS, 10 splits, uniform p(y) (encoder) ↑"] > titles["IS, 10 splits (encoder) ↑"] > 1
    )
