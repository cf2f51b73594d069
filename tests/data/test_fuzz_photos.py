"""Photos, masks, tables of labels and folders with random content: a result or a one-line error."""

import io
import os
import pathlib
import resource
import shutil
import sys

import numpy as np
import pytest
from files import chunk, encoded, exif_with_broken_rational, png, tiff
from hypothesis import strategies as st
from PIL import Image
from synthetic import jpeg

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from fuzz import damaged, refusal, rounds

from persona_jax.data import captions, colour, photo_decoding
from persona_jax.data.people_folder import list_people, some
from persona_jax.data.photo_datasets import load_photos
from persona_jax.errors import UserError


def photos() -> list[bytes]:
    """A file of every supported format, most of them with metadata."""
    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 256, (5, 4, 3), np.uint8)).resize((40, 32))
    icc = colour.matrix_profile(colour.ADOBE_RGB)
    exif = Image.Exif()
    exif[0x112], exif[0x10F] = 6, "maker"
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    grey16 = random.integers(0, 65536, (20, 24)).astype(np.uint16)
    alpha = smooth.copy()
    alpha.putalpha(smooth.convert("L"))
    kinds = ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP", "JPEG2000", "PPM", "PCX", "SGI"]
    about = {"exif": exif.tobytes(), "icc_profile": icc}
    with_about = {"JPEG", "PNG", "WEBP", "TIFF", "AVIF"}
    out = [encoded(smooth, kind, **(about if kind in with_about else {})) for kind in kinds]
    out += [encoded(alpha, kind) for kind in ("PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "QOI")]
    out += [
        encoded(smooth, "JPEG", progressive=True, exif=exif_with_broken_rational(6)),
        encoded(smooth.convert("CMYK"), "JPEG"),
        encoded(smooth.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        encoded(smooth.convert("LAB"), "TIFF"),
        encoded(smooth.quantize(16), "PNG", transparency=3),
        encoded(smooth.convert("1"), "TIFF", compression="group4"),
        encoded(smooth, "MPO", save_all=True, append_images=[smooth]),
        encoded(smooth, "GIF", save_all=True, append_images=[alpha]),
        encoded(smooth, "TIFF", compression="jpeg"),
        tiff(grey16),
        tiff(grey16, ">", photometric=0),
        tiff(grey16.astype(np.float32) / 65535),
        tiff(grey16.astype(np.uint32)),
        png(grey16, 0, chunk(b"tRNS", b"\0\7") + chunk(b"gAMA", b"\0\0\xb1\x8f")),
    ]
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
        out += [encoded(smooth, "HEIF", **about), encoded(alpha, "HEIF")]
    except ImportError:
        pass
    return out


def test_photos(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = {"photo": 0, "mask": 0}
    file = tmp_path / "photo"

    def check(data: bytes) -> None:
        file.write_bytes(data)
        for kind, load in (
            ("photo", photo_decoding.load_photo),
            ("mask", photo_decoding.load_mask),
        ):
            try:
                image = load(file)
                assert image.mode == {"photo": "RGB", "mask": "L"}[kind]
                assert np.asarray(image).size
                read[kind] += 1
            except UserError as error:
                refusal(error)

    rounds(check, damaged(photos()), seeds=(0, 1, 2))
    assert min(read.values()) > 50  # not all is refused
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) / 2**20 < 1  # GiB


def test_photos_of_any_bytes():
    def check(data: bytes) -> None:
        try:
            photo_decoding.decode(io.BytesIO(data))
        except photo_decoding.Unreadable as error:
            refusal(error)

    magic = st.sampled_from([data[:24] for data in photos()])
    rounds(check, st.tuples(magic, st.binary(max_size=400)).map(b"".join))


TABLE = "file\texpression\tnoun\nAnn/1.jpg\tanger\twoman\nBob/ü.jpg\tneutral\tperson\n"


def test_tables_of_labels(tmp_path):
    file = tmp_path / "captions_meta.tsv"
    tables = [TABLE.encode(code) for code in ("utf-8", "utf-8-sig", "utf-16", "latin-1")]
    tables.append(TABLE.replace("\n", "\r\n").encode())

    def check(data: bytes) -> None:
        file.write_bytes(data)
        try:
            for label in captions.read_labels(file).values():
                assert captions.caption("key", label)
        except UserError as error:
            refusal(error)

    rounds(check, st.one_of(damaged(tables), st.binary(max_size=300)), seeds=(0, 1))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "us").mkdir()
    try:
        (tmp_path / os.fsdecode(b"\xff")).mkdir()
    except OSError:
        pytest.skip("a file system of UTF-8 alone")
    return tmp_path / "us"


NAMES = st.one_of(
    st.sampled_from([b"Ann", b"a.jpg", b"captions_meta.tsv", b"\xff", b"two\nlines", b"[x] {0}"]),
    st.binary(min_size=1, max_size=20),
).map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_"))
KINDS = st.sampled_from(["photo", "empty", "text", "folder", "link", "loop", "pipe", "table"])
FILES = st.lists(st.tuples(NAMES, KINDS), max_size=4)


def make(path: bytes, kind: str) -> None:
    if os.path.lexists(path) or os.path.basename(path) in (b".", b".."):
        return
    if kind == "folder":
        os.mkdir(path)
    elif kind in ("link", "loop"):
        os.symlink(b"nowhere" if kind == "link" else os.path.basename(path), path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        contents = {"photo": jpeg(1, 1), "empty": b"", "text": b"hello", "table": TABLE.encode()}
        with open(path, "wb") as file:
            file.write(contents[kind])


def test_folders_of_people(folder, tmp_path):
    """Every file is either read or named as left out."""

    def check(people: list) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for name, files in people:
            path = os.path.join(os.fsencode(folder), name)
            if os.path.lexists(path) or name in (b".", b".."):
                continue
            os.mkdir(path)
            for file, kind in files:
                make(os.path.join(path, file), kind)
        try:
            listed = list_people(folder)
            photos = load_photos("folder", tmp_path / "data", folder=folder)
        except UserError as error:
            refusal(error)
            return
        visible = [x for x in folder.glob("*/*") if not {x.name[0], x.parent.name[0]} & {"."}]
        beside = {x for x in photos.skipped if x.count("/") == 1 and not x.endswith("/")}
        assert len(photos) + len(beside) == len(visible)
        assert some(photos.skipped).isprintable()
        assert set(photos.people) <= set(listed.files)

    good = st.lists(st.tuples(NAMES, st.just("photo")), min_size=2, max_size=3)
    people = st.lists(st.tuples(NAMES, st.one_of(FILES, good)), max_size=4)
    rounds(check, people, seeds=(0,), examples=60)
