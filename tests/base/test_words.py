"""Captions for a base, and how well they find their pictures."""

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax.base.clip import retrieval
from persona_jax.base.words import captions_of, draw_caption
from persona_jax.data.photos import load_photos
from persona_jax.data.portraits.builder import Settings


def test_portraits_have_full_captions_too(tmp_path):
    settings = Settings({"base": 3}, photos=2, size=16)
    photos = load_photos("portraits", tmp_path, portraits=settings)
    rows = [5, 0, 2]
    plain, full = captions_of(photos, rows)
    assert plain == [photos.captions[row] for row in rows]
    for short, long in zip(plain, full, strict=True):
        assert long.startswith(short.split(" person")[0])
        assert len(long) > len(short)


def test_a_share_of_the_draws_is_full():
    keys = jax.random.split(jax.random.key(0), 2000)
    tokens = jnp.stack([jnp.zeros((2000, 3), int), jnp.ones((2000, 3), int)], axis=1)
    drawn = np.asarray(draw_caption(keys, tokens, 0.3))
    assert (drawn == drawn[:, :1]).all()
    assert abs(drawn[:, 0].mean() - 0.3) < 0.04
    # With one kind of caption there is nothing to draw.
    assert (np.asarray(draw_caption(keys, tokens[:, :1], 0.3)) == 0).all()


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
