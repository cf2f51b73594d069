from collections import Counter

import numpy as np
import pytest

from persona_jax.data.leave_one_out import leave_one_out, with_wrong_photos

PHOTOS = np.array([7, 3, 11, 20, 0, 5])


def draws(photos, target, times=4000, **options):
    options = {"n": 10, "fixed": False, "flip": True, **options}
    rng = np.random.default_rng(0)
    return [leave_one_out(photos, target, rng, **options) for _ in range(times)]


@pytest.mark.parametrize(("n", "most"), [(10, 5), (4, 3), (2, 1), (6, 5)])
def test_references_are_distinct_others_in_every_number(n, most):
    numbers = Counter()
    for example in draws(PHOTOS, 11, n=n):
        assert example.target == 11
        assert example.references.shape == example.mask.shape == (n - 1,)
        count = int(example.mask.sum())
        chosen = example.references[:count].tolist()
        assert len(set(chosen)) == count
        assert set(chosen) <= set(PHOTOS.tolist()) - {11}
        np.testing.assert_array_equal(example.mask, [1] * count + [0] * (n - 1 - count))
        np.testing.assert_array_equal(example.references[count:], 0)
        numbers[count] += 1
    assert set(numbers) == set(range(1, most + 1))
    # Uniform: five standard deviations of a binomial around 4000 / most.
    share = 1 / most
    for number in numbers.values():
        assert abs(number - 4000 * share) <= 5 * np.sqrt(4000 * share * (1 - share)) + 1e-9


def test_each_other_photo_is_drawn_as_often():
    chosen = Counter(row for e in draws(PHOTOS, 11) for row in e.references[e.mask > 0].tolist())
    mean = np.mean(list(chosen.values()))
    assert len(chosen) == 5
    assert all(abs(count - mean) < 0.08 * mean for count in chosen.values())


def test_fixed():
    assert {int(e.mask.sum()) for e in draws(PHOTOS, 7, 50, fixed=True)} == {5}
    many = np.arange(30)
    assert {int(e.mask.sum()) for e in draws(many, 7, 50, fixed=True)} == {9}
    assert len({tuple(e.references) for e in draws(many, 7, 50, fixed=True)}) == 50


def test_flip_is_half_or_never():
    flips = sum(e.flip for e in draws(PHOTOS, 7))
    assert abs(flips - 2000) < 160
    assert not any(e.flip for e in draws(PHOTOS, 7, flip=False))


def test_mistakes():
    rng = np.random.default_rng(0)
    for photos, target, n in [([1], 1, 10), ([1, 2], 3, 10), ([1, 2], 1, 1)]:
        with pytest.raises(ValueError, match="of at least 2"):
            leave_one_out(np.array(photos), target, rng, n=n, fixed=False, flip=False)


def test_wrong_photos_are_a_minority_at_random_places():
    strangers = np.arange(100, 109)
    rng, places = np.random.default_rng(0), Counter()
    for example in draws(np.arange(10), 7, 500):
        mixed = with_wrong_photos(example, strangers, rng)
        count = int(example.mask.sum())
        wrong = mixed.references >= 100
        assert wrong.sum() == 0 if count < 3 else 1 <= wrong.sum() < count / 2
        assert not wrong[count:].any()
        np.testing.assert_array_equal(mixed.references[~wrong], example.references[~wrong])
        places.update(np.flatnonzero(wrong).tolist())
    assert set(places) == set(range(9))
