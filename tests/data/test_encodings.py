import json

import numpy as np
import pytest
from PIL import Image, ImageOps
from synthetic import write_folder

from persona_jax.data.encodings import encode_photos
from persona_jax.data.photos import load_photos


class Encoder:
    """Small but true encodings, and a count of how often they were asked for."""

    def __init__(self):
        self.sizes = []

    def images(self, images: list[Image.Image]) -> dict[str, np.ndarray]:
        self.sizes.append(len(images))
        pixels = np.stack([np.asarray(image, np.float32) for image in images])
        return {"moments": pixels[:, ::8, ::8], "embeddings": pixels.mean((1, 2))}

    def captions(self, texts: list[str]) -> dict[str, np.ndarray]:
        return {"tokens": np.array([[len(text), 1] for text in texts], np.int32)}


@pytest.fixture
def photos(tmp_path):
    folder = write_folder(tmp_path / "people", {"Ann": 3, "Bob": 4})
    return load_photos("folder", tmp_path / "data", folder=folder)


def encode(photos, tmp_path, rows=range(7), key="towers", **options):
    encoder = Encoder()
    encodings = encode_photos(
        photos,
        rows,
        encode_images=encoder.images,
        encode_captions=encoder.captions,
        cache_dir=tmp_path / "cache",
        key=key,
        batch_size=3,
        **options,
    )
    return encodings, encoder


def test_both_orientations_of_every_photo(photos, tmp_path):
    rows = [6, 0, 2, 3, 1]
    encodings, encoder = encode(photos, tmp_path, rows)
    assert encodings.people == ["Bob", "Ann", "Ann", "Bob", "Ann"]
    assert encoder.sizes == [6, 6]
    for i, row in enumerate(rows):
        image = photos.image(row)
        for side, turned in enumerate([image, ImageOps.mirror(image)]):
            expected = np.asarray(turned, np.float32)[::8, ::8]
            np.testing.assert_array_equal(encodings.arrays["moments"][i, side], expected)
    assert encodings.arrays["embeddings"].shape == (5, 2, 3)
    assert encodings.arrays["tokens"].shape == (5, 2)
    assert all(isinstance(a, np.memmap) for a in encodings.arrays.values())


def test_second_time_from_disk_and_anew_when_anything_changes(photos, tmp_path):
    first, encoder = encode(photos, tmp_path)
    assert len(encoder.sizes) == 3
    second, encoder = encode(photos, tmp_path)
    assert encoder.sizes == []
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, second.arrays[name])
    assert encode(photos, tmp_path, key="other towers")[1].sizes
    assert encode(photos, tmp_path, rows=range(6))[1].sizes
    write_folder(tmp_path / "people", {"Cyd": 2})
    changed = load_photos("folder", tmp_path / "data", folder=tmp_path / "people")
    assert encode(changed, tmp_path, rows=range(7))[1].sizes


def cut(place):
    path = place / "moments.npy"
    path.write_bytes(path.read_bytes()[:-50])


def scramble(place):
    (place / "tokens.npy").write_bytes(b"not an array")


def lose(place):
    (place / "embeddings.npy").unlink()


def half_index(place):
    (place / "index.json").write_text((place / "index.json").read_text()[:40])


def reshape(place):
    np.save(place / "tokens.npy", np.zeros((2, 2), np.int32))


def other_index(place):
    (place / "index.json").write_text(json.dumps([1]))


@pytest.mark.parametrize("damage", [cut, scramble, lose, half_index, reshape, other_index])
def test_damaged_cache_is_made_again(photos, tmp_path, capsys, damage):
    good = {k: v.copy() for k, v in encode(photos, tmp_path)[0].arrays.items()}
    (place,) = (tmp_path / "cache").glob("[!.]*")
    damage(place)
    again, encoder = encode(photos, tmp_path)
    assert encoder.sizes
    assert "damaged" in capsys.readouterr().out
    for name, array in good.items():
        np.testing.assert_array_equal(array, again.arrays[name])


def test_nothing_is_mirrored_where_left_and_right_differ(photos, tmp_path):
    both, _ = encode(photos, tmp_path)
    once, encoder = encode(photos, tmp_path, mirrored=False)
    assert encoder.sizes == [3, 3, 3]
    for name in ("moments", "embeddings"):
        assert once.arrays[name].shape[:2] == (7, 1)
        np.testing.assert_array_equal(once.arrays[name][:, 0], both.arrays[name][:, 0])


def test_interrupted_run_leaves_nothing(photos, tmp_path):
    def fail(texts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_photos(
            photos,
            range(7),
            encode_images=Encoder().images,
            encode_captions=fail,
            cache_dir=tmp_path / "cache",
            key="towers",
        )
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]
