"""Encode once: what the frozen towers make of every photo, computed before training and kept.

Photos are encoded in shards of a few hundred. A shard is a folder of ArrayRecord files and a
shard.json; it gets its name only when complete, so an interrupted job leaves nothing to trip over
and goes on with the first shard that is not there. Any number of processes, of one run or of jobs
that know nothing of each other, may work on the shards of one place.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int
from PIL import Image, ImageOps
from tqdm import tqdm

from persona_jax.data.photo_files import READING
from persona_jax.data.photos import Photos
from persona_jax.data.records import Records, Writer
from persona_jax.errors import UserError
from persona_jax.runtime import buckets, checksums, files
from persona_jax.runtime.locks import alone

SHARD = 256
"""Photos of a shard, at least."""
MOST = 512
"""Shards at most: each is an open file while it is read."""
LAYOUT = "shards of records, 1"
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)
"""What reading a shard that is not as it was written raises."""

Encoded = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Encodings:
    """What was made of the photos, read from disk.

    Attributes:
      arrays: by name; [P, S, ...] (S is 2: as it is, mirrored; 1 where nothing is mirrored) for
        what was made of the picture, [P, ...] for what was made of the caption.
      people: the person of each row.
    """

    arrays: dict[str, Records]
    people: list[str]


@dataclasses.dataclass(frozen=True)
class EncodingJob:
    """The encoding of some photos, as shards of a place that is theirs alone.

    Attributes:
      photos: all of them.
      rows: which to encode, in the order wanted.
      encode_images: pictures to arrays of as many rows; always given 2 * batch_size pictures
        (batch_size where nothing is mirrored), so that it compiles once, and to be gone through
        once: they are decoded one by one. Crops and sizes are its own business.
      encode_captions: captions to arrays of as many rows.
      cache_dir: folder for encodings, one subfolder for each job.
      key: whatever the encode functions depend on (content hashes of the towers, sizes, crop).
        The photos themselves are added here.
      mirrored: encode each photo's mirror image too.
      batch_size: photos encoded at a time.
    """

    photos: Photos
    rows: Sequence[int] | Int[np.ndarray, " P"]
    encode_images: Callable[[Sequence[Image.Image]], Encoded]
    encode_captions: Callable[[list[str]], Encoded]
    cache_dir: str | pathlib.Path
    key: str
    mirrored: bool = True
    batch_size: int = 32

    @property
    def place(self) -> pathlib.Path:
        """The folder of the shards; its name stands for the photos and the key."""
        key = self.key if self.mirrored else f"{self.key} as it is"
        photos = self.photos.fingerprint, [self.photos.key(row) for row in self.rows]
        digest = hashlib.sha256(json.dumps([LAYOUT, READING, key, *photos]).encode()).hexdigest()
        return buckets.local(self.cache_dir) / digest[:20]

    @property
    def shards(self) -> dict[str, range]:
        """Places in `rows` of each shard, by the name of its folder."""
        total = len(self.rows)
        size = max(SHARD, math.ceil(total / MOST))
        starts = range(0, total, size)
        return {
            f"{number:05d}-of-{len(starts):05d}": range(start, min(start + size, total))
            for number, start in enumerate(starts)
        }

    def work(self, part: int = 0, parts: int = 1) -> None:
        """Encodes those shards of every `parts`-th, beginning with number `part`, that are not
        there yet, or damaged.

        Raises:
          OSError: the disk is full, say.
        """
        place = self.place
        mine = dict(list(self.shards.items())[part::parts])
        todo = {name: span for name, span in mine.items() if fault(place / name)}
        total = sum(map(len, todo.values()))
        with tqdm(total=total, desc="encode photos", unit=" photos", disable=not todo) as bar:
            for name, span in todo.items():
                # Another process may be at it: it is waited for, and what it wrote is taken.
                with alone(place, f".{name}.lock"):
                    found = fault(place / name)
                    if (place / name).exists() and found:
                        print(f"encodings {place / name}: {found}, encoding again", flush=True)
                        shutil.rmtree(place / name)
                    if found:
                        self._write(place / name, span, bar)

    def missing(self) -> list[str]:
        """Shards that are not there, or damaged."""
        place = self.place
        return [name for name in self.shards if fault(place / name)]

    def open(self) -> Encodings:
        """All that was encoded.

        Raises:
          UserError: a shard is missing or damaged.
        """
        place, folders = self.place, list(self.shards)
        try:
            listed = [_listed(place / name) for name in folders]
            if any(one.keys() != listed[0].keys() for one in listed):
                raise ValueError("shards of different arrays")
            arrays = {}
            for label, (leading, (_, *shape), dtype) in listed[0].items():
                files = [place / name / label for name in folders]
                arrays[label] = Records(files, (len(self.rows), *shape), dtype, leading)
        except DAMAGED as error:
            raise UserError(
                f"encodings {place}: damaged ({error}); delete that folder and run again"
            ) from error
        return Encodings(arrays, [self.photos.people[row] for row in self.rows])

    def _write(self, place: pathlib.Path, span: range, bar: tqdm) -> None:
        """Encodes one shard."""
        rows = [int(self.rows[i]) for i in span]
        with files.whole_folder(place) as folder, contextlib.ExitStack() as open_files:
            writers: dict[str, Writer] = {}
            listed = {}

            def append(label: str, array: np.ndarray, leading: int) -> None:
                if label not in writers:
                    writers[label] = open_files.enter_context(Writer(folder / label))
                    listed[label] = [leading, [len(rows), *array.shape[1:]], str(array.dtype)]
                writers[label].append(array.reshape(-1, *array.shape[leading:]))

            for start in range(0, len(rows), self.batch_size):
                chosen = rows[start : start + self.batch_size]
                for label, pairs in self._look(chosen).items():
                    append(label, pairs, 2)
                bar.update(len(chosen))
            captions = [self.photos.captions[row] for row in rows]
            for label, array in self.encode_captions(captions).items():
                append(label, np.asarray(array), 1)
            open_files.close()
            sizes = {label: (folder / label).stat().st_size for label in listed}
            text = json.dumps({"arrays": listed, "bytes": sizes}, indent=1)
            (folder / "shard.json").write_text(text)
            checksums.write(folder, ["shard.json"])  # the arrays' records have their own

    def _look(self, chosen: Sequence[int]) -> Encoded:
        """``[R, S, ...]`` of some photos."""
        pictures, sides = (
            _Pictures(self.photos, chosen, self.batch_size, self.mirrored),
            1 + self.mirrored,
        )
        out = {}
        for label, array in self.encode_images(pictures).items():
            array = np.asarray(array)
            out[label] = array.reshape(-1, sides, *array.shape[1:])[: len(chosen)]
        return out


class _Pictures(Sequence):
    """Photos, each followed by its mirror image where there is one; decoded when it is their turn,
    so that of large ones one is in memory."""

    def __init__(self, photos: Photos, rows: Sequence[int], count: int, mirrored: bool):
        """`count` photos: the last of `rows` fills up (one shape, one compilation)."""
        self._photos, self._sides = photos, 1 + mirrored
        self._rows = [*rows, *[rows[-1]] * (count - len(rows))]
        self._held: tuple[int, Image.Image] | None = None

    def __len__(self) -> int:
        return len(self._rows) * self._sides

    def __getitem__(self, i: int) -> Image.Image:
        row = self._rows[i // self._sides]
        if self._held is None or self._held[0] != row:
            self._held = row, self._photos.image(row)
        return ImageOps.mirror(self._held[1]) if i % self._sides else self._held[1]


def encode(job: EncodingJob) -> Encodings:
    """All of a job's encodings; the processes of a run share the work, and those without a common
    disk do what they do not see done."""
    parts = jax.process_count()
    job.work(jax.process_index(), parts)
    if parts > 1:
        multihost_utils.sync_global_devices(f"encoded {job.place.name}")
        job.work()
    return job.open()


def fault(place: pathlib.Path) -> str | None:
    """What is wrong with a shard; None where it is whole."""
    if not place.exists():
        return "not there"
    try:
        _listed(place)
    except DAMAGED as error:
        return f"damaged ({error})"
    return None


def _listed(place: pathlib.Path) -> dict[str, tuple[int, list[int], str]]:
    """(leading axes, shape, dtype) of a shard's arrays. Raises ValueError, OSError or LookupError
    where its files are not as listed."""
    if damage := checksums.fault(place, ["shard.json"]):
        raise ValueError(damage)
    found = json.loads((place / "shard.json").read_text())
    for label in found["arrays"]:
        size, listed = (place / label).stat().st_size, found["bytes"][label]
        if size != listed:
            raise ValueError(f"{label} has {size} bytes, not {listed}")
    return {label: tuple(about) for label, about in found["arrays"].items()}
