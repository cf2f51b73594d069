"""Illustrated people: every trait shows, obstacles hide theirs, captions say what is there."""

import numpy as np
import pytest

from persona_jax.data.photo_datasets import load_photos
from persona_jax.data.portraits.builder import Settings
from persona_jax.data.portraits2 import descriptions, drawing, traits
from persona_jax.data.portraits2.builder import draw

COUNT = 4


def people() -> np.ndarray:
    return np.stack([traits.draw_identity(np.random.default_rng((1, i))) for i in range(COUNT)])


def scenes(*obstacles: str) -> np.ndarray:
    generators = [np.random.default_rng((2, i)) for i in range(COUNT)]
    return np.stack([traits.scene_with(rng, list(obstacles)) for rng in generators])


def changed(who: np.ndarray, trait: str) -> np.ndarray:
    """The same people with another value of one trait."""
    out, column = who.copy(), traits.IDENTITY.index(trait)
    if trait in traits.LEVELS:
        out[:, column] = (who[:, column] + 0.5) % 1.0
    else:
        out[:, column] = (who[:, column] + 1) % len(traits.KINDS[trait])
    return out


def difference(one, other) -> float:
    """Mean absolute difference of levels, of 255."""
    a, b = (drawing.render(*photos).astype(int) for photos in (one, other))
    return float(np.abs(a - b).mean())


@pytest.mark.parametrize("trait", traits.IDENTITY)
def test_every_trait_shows_on_a_plain_photo(trait):
    who = people()
    who[:, traits.IDENTITY.index("hair_style")] = 7  # not bald: hair colour shows
    scene = np.repeat(traits.as_vector(traits.SCENE, traits.PLAIN_SCENE)[None], COUNT, axis=0)
    assert difference((who, scene), (changed(who, trait), scene)) > 0.15


@pytest.mark.parametrize(
    ("obstacle", "trait"),
    [
        ("sunglasses", "eye_colour"),
        ("sunglasses", "eye_shape"),
        ("sunglasses", "glasses"),
        ("hat", "hair_style"),
        ("scarf", "beard"),
        ("scarf", "lips"),
        ("hand", "lips"),
    ],
)
def test_what_covers_a_trait_hides_it(obstacle, trait):
    assert trait in traits.HIDDEN_BY[obstacle]
    who = people()
    who[:, traits.IDENTITY.index("hair_style")] = 2  # short: nothing shows below a hat
    who[:, traits.IDENTITY.index("beard")] = 0
    other = changed(who, trait)
    bare, covered = scenes(), scenes(obstacle)
    shown = difference((who, bare), (other, bare))
    assert difference((who, covered), (other, covered)) < 0.2 * shown


@pytest.mark.parametrize("obstacle", traits.OBSTACLES)
def test_every_obstacle_changes_the_picture_and_is_in_the_caption(obstacle):
    assert difference((people(), scenes()), (people(), scenes(obstacle))) > 2
    plain, said = (
        descriptions.photo_caption(traits.as_dict(traits.SCENE, scene))
        for scene in (scenes()[0], scenes(obstacle)[0])
    )
    assert said != plain


def test_half_of_all_photos_hide_nothing():
    drawn = np.stack([traits.draw_scene(np.random.default_rng(i)) for i in range(2000)])
    assert abs(traits.obstructed(drawn).mean() - 0.5) < 0.05
    hidden = traits.hidden_traits(drawn)
    assert not hidden[traits.obstructed(drawn) == 0].any()
    assert (hidden[traits.obstructed(drawn) == 1].sum(axis=1) > 0).all()


def test_codes_and_their_errors():
    who = people()
    np.testing.assert_allclose(traits.squared_errors(traits.encode(who), who), 0)
    code = traits.encode(changed(who, "nose"))
    errors = traits.squared_errors(code, who)
    np.testing.assert_allclose(errors[:, traits.IDENTITY.index("nose")], 1)
    guess = np.repeat(traits.guess()[None], 4000, axis=0)
    many = np.stack([traits.draw_identity(np.random.default_rng(i)) for i in range(4000)])
    found = np.sqrt(traits.squared_errors(guess, many).mean())
    assert found == pytest.approx(traits.guessing_error(), rel=0.02)


def test_captions_say_what_shows_and_no_more():
    who = traits.as_vector(
        traits.IDENTITY,
        {"skin_tone": 0.9, "hair_style": 5, "hair_colour": 2, "beard": 4, "glasses": 1},
    )
    scene = traits.as_vector(
        traits.SCENE, traits.PLAIN_SCENE | {"expression": 1, "scarf": 1, "scarf_colour": 1}
    )
    hidden = traits.hidden_traits(scene[None])[0]
    phrases = descriptions.looks(who, hidden)
    assert {"a ginger afro", "dark skin", "round glasses"} <= set(phrases)
    assert not any("beard" in phrase for phrase in phrases)
    caption = descriptions.photo_caption(traits.as_dict(traits.SCENE, scene))
    assert caption == ("a photo of a smiling person wearing an orange scarf on a blue background")


def test_a_dataset_is_the_same_every_time_and_shares_nobody_between_groups(tmp_path):
    settings = Settings({"train": 2, "test": 2}, photos=2, size=32)
    photos = load_photos("portraits2", tmp_path, portraits=settings)
    assert photos.people == [f"{g}-0000{i}" for g in ("test", "train") for i in (0, 0, 1, 1)]
    identity = photos.truth("traits")
    np.testing.assert_array_equal(identity[::2], identity[1::2])
    assert len(np.unique(identity, axis=0)) == 4
    drawn = {(photo["person"], photo["photo"]): photo for photo in draw(settings)}
    for i, key in enumerate(zip(photos.people, photos.indices, strict=True)):
        expected = drawing.draw(drawn[key]["traits"], drawn[key]["photo_scene"], 32)
        np.testing.assert_array_equal(np.asarray(photos.image(i)), expected)


def test_any_size():
    who, scene = people()[:1], scenes()[:1]
    small, large = (drawing.render(who, scene, size)[0].astype(float) for size in (64, 256))
    shrunk = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 4
