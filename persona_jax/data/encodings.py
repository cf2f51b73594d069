"""Encode once: what the frozen towers make of every photo, computed before training and kept.

A cache is a folder of .npy files and an index.json. It gets its name only when complete, so an
interrupted run leaves nothing to trip over, and it is read by memory mapping.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, Shaped
from PIL import Image, ImageOps
from tqdm import tqdm

from persona_jax.data.locks import alone
from persona_jax.data.photos import Photos

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Encodings:
    """Memory-mapped arrays with one row a photo.

    Attributes:
      arrays: by name; [P, 2, ...] (axis 1: as it is, mirrored; [P, 1, ...] where nothing is
        mirrored) for what was made of the picture, [P, ...] for what was made of the caption.
      people: the person of each row.
    """

    arrays: dict[str, Shaped[np.ndarray, "P ..."]]
    people: list[str]


def encode_photos(
    photos: Photos,
    rows: Sequence[int] | Int[np.ndarray, " P"],
    *,
    encode_images: Callable[[list[Image.Image]], Arrays],
    encode_captions: Callable[[list[str]], Arrays],
    cache_dir: str | pathlib.Path,
    key: str,
    mirrored: bool = True,
    batch_size: int = 32,
) -> Encodings:
    """Encodes the chosen photos, or maps what an earlier run has stored.

    Args:
      rows: which photos, in the order wanted.
      encode_images: pictures to arrays of as many rows; always given 2 * batch_size pictures
        (batch_size where nothing is mirrored), so that it compiles once. Crops and sizes are
        its own business.
      encode_captions: captions to arrays of as many rows; given all of them at once.
      cache_dir: folder for caches, one subfolder each.
      key: whatever the encode functions depend on (content hashes of the towers, sizes, crop).
        The photos themselves are added here.
      mirrored: encode each photo's mirror image too.
      batch_size: photos encoded at a time.

    Returns:
      The encodings, mapped from disk.
    """
    people = [photos.people[row] for row in rows]
    key = key if mirrored else f"{key} as it is"
    name = [key, photos.fingerprint, [photos.key(row) for row in rows]]
    digest = hashlib.sha256(json.dumps(name).encode()).hexdigest()
    place = pathlib.Path(cache_dir).expanduser() / digest[:20]
    # Of several processes one encodes, and the others read what it wrote.
    with alone(place.parent, f".{place.name}.lock"):
        if place.exists():
            try:
                return Encodings(_load(place), people)
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(f"encodings {place}: damaged ({error}), encoding again", flush=True)
                shutil.rmtree(place)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".incomplete-") as temporary:
            work = pathlib.Path(temporary) / "encodings"
            work.mkdir()
            arrays = _encode_images(photos, rows, encode_images, work, mirrored, batch_size)
            for label, array in encode_captions([photos.captions[row] for row in rows]).items():
                np.save(work / f"{label}.npy", array)
                arrays[label] = array
            _write_index(work, key, arrays)
            del arrays
            _put(work, place)
        return Encodings(_load(place), people)


def _encode_images(
    photos: Photos,
    rows: Sequence[int] | Int[np.ndarray, " P"],
    encode: Callable[[list[Image.Image]], Arrays],
    work: pathlib.Path,
    mirrored: bool,
    batch_size: int,
) -> Arrays:
    """Writes [P, 2 or 1, ...] arrays to `work`, a batch at a time."""
    files: Arrays = {}
    with tqdm(total=len(rows), desc="encode photos", unit=" photos") as bar:
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            images = [photos.image(row) for row in chosen]
            # The last batch is filled up: one shape, one compilation.
            images += [images[-1]] * (batch_size - len(images))
            mirrors = [ImageOps.mirror(image) for image in images] if mirrored else []
            for label, array in encode(images + mirrors).items():
                pairs = np.stack(np.split(np.asarray(array), 1 + mirrored), axis=1)
                if label not in files:
                    files[label] = np.lib.format.open_memmap(
                        work / f"{label}.npy", "w+", pairs.dtype, (len(rows), *pairs.shape[1:])
                    )
                files[label][start : start + len(chosen)] = pairs[: len(chosen)]
            bar.update(len(chosen))
    for file in files.values():
        file.flush()
    return files


def _write_index(work: pathlib.Path, key: str, arrays: Arrays) -> None:
    shapes = {label: [list(a.shape), str(a.dtype)] for label, a in arrays.items()}
    (work / "index.json").write_text(json.dumps({"key": key, "arrays": shapes}, indent=1))


def _put(work: pathlib.Path, place: pathlib.Path) -> None:
    """Gives a finished cache its name; another machine may have been first, with the same."""
    try:
        work.rename(place)
    except OSError:
        if not place.exists():
            raise


def _load(place: pathlib.Path) -> Arrays:
    """Maps the arrays. Raises ValueError, OSError or KeyError where files are not as listed."""
    index = json.loads((place / "index.json").read_text())
    arrays = {}
    for label, (shape, dtype) in index["arrays"].items():
        array = np.load(place / f"{label}.npy", mmap_mode="r", allow_pickle=False)
        if (list(array.shape), str(array.dtype)) != (shape, dtype):
            raise ValueError(f"{label}.npy is {array.dtype}{array.shape}, not {dtype}{shape}")
        arrays[label] = array
    return arrays
