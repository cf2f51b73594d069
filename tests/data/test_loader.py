import itertools

import numpy as np
import pytest

from persona_jax.data.loader import batches, photo_batches
from persona_jax.errors import UserError

COUNTS = [2, 5, 12, 3]
PEOPLE = np.split(np.arange(sum(COUNTS)), np.cumsum(COUNTS)[:-1])
OWNER = np.repeat(np.arange(4), COUNTS)
PHOTOS = sum(COUNTS)
# Each value encodes its photo and orientation.
TAG = np.arange(PHOTOS)[:, None] + np.array([0, 0.5])
ENCODINGS = {
    "moments": np.broadcast_to(TAG[..., None, None, None], (PHOTOS, 2, 2, 3, 4)).astype(np.float32),
    "embeddings": np.broadcast_to(1 + TAG[..., None], (PHOTOS, 2, 5)).astype(np.float32),
    "tokens": np.repeat(np.arange(PHOTOS, dtype=np.int32)[:, None], 7, axis=1),
}
OPTIONS = {"batch_size": 8, "n": 10, "fixed": False, "flip": True, "seed": 3}


def take(count, **options):
    stream = batches(ENCODINGS, PEOPLE, **{**OPTIONS, **options})
    return list(itertools.islice(stream, count))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_shapes_and_types():
    (batch,) = take(1)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "moments": ((8, 2, 3, 4), "float32"),
        "tokens": ((8, 7), "int32"),
        "embeddings": ((8, 9, 5), "float32"),
        "mask": ((8, 9), "float32"),
        "index": ((8,), "int32"),
    }


def test_examples_are_of_one_person_and_flip_as_a_whole():
    sides = set()
    for batch in take(60):
        for b in range(8):
            tag = batch["moments"][b].flat[0]
            target, side = int(tag), tag % 1
            assert (batch["moments"][b] == tag).all()
            assert (batch["tokens"][b] == target).all()
            real = batch["mask"][b] > 0
            tags = batch["embeddings"][b, real, 0] - 1
            assert set(OWNER[tags.astype(int)]) == {OWNER[target]}
            assert target not in tags.astype(int)
            assert set(tags % 1) == {side}
            assert not batch["embeddings"][b, ~real].any()
            sides.add(side)
    assert sides == {0, 0.5}
    assert all((batch["moments"] % 1 == 0).all() for batch in take(10, flip=False))


def test_wrong_photos_come_from_other_people_in_the_share_asked_for():
    mixed = own = 0
    for batch in take(100, wrong=0.5):
        for b in range(8):
            tags = batch["embeddings"][b, batch["mask"][b] > 0, 0] - 1
            person = OWNER[int(batch["moments"][b].flat[0])]
            wrong = OWNER[tags.astype(int)] != person
            assert 2 * wrong.sum() < len(tags)
            own += len(tags) >= 3
            mixed += wrong.any()
    assert abs(mixed / own - 0.5) < 0.1
    assert_same(take(1)[0], take(1, wrong=0.0)[0])
    with pytest.raises(UserError, match=r"wrong=1\.5"):
        take(1, wrong=1.5)


def test_every_photo_once_an_epoch_in_a_new_order():
    stream = take(11, batch_size=4)  # Two epochs of 22.
    targets = np.concatenate([batch["tokens"][:, 0] for batch in stream])
    first, second = targets[:PHOTOS], targets[PHOTOS:]
    assert sorted(first) == sorted(second) == list(range(PHOTOS))
    assert (first != second).any()
    assert (first != np.arange(PHOTOS)).any()
    other = np.concatenate([b["tokens"][:, 0] for b in take(11, batch_size=4, seed=4)])
    assert (other[:PHOTOS] != first).any()
    assert (other[:PHOTOS] != second).any()


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_out_the_same_batches(processes):
    alone = take(12)
    parts = [take(12, process_index=p, process_count=processes) for p in range(processes)]
    for step, batch in enumerate(alone):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in batch}
        order = np.argsort(joined["index"])
        assert_same(batch, {name: value[order] for name, value in joined.items()})
        np.testing.assert_array_equal(batch["index"], np.arange(step * 8, step * 8 + 8))


@pytest.mark.parametrize("step", [1, 7, 100])
def test_starting_at_a_step_is_the_tail(step):
    for a, b in zip(take(step + 3)[step:], take(3, start_step=step), strict=True):
        assert_same(a, b)


def test_starts_far_ahead_with_indices_in_32_bits():
    step = 2**31 // 8
    (batch,) = take(1, start_step=step - 1)
    assert batch["index"][-1] == 2**31 - 1
    (batch,) = take(1, start_step=step)
    np.testing.assert_array_equal(batch["index"], np.arange(8))
    assert batch["mask"].sum(1).min() >= 1


def test_photo_batches():
    def take_photos(count, **options):
        options = {"flip": True, "seed": 1, **options}
        return list(itertools.islice(photo_batches(10, 4, **options), count))

    alone = take_photos(5)
    photos = np.concatenate([batch["photo"] for batch in alone])
    assert sorted(photos[:10]) == sorted(photos[10:]) == list(range(10))
    assert {b["flip"].dtype.name for b in alone} == {"bool"}
    assert set(np.concatenate([b["flip"] for b in alone])) == {True, False}
    assert not any(b["flip"].any() for b in take_photos(5, flip=False))
    parts = [take_photos(5, process_index=p, process_count=2) for p in range(2)]
    for step, batch in enumerate(alone):
        joined = {k: np.stack([part[step][k] for part in parts], 1).ravel() for k in batch}
        assert_same(batch, joined)
    for a, b in zip(alone[3:], take_photos(2, start_step=3), strict=True):
        assert_same(a, b)


def test_mistakes():
    with pytest.raises(UserError, match="multiple of the 3 processes"):
        take(1, process_count=3)
    with pytest.raises(UserError, match="at least 2"):
        take(1, n=1)
    with pytest.raises(UserError, match="1 people have fewer than 2"):
        batches(ENCODINGS, [np.array([0])], **OPTIONS)
