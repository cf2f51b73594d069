"""Portraits: what hides a region hides it, captions say what may change, groups share nobody."""

from itertools import combinations

import numpy as np
import pytest

from persona_jax.data.photo_datasets import load_photos
from persona_jax.data.portraits import descriptions as words
from persona_jax.data.portraits import traits
from persona_jax.data.portraits.builder import Settings, draw
from persona_jax.data.portraits.render import render
from persona_jax.errors import UserError

COUNT = 16
FACE = ("smile", "mouth_open", "brow_raise", "eyes_open")


def people_and_scenes(hiding_rate: float = 0.0):
    people = [traits.draw_identity(np.random.default_rng((1, i))) for i in range(COUNT)]
    scenes = [traits.draw_scene(np.random.default_rng((2, i)), hiding_rate) for i in range(COUNT)]
    return np.stack(people), np.stack(scenes)


def with_value(vectors: np.ndarray, names: tuple[str, ...], name: str, value) -> np.ndarray:
    out = vectors.copy()
    out[:, names.index(name)] = value
    return out


def difference(one, other) -> np.ndarray:
    """Mean absolute difference per photo, of 255."""
    a, b = (np.asarray(render(*photos)).astype(int) for photos in (one, other))
    return np.abs(a - b).mean(axis=(1, 2, 3))


def other_looks(people: np.ndarray, region: str) -> np.ndarray:
    out = people.copy()
    for trait in traits.REGIONS[region]:
        k = traits.IDENTITY.index(trait)
        out[:, k] = (people[:, k] + 0.5) % 1.0
    return out


@pytest.mark.parametrize("region", traits.REGIONS)
def test_what_hides_a_region_hides_all_of_it_and_it_shows_otherwise(region):
    people, scenes = people_and_scenes()
    scenes = with_value(scenes, traits.SCENE, "glasses", 0)
    hidden = with_value(scenes, traits.SCENE, f"hides_{region}", 1)
    changed = other_looks(people, region)
    shown = difference((people, scenes), (changed, scenes))
    left = difference((people, hidden), (changed, hidden))
    assert shown.min() > 0.02
    assert left.mean() < 0.06 * shown.mean()


@pytest.mark.parametrize("trait", traits.IDENTITY)
def test_every_trait_shows(trait):
    people, scenes = people_and_scenes()
    low, high = (with_value(people, traits.IDENTITY, trait, value) for value in (0.1, 0.9))
    assert difference((low, scenes), (high, scenes)).mean() > 0.1


@pytest.mark.parametrize("pair", list(combinations(traits.EXPRESSIONS, 2)), ids="-".join)
def test_every_two_expressions_differ(pair):
    people, scenes = people_and_scenes()
    shown = []
    for name in pair:
        worn = scenes
        for part, value in zip(FACE, traits.EXPRESSIONS[name], strict=True):
            worn = with_value(worn, traits.SCENE, part, value)
        shown.append((people, worn))
    assert difference(*shown).mean() > 0.9


def test_hiding_one_region_leaves_the_others_to_see():
    people, scenes = people_and_scenes()
    hidden = with_value(scenes, traits.SCENE, "hides_hair", 1)
    changed = other_looks(people, "eyes")
    assert difference((people, hidden), (changed, hidden)).mean() > 0.5


@pytest.mark.parametrize("size", [48, 128])
def test_any_size_is_the_same_picture(size):
    people, scenes = people_and_scenes(0.3)
    large = np.asarray(render(people, scenes, size)).astype(float)
    usual = np.asarray(render(people, scenes, 64)).astype(float)
    assert large.shape == (COUNT, size, size, 3)
    np.testing.assert_allclose(large.mean(axis=(1, 2)), usual.mean(axis=(1, 2)), atol=2.5)


def test_looks_are_independent_and_rates_differ():
    rngs = [np.random.default_rng(i) for i in range(2000)]
    looks = np.stack([traits.draw_identity(rng) for rng in rngs])
    assert np.abs(np.corrcoef(looks.T) - np.eye(len(traits.IDENTITY))).max() < 0.1
    rates = np.asarray([traits.draw_hiding_rate(rng) for rng in rngs])
    assert rates.min() < 0.1
    assert rates.max() > 0.55
    scenes = np.stack([traits.draw_scene(rng, 0.4) for rng in rngs])
    hides = scenes[:, [traits.SCENE.index(f"hides_{region}") for region in traits.REGIONS]]
    assert np.abs(hides.mean(axis=0) - 0.4).max() < 0.05
    assert np.abs(np.corrcoef(hides.T) - np.eye(len(traits.REGIONS))).max() < 0.1


def test_every_trait_has_its_words():
    assert set(words.LOOKS) == set(traits.IDENTITY)


def all_looks() -> set[str]:
    return {look for both in words.LOOKS.values() for look in both if look}


def test_the_photo_caption_says_what_may_change_and_no_looks():
    for i in range(200):
        rng = np.random.default_rng(i)
        photo = traits.as_dict(traits.SCENE, traits.draw_scene(rng, 0.4))
        caption = words.photo_caption(photo)
        assert not [look for look in all_looks() if look in caption]
        for region, thing in traits.HIDERS.items():
            held = ("microphone", "mitten") if region == "mouth" else (thing,)
            named = any(word in caption.split(" on a ")[0] for word in held)
            assert named == (photo[f"hides_{region}"] > 0.5)
        expression = tuple(traits.EXPRESSIONS)[int(photo["expression"])]
        assert caption.startswith(f"a photo of a {expression} person")
        assert caption.endswith(f"{tuple(traits.COLOURS)[int(photo['background'])]} background")


def test_full_captions_say_only_looks_that_show():
    for i in range(200):
        rng = np.random.default_rng(i)
        who = traits.as_dict(traits.IDENTITY, traits.draw_identity(rng))
        photo = traits.as_dict(traits.SCENE, traits.draw_scene(rng, 0.4))
        caption = words.full_caption(who, photo, rng)
        said = [
            trait for trait, both in words.LOOKS.items() if any(b and b in caption for b in both)
        ]
        for region, names in traits.REGIONS.items():
            if photo[f"hides_{region}"] > 0.5:
                assert not set(said) & set(names)
        assert len(said) <= words.SAID
        for trait in said:
            low, high = words.LOOKS[trait]
            assert (low or "?") not in caption or who[trait] < 1 / 3
            assert (high or "?") not in caption or who[trait] > 2 / 3


def test_groups_share_nobody_and_more_people_change_none():
    few = list(draw(Settings({"train": 2, "test": 2}, photos=3)))
    more = {(p["person"], p["photo"]): p for p in draw(Settings({"train": 5, "test": 2}, photos=4))}
    for photo in few:
        same = more[photo["person"], photo["photo"]]
        assert same["full_caption"] == photo["full_caption"]
        np.testing.assert_array_equal(same["identity"], photo["identity"])
        np.testing.assert_array_equal(same["scene"], photo["scene"])
    assert len({photo["identity"].tobytes() for photo in few}) == 4


def test_the_dataset_keeps_the_truth(tmp_path):
    settings = Settings({"train": 3, "validation": 2}, photos=2, size=16)
    photos = load_photos("portraits", tmp_path, portraits=settings)
    again = load_photos("portraits", tmp_path, portraits=settings)
    assert photos.fingerprint == again.fingerprint
    assert len(photos) == 10
    assert set(photos.people) == {f"train-{i:05d}" for i in range(3)} | {
        f"validation-{i:05d}" for i in range(2)
    }
    identity, scene = photos.truth("identity"), photos.truth("scene")
    drawn = np.asarray(render(identity, scene, 16)).astype(int)
    stored = np.stack([np.asarray(photos.image(i)) for i in range(len(photos))])
    assert np.abs(drawn - stored).max() <= 1  # rounding, where another batch size is compiled
    assert all("person" in text for text in photos.truth("full_caption"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"people": {"tests": 1}}, "tests"), ({"people": {"test": 0}}, "somebody")],
)
def test_wrong_settings_are_named(settings, named):
    with pytest.raises(UserError, match=named):
        Settings(**settings)


def test_opposites_are_told_by_the_truth():
    pairs = words.opposites()
    assert all(low != high for low, high in pairs)
    low, high = pairs[traits.IDENTITY.index("beard")]
    assert (low, high) == ("a person without a beard", "a person with a beard")
    identity = np.full((3, len(traits.IDENTITY)), 0.5, np.float32)
    identity[0, traits.IDENTITY.index("beard")] = 0.9
    identity[1, traits.IDENTITY.index("ear_size")] = 0.1
    identity[2] = 0.9
    scene = np.zeros((3, len(traits.SCENE)), np.float32)
    scene[2, traits.SCENE.index("hides_hair")] = 1
    which = words.which_opposite(identity, scene)
    assert which[0, traits.IDENTITY.index("beard")] == 1
    assert which[1, traits.IDENTITY.index("ear_size")] == 0
    looks = len(traits.IDENTITY)
    assert (which[:2, :looks] >= 0).sum() == 2
    hair = [trait in traits.REGIONS["hair"] for trait in traits.IDENTITY]
    np.testing.assert_array_equal(which[2, :looks], np.where(hair, -1, 1))


def test_opposite_expressions_are_told_where_the_mouth_shows():
    chosen = slice(len(traits.IDENTITY), -len(words.WORN))
    pairs = words.opposites()[chosen]
    assert pairs[0] == ("a photo of a calm person", "a photo of a smiling person")
    scene = np.zeros((3, len(traits.SCENE)), np.float32)
    scene[:, traits.SCENE.index("expression")] = [1, 4, 1]  # smiling, surprised, smiling
    scene[2, traits.SCENE.index("hides_mouth")] = 1
    identity = np.full((3, len(traits.IDENTITY)), 0.5, np.float32)
    which = words.which_opposite(identity, scene)[:, chosen]
    for row, name in zip(which[:2], ("smiling", "surprised"), strict=True):
        said = {pair[side] for pair, side in zip(pairs, row, strict=True) if side >= 0}
        assert said == {f"a photo of a {name} person"}
        assert (row >= 0).sum() == len(traits.EXPRESSIONS) - 1
    assert (which[2] == -1).all()


def test_what_is_worn_is_told_from_what_is_not():
    pairs = words.opposites()[-len(words.WORN) :]
    said = [worn.removeprefix("a photo of a person wearing ") for _, worn in pairs]
    assert {"a hat", "glasses", "face paint"} < set(said)
    assert {plain for plain, _ in pairs} == {"a photo of a person"}
    scene = np.zeros((2, len(traits.SCENE)), np.float32)
    scene[1, [traits.SCENE.index(name) for name in ("glasses", "hides_skin")]] = 1
    identity = np.full((2, len(traits.IDENTITY)), 0.5, np.float32)
    which = words.which_opposite(identity, scene)[:, -len(words.WORN) :]
    assert not which[0].any()
    assert [said[i] for i in np.flatnonzero(which[1])] == ["glasses", "face paint"]
