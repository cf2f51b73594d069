"""Captions for a base, and how well they find their pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from world import write_people

from persona_jax.base import contrastive
from persona_jax.base.caption_sampling import captions_of, draw_caption, looks_of, odds_of
from persona_jax.base.clip import retrieval
from persona_jax.data.photo_datasets import load_photos
from persona_jax.data.portraits.builder import Settings
from persona_jax.errors import UserError


def test_portraits_have_captions_with_looks(tmp_path):
    settings = Settings({"base": 3}, photos=2, size=16)
    photos = load_photos("portraits", tmp_path, portraits=settings)
    rows = [5, 0, 2]
    kinds = captions_of(photos, rows)
    assert list(kinds) == ["plain", "full"]
    plain, full = kinds.values()
    assert plain == [photos.captions[row] for row in rows]
    for short, long in zip(plain, full, strict=True):
        assert long.startswith(short.split(" person")[0])
        assert len(long) > len(short)
    opposites, which = looks_of(photos, rows)
    assert which.shape == (3, len(opposites))
    # What a full caption says of looks is what the truth says of them.
    for text, row in zip(full, which, strict=True):
        for pair, value in zip(opposites, row, strict=True):
            for side, sentence in enumerate(pair):
                if sentence.startswith("a person with ") and sentence[13:] in text:
                    assert value == side


def test_photos_of_unknown_people_have_no_looks(tmp_path):
    people = write_people(tmp_path / "people", 2, 2)
    photos = load_photos("folder", tmp_path / "data", folder=people)
    opposites, which = looks_of(photos, [0, 1])
    assert opposites == []
    assert which.shape == (2, 0)


def test_the_true_sentence_of_each_pair_is_to_be_nearer():
    images = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
    texts = jnp.asarray([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.8, 0.6]]])
    which = jnp.asarray([[0, -1], [-1, 1]])
    scale = jnp.asarray(5.0)
    # The first is nearer to its true sentence by 1, the second farther by 0.2; -1 counts nothing.
    expected = (np.log1p(np.exp(-5.0)) + np.log1p(np.exp(1.0))) / 2
    loss = contrastive.opposites_loss(images, texts, which, scale)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    nothing = contrastive.opposites_loss(images, texts, jnp.full((2, 2), -1), scale)
    assert nothing == 0


def test_each_kind_is_drawn_as_often_as_its_share_says():
    keys = jax.random.split(jax.random.key(0), 2000)
    tokens = jnp.stack([jnp.full((2000, 3), kind) for kind in range(2)], axis=1)
    odds = odds_of(("plain", "full"), {"full": 0.3})
    drawn = np.asarray(draw_caption(keys, tokens, odds))
    assert (drawn == drawn[:, :1]).all()
    counted = np.bincount(drawn[:, 0], minlength=2) / 2000
    np.testing.assert_allclose(counted, [0.7, 0.3], atol=0.04)
    # Where there is one kind of caption, it has all the shares.
    odds = odds_of(("plain",), {"full": 0.3})
    assert (np.asarray(draw_caption(keys, tokens[:, :1], odds)) == 0).all()


@pytest.mark.parametrize("shares", [{"full": 1.2}, {"full": -0.1}])
def test_shares_that_make_no_odds_are_named(shares):
    with pytest.raises(UserError, match="shares"):
        odds_of(("plain", "full"), shares)


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
