"""Photos of people as tfds datasets: LFW deep-funneled, a plain folder per person, portraits.

The builders store the encoded bytes they were given, in ArrayRecord files, and are read by
random access; TensorFlow is not involved. A photo that cannot be decoded is left out when the
dataset is built, so nothing later meets one.
"""

import dataclasses
import hashlib
import io
import json
import logging
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Shaped
from PIL import Image
from tqdm import tqdm

from persona_jax.data import archive as lfw_archive
from persona_jax.data import captions, images
from persona_jax.data.portraits.builder import Portraits, Settings
from persona_jax.errors import UserError
from persona_jax.runtime import buckets
from persona_jax.runtime.locks import alone

log = logging.getLogger(__name__)

DATASETS = ("portraits", "lfw", "folder")
LABELS = "captions_meta.tsv"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic"}
SPLIT = "photos"
ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD

# Person, photo number, file name inside the dataset, encoded bytes.
RawPhoto = tuple[str, int, str, bytes]


@dataclasses.dataclass(frozen=True)
class Photos:
    """Every photo of a dataset, ordered by person and number; pictures are read when asked for.

    Attributes:
      people: person of each photo.
      indices: its number among that person's photos (1-based; gaps where photos were left out).
      captions: its caption.
      fingerprint: changes whenever the photos or captions do.
      skipped: files left out because they could not be decoded.
    """

    people: list[str]
    indices: list[int]
    captions: list[str]
    fingerprint: str
    skipped: list[str]
    source: Sequence[Any] = dataclasses.field(repr=False)
    rows: list[int] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        """How many photos."""
        return len(self.people)

    def encoded(self, i: SupportsIndex) -> bytes:
        """The bytes of photo `i`, as they were in the archive or folder."""
        return self.source[self.rows[i]]["image"]

    def image(self, i: SupportsIndex) -> Image.Image:
        """Photo `i` in RGB, turned the way EXIF says."""
        return images.decode(self.encoded(i))

    def has(self, name: str) -> bool:
        """Whether :meth:`truth` knows of this feature."""
        return name in self.source[self.rows[0]]

    def truth(self, name: str) -> Shaped[np.ndarray, "P ..."]:
        """A further feature of every photo, where the dataset has it: "identity" and "scene" of
        portraits (see data/portraits/traits.py), or their "full_caption" ``[P]``."""
        values = [self.source[row][name] for row in self.rows]
        return np.asarray([v.decode() if isinstance(v, bytes) else v for v in values])

    def key(self, i: SupportsIndex) -> str:
        """A name for photo `i` that is unique in the dataset."""
        return f"{self.people[i]}_{self.indices[i]:04d}"


def load_photos(
    dataset: str,
    data_dir: str | pathlib.Path = "data",
    manual_dir: str | pathlib.Path | None = None,
    folder: str | pathlib.Path | None = None,
    sha256: str | None = None,
    portraits: Settings | None = None,
) -> Photos:
    """Photos of a dataset, built on first use and whenever its source has changed.

    Args:
      dataset: "portraits", drawn by a program; "lfw"; or "folder" for one folder per person
        (`folder/person/photo.jpg`).
      data_dir: where built datasets are kept.
      manual_dir: "lfw": where the archive is or is to be downloaded to, and optionally
        `captions_meta.tsv`; `data_dir/manual` by default. A built dataset needs it no more.
      folder: "folder": the photos; may hold a `captions_meta.tsv` of its own.
      sha256: "lfw": digest of one more archive to accept beside those in third_party/.
      portraits: "portraits": who to draw.

    Raises:
      UserError: no archive, unknown checksum, damaged archive, unknown dataset, empty folder, a
        person with fewer than two readable photos in a folder.
    """
    data_dir = buckets.local(data_dir)
    if dataset == "lfw":
        manual = buckets.local(manual_dir or data_dir / "manual")
        return _read(_build_lfw(data_dir, manual, sha256))
    if dataset == "portraits":
        return _read(_build_portraits(data_dir, portraits))
    if dataset == "folder":
        if folder is None:
            raise UserError('dataset "folder": no folder given; set --config.data.folder=DIR')
        return _read(_build_folder(data_dir, buckets.local(folder)))
    raise UserError(f"unknown dataset {dataset!r}; expected one of {', '.join(DATASETS)}")


class LfwDeepfunneled(tfds.core.GeneratorBasedBuilder):
    """Labeled Faces in the Wild, deep-funneled; singles included."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put lfw-deepfunneled.tgz, and captions_meta.tsv if you have it, into manual_dir."
    )

    def __init__(self, *, archive_sha256: str | None = None, **kwargs: Any):
        """`archive_sha256`: digest of one more archive to accept beside those in third_party/."""
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
        photos = lfw_archive.photos(path)
        yield from _examples(photos, labels, source, pathlib.Path(self.data_dir), least=1)


class PhotoFolder(tfds.core.GeneratorBasedBuilder):
    """A folder per person, named after them, with two photos or more in each."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folder: str | pathlib.Path, **kwargs: Any):
        """`folder` holds one folder per person."""
        self._folder = pathlib.Path(folder)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, "Photos from a folder per person.")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        files = _folder_files(self._folder)
        return {SPLIT: self._generate_examples(files, {"folder": _listing(self._folder, files)})}

    def _generate_examples(
        self, files: dict[str, list[pathlib.Path]], source: dict
    ) -> Iterator[tuple[str, dict]]:
        labels = self._folder / LABELS
        photos = (
            (person, number, f"{person}/{path.name}", path.read_bytes())
            for person, paths in files.items()
            for number, path in enumerate(paths, start=1)
        )
        yield from _examples(photos, labels, source, pathlib.Path(self.data_dir), least=2)


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
) -> Iterator[tuple[str, dict]]:
    """Yields the decodable photos with captions; then notes beside them what was left out.

    Raises:
      UserError: a person is left with fewer than `least` photos.
    """
    known = captions.read_labels(labels) if labels.is_file() else None
    skipped, counts = [], Counter()
    for person, number, file, data in tqdm(photos, desc="build photos", unit=" photos"):
        counts[person] += 0
        if not _decodes(data):
            skipped.append(file)
            continue
        counts[person] += 1
        # An unlabelled photo of a labelled dataset is a person with no expression to speak of.
        label = known.get(file, ("unknown", "person")) if known else None
        yield (
            f"{person}/{number:08d}",
            {
                # A file object: tfds stores its bytes as they are.
                "image": io.BytesIO(data),
                "person": person,
                "photo": number,
                "caption": captions.caption(file, label),
            },
        )
    if not counts.total():
        raise UserError(f"no readable photo found (unreadable: {len(skipped)}); {source}")
    if lonely := sorted(person for person, count in counts.items() if count < least):
        raise UserError(
            f"fewer than {least} readable photos of {_some(lonely)}: each person needs one to "
            "learn from and one to paint; add photos or take the person's folder away"
            + (f" (unreadable: {_some(skipped)})" if skipped else "")
        )
    if skipped:
        log.warning("left out %d unreadable photos: %s", len(skipped), _some(skipped))
    (built / "source.json").write_text(json.dumps(source))
    (built / "skipped.json").write_text(json.dumps(skipped, indent=1))


def _decodes(data: bytes) -> bool:
    """Whether PIL can both verify the file's structure and decode all its pixels."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
        images.decode(data)
    except images.UNREADABLE:
        return False
    return True


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


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
            lfw_archive.find_archive(manual, sha256)  # Before tfds asks for the folder.
            return _prepare(builder, manual)
        if (path := lfw_archive.local_archive(manual)) is None:
            return builder
        found = {"archive": lfw_archive.verify(path, sha256), "captions": _digest(manual / LABELS)}
        if found == json.loads((builder.data_path / "source.json").read_text()):
            return builder
        print(f"{manual} has changed since {builder.data_path} was built: building it again")
        return _prepare(builder, manual)


def _build_folder(data_dir: pathlib.Path, folder: pathlib.Path) -> tfds.core.DatasetBuilder:
    # A changed folder is another dataset: the digest of its listing is part of the path.
    listing = _listing(folder, _folder_files(folder))
    with alone(data_dir):
        place = data_dir / "folders" / f"{folder.resolve().name}-{listing[:12]}"
        builder = _opened(
            place, lambda: PhotoFolder(data_dir=place, folder=folder, file_format=ARRAY_RECORD)
        )
        return builder if builder.data_path.exists() else _prepare(builder, None)


def _build_portraits(data_dir: pathlib.Path, settings: Settings) -> tfds.core.DatasetBuilder:
    with alone(data_dir):
        place = data_dir / f"portraits-{settings.digest}"
        builder = _opened(
            place, lambda: Portraits(data_dir=place, settings=settings, file_format=ARRAY_RECORD)
        )
        return builder if builder.data_path.exists() else _prepare(builder, None)


def _opened(
    place: pathlib.Path, make: Callable[[], tfds.core.DatasetBuilder]
) -> tfds.core.DatasetBuilder:
    """The builder; where what it built says nothing any more, that is moved away first."""
    try:
        return make()
    except OSError:
        raise
    except Exception as error:  # of tfds' and protobuf's kinds
        if not place.exists():
            raise
        aside = place.with_name(f"{place.name}.damaged-{time.time_ns()}")
        place.rename(aside)
        print(f"{place}: damaged ({type(error).__name__}); moved to {aside}, building it again")
        return make()


def _prepare(
    builder: tfds.core.DatasetBuilder, manual: pathlib.Path | None
) -> tfds.core.DatasetBuilder:
    """Builds into a temporary folder that takes its name at the end: all or nothing."""
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
    return builder


def _read(builder: tfds.core.DatasetBuilder) -> Photos:
    try:
        source = builder.as_data_source(SPLIT, decoders={"image": tfds.decode.SkipDecoding()})
        records = [(r["person"].decode(), int(r["photo"]), r["caption"].decode()) for r in source]
        provenance = (builder.data_path / "source.json").read_text()
        skipped = json.loads((builder.data_path / "skipped.json").read_text())
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
    """Which file of a built dataset is missing or damaged, and what to do."""
    files = [builder.data_path / name for name in builder.info.splits[SPLIT].filenames]
    gone = [f"{file}: missing" for file in files if not file.exists()]
    place = files[0] if len(files) == 1 else builder.data_path
    what = gone[0] if gone else f"{place}: damaged ({type(error).__name__}: {error})"
    return f"{what}; remove the folder {builder.data_path}, and it is built again"


def _folder_files(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Photo files per person, sorted."""
    if not folder.is_dir():
        raise UserError(f"photo folder {folder}: no such folder; expected PERSON/PHOTO.jpg in it")
    people = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = {
        person.name: sorted(
            path
            for path in person.iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        )
        for person in people
    }
    if not files:
        raise UserError(f"photo folder {folder}: no folder per person; expected PERSON/PHOTO.jpg")
    return files


def _listing(folder: pathlib.Path, files: dict[str, list[pathlib.Path]]) -> str:
    """Digest of the folder's files: name, size and time of change of each."""
    paths = [folder / LABELS, *(path for paths in files.values() for path in paths)]
    stats = [(path, path.stat()) for path in paths if path.exists()]
    entries = [(str(p.relative_to(folder)), s.st_size, s.st_mtime_ns) for p, s in stats]
    return hashlib.sha256(json.dumps([entries, list(files)]).encode()).hexdigest()


def _digest(path: pathlib.Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
