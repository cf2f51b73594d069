import json
import shutil
import weakref
from collections.abc import Iterable

import numpy as np
import pytest
from PIL import Image, ImageOps
from synthetic import write_folder

from persona_jax.data import encodings as module
from persona_jax.data import records
from persona_jax.data.encodings import EncodingJob
from persona_jax.data.encodings import encode as run
from persona_jax.data.photo_datasets import load_photos
from persona_jax.errors import UserError


class Encoder:
    """Small encodings that depend on the input, and a count of the calls."""

    def __init__(self):
        self.sizes = []

    def images(self, images: Iterable[Image.Image]) -> dict[str, np.ndarray]:
        pixels = np.stack([np.asarray(image, np.float32) for image in images])
        self.sizes.append(len(pixels))
        return {"moments": pixels[:, ::8, ::8], "embeddings": pixels.mean((1, 2))}

    def captions(self, texts: list[str]) -> dict[str, np.ndarray]:
        return {"tokens": np.array([[len(text), 1] for text in texts], np.int32)}


@pytest.fixture
def photos(tmp_path):
    folder = write_folder(tmp_path / "people", {"Ann": 3, "Bob": 4})
    return load_photos("folder", tmp_path / "data", folder=folder)


def make_job(photos, tmp_path, rows=range(7), key="towers", **options):
    encoder = Encoder()
    job = EncodingJob(
        photos,
        rows,
        encode_images=encoder.images,
        encode_captions=encoder.captions,
        cache_dir=tmp_path / "cache",
        key=key,
        batch_size=3,
        **options,
    )
    return job, encoder


def encode(*args, **options):
    job, encoder = make_job(*args, **options)
    return run(job), encoder


@pytest.fixture
def small_shards(monkeypatch):
    """Divides seven photos into four shards."""
    monkeypatch.setattr(module, "SHARD", 2)


@pytest.fixture(params=[0, 2**28], ids=["read one by one", "held"])
def memory(request, monkeypatch):
    monkeypatch.setattr(records, "IN_MEMORY", request.param)


@pytest.mark.parametrize("shard", [2, 256])
def test_both_orientations_of_every_photo(photos, tmp_path, memory, monkeypatch, shard):
    monkeypatch.setattr(module, "SHARD", shard)
    rows = [6, 0, 2, 3, 1]
    encodings, encoder = encode(photos, tmp_path, rows)
    assert encodings.people == ["Bob", "Ann", "Ann", "Bob", "Ann"]
    assert encoder.sizes == [6] * (3 if shard == 2 else 2)
    for i, row in enumerate(rows):
        image = photos.image(row)
        for side, turned in enumerate([image, ImageOps.mirror(image)]):
            expected = np.asarray(turned, np.float32)[::8, ::8]
            np.testing.assert_array_equal(encodings.arrays["moments"][i, side], expected)
    assert encodings.arrays["embeddings"].shape == (5, 2, 3)
    assert encodings.arrays["tokens"].shape == (5, 2)
    assert len(encodings.arrays["moments"]) == 5


def test_rows_are_read_as_numpy_reads_them(photos, tmp_path, memory, small_shards):
    moments = encode(photos, tmp_path)[0].arrays["moments"]
    whole = np.asarray(moments)
    assert whole.shape == moments.shape == (7, 2, 5, 5, 3)
    assert whole.dtype == moments.dtype == np.float32
    rows, sides = np.array([[3, 0, 6], [2, 2, 5]]), np.array([[1], [0]])
    np.testing.assert_array_equal(moments[rows, sides], whole[rows, sides])
    tokens = encode(photos, tmp_path)[0].arrays["tokens"]
    np.testing.assert_array_equal(tokens[rows], np.asarray(tokens)[rows])


def test_second_time_from_disk_and_anew_when_anything_changes(photos, tmp_path):
    first, encoder = encode(photos, tmp_path)
    assert len(encoder.sizes) == 3
    second, encoder = encode(photos, tmp_path)
    assert encoder.sizes == []
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(second.arrays[name]))
    assert encode(photos, tmp_path, key="other towers")[1].sizes
    assert encode(photos, tmp_path, rows=range(6))[1].sizes
    write_folder(tmp_path / "people", {"Cyd": 2})
    changed = load_photos("folder", tmp_path / "data", folder=tmp_path / "people")
    assert encode(changed, tmp_path, rows=range(7))[1].sizes


def cut(shard):
    (shard / "moments").write_bytes((shard / "moments").read_bytes()[:-50])


def scramble(shard):
    (shard / "tokens").write_bytes(b"not an array")


def lose(shard):
    (shard / "embeddings").unlink()


def half_list(shard):
    (shard / "shard.json").write_text((shard / "shard.json").read_text()[:40])


def other_list(shard):
    (shard / "shard.json").write_text(json.dumps([1]))


def remove(shard):
    shutil.rmtree(shard)


@pytest.mark.parametrize("damage", [cut, scramble, lose, half_list, other_list, remove])
def test_a_damaged_shard_alone_is_made_again(photos, tmp_path, capsys, small_shards, damage):
    job, _ = make_job(photos, tmp_path)
    good = {name: np.asarray(array).copy() for name, array in run(job).arrays.items()}
    damage(job.place / "00001-of-00004")
    assert job.missing() == ["00001-of-00004"]
    again, encoder = encode(photos, tmp_path)
    assert encoder.sizes == [6]
    said = capsys.readouterr().out
    assert damage is remove or f"{job.place / '00001-of-00004'}: damaged (" in said
    for name, array in good.items():
        np.testing.assert_array_equal(array, np.asarray(again.arrays[name]))


def test_a_changed_byte_is_noticed(photos, tmp_path, memory):
    job, _ = make_job(photos, tmp_path)
    run(job)
    file = job.place / "00000-of-00001" / "moments"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"encodings .*: damaged \(.*delete that folder"):
        np.asarray(job.open().arrays["moments"])


def test_nothing_is_mirrored_where_left_and_right_differ(photos, tmp_path):
    both, _ = encode(photos, tmp_path)
    once, encoder = encode(photos, tmp_path, mirrored=False)
    assert encoder.sizes == [3, 3, 3]
    for name in ("moments", "embeddings"):
        assert once.arrays[name].shape[:2] == (7, 1)
        alone, first = np.asarray(once.arrays[name])[:, 0], np.asarray(both.arrays[name])[:, 0]
        np.testing.assert_array_equal(alone, first)


def test_parts_make_the_whole_in_any_order(photos, tmp_path, small_shards):
    whole, _ = encode(photos, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    for part in (2, 0, 1):
        job, encoder = make_job(photos, elsewhere)
        job.work(part, 3)
        assert len(encoder.sizes) == (2 if part == 0 else 1)
    last, encoder = encode(photos, elsewhere)
    assert encoder.sizes == []
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(last.arrays[name]))


def test_an_interrupted_job_goes_on_where_it_was(photos, tmp_path, small_shards):
    job, encoder = make_job(photos, tmp_path)

    def stop_in_the_third(images):
        if len(encoder.sizes) == 2:
            raise KeyboardInterrupt
        return encoder.images(images)

    stopped, _ = make_job(photos, tmp_path)
    object.__setattr__(stopped, "encode_images", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        stopped.work()
    left = {path.name for path in job.place.iterdir() if path.suffix != ".lock"}
    assert left == {"00000-of-00004", "00001-of-00004"}
    _, encoder = encode(photos, tmp_path)
    assert len(encoder.sizes) == 2


def test_one_decoded_photo_is_held_at_a_time(photos, tmp_path, monkeypatch):
    """A batch of photos of many megapixels would take gigabytes."""
    seen, most = [], []
    whole = type(photos).image

    def image(self, row):
        picture = whole(self, row)
        seen.append(weakref.ref(picture))
        most.append(sum(one() is not None for one in seen))
        return picture

    monkeypatch.setattr(type(photos), "image", image)
    job, _ = make_job(photos, tmp_path)

    def go_through(pictures):
        return {"levels": np.stack([np.float32(np.asarray(x).mean()) for x in pictures])}

    object.__setattr__(job, "encode_images", go_through)
    assert run(job).arrays["levels"].shape == (7, 2)
    assert len(most) == 7
    assert max(most) <= 2
