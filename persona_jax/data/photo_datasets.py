"""Photos of people as tfds datasets: LFW deep-funneled, a plain folder per person, portraits.

The builders store the encoded bytes unchanged in ArrayRecord files, which are read by random
access; TensorFlow is not involved. A photo that cannot be decoded is left out when the dataset is
built, so later code need not handle one.
"""

import dataclasses
import hashlib
import io
import json
import logging
import os
import pathlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Shaped
from PIL import Image
from tqdm import tqdm

from persona_jax.data import archive as lfw_archive
from persona_jax.data import captions, photo_decoding
from persona_jax.data.people_folder import LABELS, PeopleFolder, legible, list_people, some
from persona_jax.data.portraits.builder import Portraits, Settings
from persona_jax.data.portraits2.builder import Portraits2
from persona_jax.errors import UserError
from persona_jax.runtime import buckets
from persona_jax.runtime.locks import alone

log = logging.getLogger(__name__)

DRAWN = {"portraits": Portraits, "portraits2": Portraits2}
"""The data sets that a program draws."""

DATASETS = (*DRAWN, "lfw", "folder")
SPLIT = "photos"
ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD

# Person, photo number, file name inside the dataset, and encoded bytes or why there are none.
RawPhoto = tuple[str, int, str, bytes | str]


@dataclasses.dataclass(frozen=True)
class Photos:
    """All photos of a dataset, ordered by person and number; pictures are decoded on access.

    Attributes:
      people: person of each photo.
      indices: number of each photo among its person's (from 1; gaps where photos were left out).
      captions: caption of each photo.
      fingerprint: a hash of the photos and captions.
      skipped: files left out, because they cannot be decoded or are not photos.
      source: the dataset's records.
      rows: record of each photo in `source`.
    """

    people: list[str]
    indices: list[int]
    captions: list[str]
    fingerprint: str
    skipped: list[str]
    source: Sequence[Any] = dataclasses.field(repr=False)
    rows: list[int] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        """Returns the number of photos."""
        return len(self.people)

    def encoded(self, i: SupportsIndex) -> bytes:
        """Returns the encoded bytes of photo `i`, as in the archive or folder."""
        return self.source[self.rows[i]]["image"]

    def image(self, i: SupportsIndex) -> Image.Image:
        """Returns photo `i` in RGB, as :func:`persona_jax.data.photo_decoding.decode` does."""
        return photo_decoding.decode(io.BytesIO(self.encoded(i)), self.key(i))

    def has(self, name: str) -> bool:
        """Returns whether :meth:`truth` has this feature."""
        return name in self.source[self.rows[0]]

    def truth(self, name: str) -> Shaped[np.ndarray, "P ..."]:
        """A further feature of every photo, where the dataset has it: "identity" and "scene" of
        portraits (see data/portraits/traits.py), "traits" and "photo_scene" of portraits2, or their
        "full_caption" ``[P]``."""
        values = [self.source[row][name] for row in self.rows]
        return np.asarray([v.decode() if isinstance(v, bytes) else v for v in values])

    def key(self, i: SupportsIndex) -> str:
        """Returns a name of photo `i` that is unique in the dataset."""
        return f"{self.people[i]}_{self.indices[i]:04d}"


def load_photos(
    dataset: str,
    data_dir: str | pathlib.Path = "data",
    manual_dir: str | pathlib.Path | None = None,
    folder: str | pathlib.Path | None = None,
    sha256: str | None = None,
    portraits: Settings | None = None,
) -> Photos:
    """Returns the photos of a dataset; builds it on first use and after its source has changed.

    Args:
      dataset: one of :data:`DRAWN`; "lfw"; or "folder" for one folder per person
        (`folder/person/photo.jpg`).
      data_dir: folder for built datasets.
      manual_dir: of "lfw": folder of the archive (downloaded if absent) and optionally of
        `captions_meta.tsv`; `data_dir/manual` by default. Needed only to build the dataset.
      folder: of "folder": the photos; may hold a `captions_meta.tsv`.
      sha256: of "lfw": digest of one more archive to accept besides those in the manifest.
      portraits: of drawn datasets: how many people and photos to draw, their size and seed.

    Raises:
      UserError: no archive, unknown checksum, damaged archive, unknown dataset, empty folder, or a
        person with fewer than two readable photos in a folder.
    """
    data_dir = buckets.local(data_dir)
    if dataset == "lfw":
        manual = buckets.local(manual_dir or data_dir / "manual")
        return _read(_build_lfw(data_dir, manual, sha256))
    if dataset in DRAWN:
        if portraits is None:
            raise UserError(f'dataset "{dataset}": no settings given; set config.data.portraits')
        return _read(_build_drawn(data_dir, dataset, portraits))
    if dataset == "folder":
        if folder is None:
            raise UserError('dataset "folder": no folder given; set config.data.folder=DIR')
        return _read(_build_folder(data_dir, buckets.local(folder)))
    raise UserError(f"unknown dataset {dataset!r}; expected one of {', '.join(DATASETS)}")


class LfwDeepfunneled(tfds.core.GeneratorBasedBuilder):
    """Labeled Faces in the Wild, deep-funneled; includes people with a single photo."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put lfw-deepfunneled.tgz, and captions_meta.tsv if you have it, into manual_dir."
    )

    def __init__(self, *, archive_sha256: str | None = None, **kwargs: Any):
        """`archive_sha256`: digest of one more archive to accept besides those in the manifest."""
        self._archive_sha256 = archive_sha256
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, "Faces from news photographs, aligned by deep funneling.")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        manual = pathlib.Path(dl_manager.manual_dir)
        path, digest = lfw_archive.find_archive(manual, self._archive_sha256)
        source = {"archive": digest, "captions": _digest(manual / LABELS)}
        return {SPLIT: self._generate_examples(path, manual / LABELS, source)}

    def _generate_examples(
        self, path: pathlib.Path, labels: pathlib.Path, source: dict
    ) -> Iterator:
        photos, built = lfw_archive.photos(path), pathlib.Path(self.data_dir)
        yield from _examples(photos, labels, source, built, 1, {}, f"{path}: no readable photo")


class PhotoFolder(tfds.core.GeneratorBasedBuilder):
    """One folder per person, which has the person's name and holds at least two photos."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folder: str | pathlib.Path, **kwargs: Any):
        """`folder` holds one folder per person."""
        self._folder = pathlib.Path(folder)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, "Photos from a folder per person.")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {SPLIT: self._generate_examples(list_people(self._folder))}

    def _generate_examples(self, people: PeopleFolder) -> Iterator[tuple[str, dict]]:
        photos = (
            (person, number, f"{person}/{legible(path.name)}", _content(path))
            for person, paths in people.files.items()
            for number, path in enumerate(paths, start=1)
        )
        built, source = pathlib.Path(self.data_dir), {"folder": people.digest}
        left_out = people.left_out | {
            f"{person}/": "no photo in it" for person, paths in people.files.items() if not paths
        }
        yield from _examples(
            photos, self._folder / LABELS, source, built, 2, left_out, people.no_photo
        )


def _content(path: pathlib.Path) -> bytes | str:
    """Returns a file's bytes, or why it cannot be a photo."""
    why = photo_decoding.refusal(path)
    try:
        return path.read_bytes() if why is None else why
    except OSError as error:
        return error.strerror or type(error).__name__


def _info(builder: tfds.core.DatasetBuilder, description: str) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "person": tfds.features.Text(),
            "photo": tfds.features.Scalar(np.int32),
            "caption": tfds.features.Text(),
        }
    )
    return tfds.core.DatasetInfo(
        builder=builder, description=description, features=features, disable_shuffling=True
    )


def _examples(
    photos: Iterable[RawPhoto],
    labels: pathlib.Path,
    source: dict,
    built: pathlib.Path,
    least: int,
    left_out: Mapping[str, str],
    nothing: str,
) -> Iterator[tuple[str, dict]]:
    """Yields the decodable photos with captions; then writes source.json and skipped.json.

    Args:
      photos: all photos.
      labels: path of the table of labels, which may be absent.
      source: content of source.json: what the dataset was built from.
      built: folder for the two files.
      least: fewest readable photos that a person may have.
      left_out: what was left out before, and why.
      nothing: the error if no photo is readable.

    Raises:
      UserError: no photo is readable, or a person has fewer than `least`.
    """
    known = captions.read_labels(labels) if os.path.lexists(labels) else None
    skipped: dict[str, str] = {}
    counts: Counter[str] = Counter()
    seen = set()
    for person, number, file, data in tqdm(photos, desc="build photos", unit=" photos"):
        counts[person] += 0
        seen.add(captions.label_key(file))
        if isinstance(data, str):
            skipped[file] = data
            continue
        if (why := _fault(data)) is not None:
            skipped[file] = why
            continue
        counts[person] += 1
        # In a labelled dataset, a photo without a label gets an unknown expression.
        label = known.get(captions.label_key(file), ("unknown", "person")) if known else None
        yield (
            f"{person}/{number:08d}",
            {
                # Given a file object, tfds stores its bytes unchanged.
                "image": io.BytesIO(data),
                "person": person,
                "photo": number,
                "caption": captions.caption(file, label),
            },
        )
    skipped |= left_out
    if not counts.total():
        raise UserError(f"{nothing}{_because(skipped)}")
    if lonely := sorted(person for person, count in counts.items() if 0 < count < least):
        raise UserError(
            f"fewer than {least} readable photos of {some(lonely, 100)}: each person needs a "
            "reference and a target; add photos or remove the person's folder" + _because(skipped)
        )
    if known and least > 1 and (strange := sorted(known.keys() - seen)):
        log.warning("%s: %d rows name no photo: %s", labels, len(strange), some(strange))
    (built / "source.json").write_text(json.dumps(source))
    (built / "skipped.json").write_text(json.dumps(skipped, indent=1))


def _because(skipped: Mapping[str, str]) -> str:
    reasons = [f"{name} ({why.partition(';')[0]})" for name, why in skipped.items()]
    return f" (unreadable: {some(reasons, 100)})" if skipped else ""


def _fault(data: bytes) -> str | None:
    """Returns why encoded bytes are not a picture; None if all pixels can be decoded."""
    if not data:
        return "zero bytes"
    try:
        photo_decoding.decode(io.BytesIO(data))
    except photo_decoding.Unreadable as error:
        return str(error)
    return None


def _build_lfw(
    data_dir: pathlib.Path, manual: pathlib.Path, sha256: str | None
) -> tfds.core.DatasetBuilder:
    with alone(data_dir):
        builder = _opened(
            data_dir / "lfw_deepfunneled",
            lambda: LfwDeepfunneled(
                data_dir=data_dir, archive_sha256=sha256, file_format=ARRAY_RECORD
            ),
        )
        if not builder.data_path.exists():
            lfw_archive.find_archive(manual, sha256)  # fail before tfds demands the manual folder
            return _prepare(builder, manual)
        if (path := lfw_archive.local_archive(manual)) is None:
            return builder
        source = {"archive": lfw_archive.verify(path, sha256), "captions": _digest(manual / LABELS)}
        if source == json.loads((builder.data_path / "source.json").read_text()):
            return builder
        print(f"{manual} has changed since {builder.data_path} was built: building it again")
        return _prepare(builder, manual)


def _build_folder(data_dir: pathlib.Path, folder: pathlib.Path) -> tfds.core.DatasetBuilder:
    # The listing's digest is part of the path: a changed folder becomes another dataset.
    listing = list_people(folder).digest
    name = re.sub(r"[^\w.-]", "_", legible(folder.resolve().name))[:60]
    with alone(data_dir):
        place = data_dir / "folders" / f"{name}-{listing[:12]}"
        builder = _opened(
            place, lambda: PhotoFolder(data_dir=place, folder=folder, file_format=ARRAY_RECORD)
        )
        return builder if builder.data_path.exists() else _prepare(builder, None)


def _build_drawn(
    data_dir: pathlib.Path, dataset: str, settings: Settings
) -> tfds.core.DatasetBuilder:
    with alone(data_dir):
        place = data_dir / f"{dataset}-{settings.digest}"
        kind = DRAWN[dataset]
        builder = _opened(
            place, lambda: kind(data_dir=place, settings=settings, file_format=ARRAY_RECORD)
        )
        return builder if builder.data_path.exists() else _prepare(builder, None)


def _opened(
    place: pathlib.Path, make: Callable[[], tfds.core.DatasetBuilder]
) -> tfds.core.DatasetBuilder:
    """Returns the builder; first moves a built dataset away if its metadata cannot be read."""
    try:
        return make()
    except OSError:
        raise
    except Exception as error:  # tfds and protobuf raise many kinds
        if not place.exists():
            raise
        aside = place.with_name(f"{place.name}.damaged-{time.time_ns()}")
        place.rename(aside)
        print(f"{place}: damaged ({type(error).__name__}); moved to {aside}, building it again")
        return make()


def _prepare(
    builder: tfds.core.DatasetBuilder, manual: pathlib.Path | None
) -> tfds.core.DatasetBuilder:
    """Builds a dataset; tfds writes to a temporary folder and renames it when complete."""
    print(f"building {builder.name} into {builder.data_path} (once)")
    tfds.disable_progress_bar()
    builder.download_and_prepare(
        download_dir=pathlib.Path(builder._data_dir_root) / "downloads",
        download_config=tfds.download.DownloadConfig(
            manual_dir=manual,
            try_download_gcs=False,
            compute_stats=tfds.download.ComputeStatsMode.SKIP,
            download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS,
        ),
    )
    file = builder.data_path / "skipped.json"
    if skipped := json.loads(file.read_text()):
        names = some([f"{name} ({why})" for name, why in skipped.items()])
        log.warning("left out %d unreadable photos: %s; all in %s", len(skipped), names, file)
    return builder


def _read(builder: tfds.core.DatasetBuilder) -> Photos:
    try:
        source = builder.as_data_source(SPLIT, decoders={"image": tfds.decode.SkipDecoding()})
        records = [(r["person"].decode(), int(r["photo"]), r["caption"].decode()) for r in source]
        provenance = (builder.data_path / "source.json").read_text()
        skipped = list(json.loads((builder.data_path / "skipped.json").read_text()))
    except Exception as error:  # tfds and array_record raise many kinds
        raise UserError(_damage(builder, error)) from error
    rows = sorted(range(len(records)), key=lambda row: records[row][:2])
    people, numbers, texts = zip(*(records[row] for row in rows), strict=True)
    summary = json.dumps([provenance, people, numbers, texts])
    return Photos(
        people=list(people),
        indices=list(numbers),
        captions=list(texts),
        fingerprint=hashlib.sha256(summary.encode()).hexdigest(),
        skipped=skipped,
        source=source,
        rows=rows,
    )


def _damage(builder: tfds.core.DatasetBuilder, error: Exception) -> str:
    """Returns an error message: which file of a built dataset is missing or damaged, what to do."""
    files = [builder.data_path / name for name in builder.info.splits[SPLIT].filenames]
    gone = [f"{file}: missing" for file in files if not file.exists()]
    place = files[0] if len(files) == 1 else builder.data_path
    what = gone[0] if gone else f"{place}: damaged ({type(error).__name__}: {error})"
    return f"{what}; remove the folder {builder.data_path}, and it is built again"


def _digest(path: pathlib.Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
