from collections import Counter

import numpy as np
import pytest
from synthetic import SHARED

from persona_jax.data.captions import read_labels
from persona_jax.data.splits import grouped_people, photos_of, split_people
from persona_jax.errors import UserError

# 40 people with 12 photos, 60 with 3, 50 with one.
PEOPLE = [f"p{i:03d}" for i in range(150) for _ in range(12 if i < 40 else 3 if i < 100 else 1)]


def test_disjoint_and_complete():
    split = split_people(PEOPLE, test=20, validation=15)
    counts = Counter(PEOPLE)
    held = set(split.test) | set(split.validation)
    assert len(split.test) == 20
    assert len(split.validation) == 15
    assert len(held) == 35
    assert all(counts[p] >= 10 for p in held)
    assert set(split.base) == set(counts) - held
    assert split.train == [p for p in split.base if counts[p] >= 2]
    assert len(split.train) == 65


def test_depends_on_seed_and_names_only():
    split = split_people(PEOPLE, test=20)
    assert split == split_people(reversed(PEOPLE), test=20)
    assert len(split.validation) == 20
    assert split.test != split_people(PEOPLE, test=20, seed=1).test
    # Frozen: the test people must never change.
    assert split.test[:4] == ["p000", "p001", "p003", "p004"]


def test_small_folder_without_validation_or_test():
    split = split_people(["a", "a", "b", "b", "c"], test=0, validation=0)
    assert split.train == ["a", "b"]
    assert split.base == ["a", "b", "c"]
    assert split.test == split.validation == []


@pytest.mark.parametrize(
    ("people", "test", "validation", "message"),
    [
        (PEOPLE, 41, None, "41 test and 0 validation .* but 40 people have at least 10"),
        (PEOPLE, 30, 11, "but 40 people"),
        (PEOPLE, -1, 0, "ask for fewer"),
        (["a"], 0, 0, "nobody with two photos"),
    ],
)
def test_mistakes(people, test, validation, message):
    with pytest.raises(UserError, match=message):
        split_people(people, test=test, validation=validation)


def test_photos_of():
    rows = photos_of(["a", "b", "a", "c", "b"], ["b", "a"])
    np.testing.assert_array_equal(rows[0], [1, 4])
    np.testing.assert_array_equal(rows[1], [0, 2])


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/lfw/captions_meta.tsv")
def test_lfw_defaults():
    files = read_labels(SHARED / "lfw/captions_meta.tsv")
    split = split_people(file.split("/")[0] for file in files)
    assert (len(split.test), len(split.validation)) == (100, 40)
    assert len(split.base) == 5_731 - 140


def test_portraits_come_in_groups():
    people = grouped_people(["train-1", "test-0", "train-0", "train-0", "unseen-7", "base-3"])
    assert people.train == ["train-0", "train-1"]
    assert (people.validation, people.test, people.base) == (["unseen-7"], ["test-0"], ["base-3"])
