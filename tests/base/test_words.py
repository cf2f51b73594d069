"""Captions for a base, and how well they find their pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from persona_jax.base.clip import retrieval
from persona_jax.base.words import captions_of, draw_caption, odds_of
from persona_jax.data.photos import load_photos
from persona_jax.data.portraits.builder import Settings
from persona_jax.errors import UserError


def test_portraits_have_captions_with_looks_and_of_looks_alone(tmp_path):
    settings = Settings({"base": 3}, photos=2, size=16)
    photos = load_photos("portraits", tmp_path, portraits=settings)
    rows = [5, 0, 2]
    kinds = captions_of(photos, rows)
    assert list(kinds) == ["plain", "full", "looks"]
    plain, full, looks = kinds.values()
    assert plain == [photos.captions[row] for row in rows]
    for short, long in zip(plain, full, strict=True):
        assert long.startswith(short.split(" person")[0])
        assert len(long) > len(short)
    assert not any("photo" in text or "background" in text for text in looks)


def test_each_kind_is_drawn_as_often_as_its_share_says():
    keys = jax.random.split(jax.random.key(0), 2000)
    tokens = jnp.stack([jnp.full((2000, 3), kind) for kind in range(3)], axis=1)
    odds = odds_of(("plain", "full", "looks"), {"full": 0.3, "looks": 0.5})
    drawn = np.asarray(draw_caption(keys, tokens, odds))
    assert (drawn == drawn[:, :1]).all()
    counted = np.bincount(drawn[:, 0], minlength=3) / 2000
    np.testing.assert_allclose(counted, [0.2, 0.3, 0.5], atol=0.04)
    # Where there is one kind of caption, it has all the shares.
    odds = odds_of(("plain",), {"full": 0.3, "looks": 0.5})
    assert (np.asarray(draw_caption(keys, tokens[:, :1], odds)) == 0).all()


@pytest.mark.parametrize("shares", [{"full": 0.7, "looks": 0.5}, {"full": -0.1, "looks": 0.5}])
def test_shares_that_make_no_odds_are_named(shares):
    with pytest.raises(UserError, match="shares"):
        odds_of(("plain", "full", "looks"), shares)


def test_retrieval_asks_for_each_captions_own_photo():
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=(256, 32)).astype(np.float32)
    people = [str(i // 2) for i in range(256)]  # two photos of each of 128
    assert retrieval(pictures, 3.0 * pictures, people) == 1.0
    assert retrieval(pictures, rng.normal(size=(256, 32)).astype(np.float32), people) < 0.1
    # Another photo of the same person is in another round: only who is on it can be right.
    swapped = pictures.reshape(128, 2, 32)[:, ::-1].reshape(256, 32)
    assert retrieval(pictures, swapped, people) < 0.1
    assert np.isnan(retrieval(pictures[:10], pictures[:10], people[:10]))
