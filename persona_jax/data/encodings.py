"""Cached encodings: outputs of the frozen towers for every photo, computed once before training.

Photos are encoded in shards of a few hundred. A shard is a folder with ArrayRecord files and a
shard.json. It gets its final name only when complete, so an interrupted job resumes at the first
missing shard. Any number of processes, of one run or of independent jobs, may write the shards of
one folder.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int
from PIL import Image, ImageOps
from tqdm import tqdm

from persona_jax.data.photo_datasets import Photos
from persona_jax.data.photo_decoding import READING
from persona_jax.data.records import Records, Writer
from persona_jax.errors import UserError
from persona_jax.runtime import buckets, checksums, files
from persona_jax.runtime.locks import alone

SHARD = 256
"""Least number of photos in a shard (the last shard may have fewer)."""
MOST = 512
"""Largest number of shards: each keeps files open while it is read."""
LAYOUT = "shards of records, 1"
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError)
"""Exceptions raised by reading a damaged shard."""

Encoded = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Encodings:
    """Encodings of photos and captions, read from disk.

    Attributes:
      arrays: by name; [P, S, ...] for encodings of the picture (S = 2: original and mirrored; S = 1
        without mirroring), [P, ...] for encodings of the caption.
      people: the person of each row.
    """

    arrays: dict[str, Records]
    people: list[str]


@dataclasses.dataclass(frozen=True)
class EncodingJob:
    """Encodes a selection of photos into the shards of one folder.

    Attributes:
      photos: the dataset.
      rows: rows to encode, in the order of the output.
      encode_images: pictures to arrays of as many rows. It always gets 2 * batch_size pictures
        (batch_size without mirroring), so that it compiles once. It must read them in one pass,
        because they are decoded one by one. It crops and resizes them itself.
      encode_captions: captions to arrays of as many rows.
      cache_dir: folder for encodings, one subfolder for each job.
      key: everything the encode functions depend on (content hashes of the towers, sizes, crop).
        The photos' fingerprint is added to it.
      mirrored: encode each photo's mirror image too.
      batch_size: photos encoded at a time.
    """

    photos: Photos
    rows: Sequence[int] | Int[np.ndarray, " P"]
    encode_images: Callable[[Iterable[Image.Image]], Encoded]
    encode_captions: Callable[[list[str]], Encoded]
    cache_dir: str | pathlib.Path
    key: str
    mirrored: bool = True
    batch_size: int = 32

    @property
    def place(self) -> pathlib.Path:
        """The folder of the shards; its name is a hash of the photos and the key."""
        key = self.key if self.mirrored else f"{self.key} as it is"
        photos = self.photos.fingerprint, [self.photos.key(row) for row in self.rows]
        digest = hashlib.sha256(json.dumps([LAYOUT, READING, key, *photos]).encode()).hexdigest()
        return buckets.local(self.cache_dir) / digest[:20]

    @property
    def shards(self) -> dict[str, range]:
        """Range of positions in `rows` of each shard, by the name of its folder."""
        total = len(self.rows)
        size = max(SHARD, math.ceil(total / MOST))
        starts = range(0, total, size)
        return {
            f"{number:05d}-of-{len(starts):05d}": range(start, min(start + size, total))
            for number, start in enumerate(starts)
        }

    def work(self, part: int = 0, parts: int = 1) -> None:
        """Encodes the missing and damaged shards among every `parts`-th, starting with `part`.

        Raises:
          OSError: a shard cannot be written, for example because the disk is full.
        """
        place = self.place
        mine = dict(list(self.shards.items())[part::parts])
        todo = {name: span for name, span in mine.items() if fault(place / name)}
        total = sum(map(len, todo.values()))
        with tqdm(total=total, desc="encode photos", unit=" photos", disable=not todo) as bar:
            for name, span in todo.items():
                # Another process may be writing this shard: wait, then use its result.
                with alone(place, f".{name}.lock"):
                    reason = fault(place / name)
                    if (place / name).exists() and reason:
                        print(f"encodings {place / name}: {reason}, encoding again", flush=True)
                        shutil.rmtree(place / name)
                    if reason:
                        self._write(place / name, span, bar)

    def missing(self) -> list[str]:
        """Returns the names of the shards that are missing or damaged."""
        place = self.place
        return [name for name in self.shards if fault(place / name)]

    def open(self) -> Encodings:
        """Opens all encodings of the job.

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
            checksums.write(folder, ["shard.json"])  # ArrayRecord files have checksums of their own

    def _look(self, chosen: Sequence[int]) -> Encoded:
        """Encodes some photos; returns arrays ``[R, S, ...]``."""
        pictures = _pictures(self.photos, chosen, self.batch_size, self.mirrored)
        sides = 1 + self.mirrored
        out = {}
        for label, array in self.encode_images(pictures).items():
            array = np.asarray(array)
            out[label] = array.reshape(-1, sides, *array.shape[1:])[: len(chosen)]
        return out


def _pictures(
    photos: Photos, rows: Sequence[int], count: int, mirrored: bool
) -> Iterator[Image.Image]:
    """Yields photos, each followed by its mirror image if `mirrored`.

    The last of `rows` is repeated up to `count` photos: one shape, one compilation. A photo is
    decoded when it is reached, so that only one is in memory.
    """
    for i in range(count):
        if i < len(rows):
            picture = photos.image(rows[i])
        yield picture
        if mirrored:
            yield ImageOps.mirror(picture)


def encode(job: EncodingJob) -> Encodings:
    """Encodes a job's photos and returns the encodings.

    The processes of a run share the work. Without a shared disk, each process then encodes the
    shards that it does not see.
    """
    parts = jax.process_count()
    job.work(jax.process_index(), parts)
    if parts > 1:
        multihost_utils.sync_global_devices(f"encoded {job.place.name}")
        job.work()
    return job.open()


def fault(place: pathlib.Path) -> str | None:
    """Returns what is wrong with a shard; None if it is complete."""
    if not place.exists():
        return "not there"
    try:
        _listed(place)
    except DAMAGED as error:
        return f"damaged ({error})"
    return None


def _listed(place: pathlib.Path) -> dict[str, tuple[int, list[int], str]]:
    """Returns (number of leading axes, shape, dtype) of each array of a shard.

    Raises:
      ValueError, OSError, LookupError: its files are not as shard.json lists them.
    """
    if damage := checksums.fault(place, ["shard.json"]):
        raise ValueError(damage)
    contents = json.loads((place / "shard.json").read_text())
    for label in contents["arrays"]:
        size, listed = (place / label).stat().st_size, contents["bytes"][label]
        if size != listed:
            raise ValueError(f"{label} has {size} bytes, not {listed}")
    return {label: tuple(about) for label, about in contents["arrays"].items()}
