import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import threading
import unicodedata
import zipfile
from collections import Counter

import pytest
from files import exif_with_broken_rational
from PIL import Image
from synthetic import PEOPLE, SHARED, jpeg, write_folder, write_tgz

from persona_jax.data import assets
from persona_jax.data.photo_datasets import load_photos
from persona_jax.errors import UserError
from persona_jax.runtime.locks import alone


def sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listing(path: pathlib.Path) -> list[str]:
    return [str(p) for p in path.rglob("*") if p.is_file() and p.name != ".lock"]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A manifest whose mirrors are two local files, absent unless a test writes them."""
    asset = {
        "title": "LFW",
        "files": ["lfw-deepfunneled.tgz", "lfw-deepfunneled.zip"],
        "mirrors": [f"file://{tmp_path}/web{i}/lfw-deepfunneled.tgz" for i in (1, 2)],
        "accepted": [],
    }
    monkeypatch.setattr(assets, "manifest", lambda: {"lfw_deepfunneled": asset})
    return asset


def test_reads_back_identical_bytes_in_order(tmp_path, lfw_photos, capsys):
    path = write_tgz(tmp_path / "m/lfw-deepfunneled.tgz", dict(reversed(lfw_photos.items())))
    photos = load_photos("lfw", tmp_path / "d", tmp_path / "m", sha256=sha256(path))
    assert len(photos) == 6
    assert Counter(photos.people) == PEOPLE
    assert [f"{photos.people[i]}/{photos.key(i)}.jpg" for i in range(6)] == sorted(lfw_photos)
    assert [photos.encoded(i) for i in range(6)] == [lfw_photos[k] for k in sorted(lfw_photos)]
    assert photos.image(0).mode == "RGB"
    assert set(photos.captions) == {"a photo of a person"}
    assert "building" in capsys.readouterr().out

    path.unlink()  # A built dataset does not need its archive.
    again = load_photos("lfw", tmp_path / "d", tmp_path / "elsewhere")
    assert again.fingerprint == photos.fingerprint
    assert "building" not in capsys.readouterr().out


def test_zip_with_a_folder_too_many(tmp_path, lfw_photos):
    path = tmp_path / "m/lfw-deepfunneled.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("__MACOSX/._Ann_Lee_0001.jpg", b"junk")
        for name, data in lfw_photos.items():
            file.writestr(f"lfw-deepfunneled/lfw-deepfunneled/{name}", data)
    photos = load_photos("lfw", tmp_path / "d", tmp_path / "m", sha256=sha256(path))
    assert [photos.encoded(i) for i in range(6)] == [lfw_photos[k] for k in sorted(lfw_photos)]


def test_labels_make_captions_and_a_changed_table_a_new_build(tmp_path, lfw_photos):
    path = write_tgz(tmp_path / "m/lfw-deepfunneled.tgz", lfw_photos)
    plain = load_photos("lfw", tmp_path / "d", tmp_path / "m", sha256=sha256(path))
    table = tmp_path / "m/captions_meta.tsv"
    table.write_text("file\texpression\tnoun\nAnn_Lee/Ann_Lee_0002.jpg\tanger\twoman\n")
    labelled = load_photos("lfw", tmp_path / "d", tmp_path / "m", sha256=sha256(path))
    row = next(i for i in range(6) if labelled.key(i) == "Ann_Lee_0002")
    assert "woman" in labelled.captions[row]
    assert "angry" in labelled.captions[row]
    assert all(c.endswith(" a person") for i, c in enumerate(labelled.captions) if i != row)
    assert labelled.fingerprint != plain.fingerprint


def test_unreadable_photos_are_left_out_counted_and_named(tmp_path, lfw_photos, caplog):
    lfw_photos["Ann_Lee/Ann_Lee_0002.jpg"] = b""
    lfw_photos["Bo_Van_Dyk/Bo_Van_Dyk_0001.jpg"] = jpeg(1, 1)[:400]
    path = write_tgz(tmp_path / "m/lfw-deepfunneled.tgz", lfw_photos)
    photos = load_photos("lfw", tmp_path / "d", tmp_path / "m", sha256=sha256(path))
    assert len(photos) == 4
    assert photos.skipped == ["Ann_Lee/Ann_Lee_0002.jpg", "Bo_Van_Dyk/Bo_Van_Dyk_0001.jpg"]
    assert "left out 2 unreadable photos: Ann_Lee/Ann_Lee_0002.jpg" in caplog.text
    assert photos.key(1) == "Ann_Lee_0003"


def test_no_archive_says_where_to_get_it_and_where_to_put_it(tmp_path, offline):
    with pytest.raises(UserError) as error:
        load_photos("lfw", tmp_path / "d", tmp_path / "m")
    message = str(error.value)
    assert offline["mirrors"][0] in message
    assert str(tmp_path / "m") in message
    assert "\n" not in message
    assert not listing(tmp_path)


def test_downloads_from_the_first_mirror_whose_file_verifies(tmp_path, lfw_photos, offline):
    (tmp_path / "web1").mkdir()
    (tmp_path / "web1/lfw-deepfunneled.tgz").write_bytes(b"a page that says sorry")
    good = write_tgz(tmp_path / "web2/lfw-deepfunneled.tgz", lfw_photos)
    offline["accepted"].append("md5:" + hashlib.md5(good.read_bytes()).hexdigest())
    assert len(load_photos("lfw", tmp_path / "d")) == 6
    manual = tmp_path / "d/manual"
    assert [p.name for p in manual.iterdir()] == ["lfw-deepfunneled.tgz"]


def test_unknown_checksum_names_the_hash_and_the_flag(tmp_path, lfw_photos):
    path = write_tgz(tmp_path / "m/lfw-deepfunneled.tgz", lfw_photos)
    with pytest.raises(UserError, match=f"config.data.archive_sha256={sha256(path)}"):
        load_photos("lfw", tmp_path / "d", tmp_path / "m")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.97])
def test_truncated_archive_leaves_nothing(tmp_path, lfw_photos, keep):
    path = write_tgz(tmp_path / "m/lfw-deepfunneled.tgz", lfw_photos)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UserError, match=r"lfw-deepfunneled.tgz: truncated or damaged"):
        load_photos("lfw", tmp_path / "d", tmp_path / "m", sha256=sha256(path))
    assert not listing(tmp_path / "d")


def test_folder_formats_exif_and_rebuild_on_change(tmp_path):
    folder = write_folder(tmp_path / "us", {"Ann": 2, "Zoë": 2})
    turned = Image.new("RGB", (30, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "Ann/3.jpg", exif=exif)
    Image.new("RGBA", (8, 8)).save(folder / "Ann/4.PNG")
    Image.new("L", (8, 8)).save(folder / "Ann/5.webp")
    (folder / "Ann/notes.txt").write_text("not a photo")
    (folder / "Ann/.hidden.jpg").write_bytes(b"")
    photos = load_photos("folder", tmp_path / "d", folder=folder)
    assert Counter(photos.people) == {"Ann": 5, "Zoë": 2}
    assert photos.indices == [1, 2, 3, 4, 5, 1, 2]
    assert photos.image(2).size == (20, 30)
    assert {photos.image(i).mode for i in range(7)} == {"RGB"}
    for i, name in enumerate(["1.jpg", "2.jpg", "3.jpg", "4.PNG", "5.webp"]):
        assert photos.encoded(i) == (folder / "Ann" / name).read_bytes()

    again = load_photos("folder", tmp_path / "d", folder=folder)
    assert again.fingerprint == photos.fingerprint
    (folder / "Zoë/3.jpg").write_bytes(jpeg(5, 5))
    assert len(load_photos("folder", tmp_path / "d", folder=folder)) == 8


def test_folder_names_everyone_with_fewer_than_two_readable_photos(tmp_path):
    folder = write_folder(tmp_path / "us", {"Ann": 2, "Bob": 1, "Cyd": 2, "Dee": 0})
    (folder / "Cyd/2.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"fewer than 2 .* of Bob, Cyd.*unreadable: Cyd/2.jpg"):
        load_photos("folder", tmp_path / "d", folder=folder)
    assert not listing(tmp_path / "d")


@pytest.mark.parametrize(
    "suffix", ["jfif", "jpe", "JPG", "mpo", "heif", "HEIC", "jp2", "png", "", "txt"]
)
def test_content_decides_what_is_a_photo(tmp_path, suffix):
    kinds = {"mpo": "MPO", "heif": "HEIF", "HEIC": "HEIF", "jp2": "JPEG2000"}
    pytest.importorskip("pillow_heif").register_heif_opener()
    folder = write_folder(tmp_path / "us", {"Ann": 2})
    (folder / "Bob").mkdir()
    for number in range(2):
        image = Image.new("RGB", (16, 16), (90 * number, 9, 9))
        image.save(folder / f"Bob/{number}.{suffix}", kinds.get(suffix, "JPEG"))
    photos = load_photos("folder", tmp_path / "d", folder=folder)
    assert Counter(photos.people) == {"Ann": 2, "Bob": 2}
    assert photos.skipped == []


def test_all_that_is_left_out_of_a_folder_is_named(tmp_path, caplog):
    folder = write_folder(tmp_path / "us", {"Ann": 3, "Bob": 2, "Dee": 0})
    (folder / "Ann/2.jpg").write_bytes(exif_with_broken_rational(6))
    (folder / "Ann/3.jpg").unlink()
    Image.new("RGB", (9, 6)).save(folder / "Ann/3.jpg", exif=exif_with_broken_rational(6))
    (folder / "Ann/film.mov").write_bytes(b"no photo")
    (folder / "Ann/4.jpg").mkdir()
    (folder / "Ann/5.jpg").symlink_to("nowhere")
    (folder / "Ann/6.jpg").symlink_to("6.jpg")
    os.mkfifo(folder / "Ann/7.jpg")
    (folder / "Ann/up").symlink_to("..")
    (folder / "loose.jpg").write_bytes(jpeg(0, 1))
    (folder / "Eve").symlink_to("Eve")
    photos = load_photos("folder", tmp_path / "d", folder=folder)
    assert Counter(photos.people) == {"Ann": 2, "Bob": 2}
    assert photos.image(1).size == (6, 9)
    within = {
        f"Ann/{name}" for name in ("2.jpg", "film.mov", "4.jpg", "5.jpg", "6.jpg", "7.jpg", "up")
    }
    assert set(photos.skipped) == within | {"Dee/", "loose.jpg", "Eve"}
    (file,) = (tmp_path / "d").rglob("skipped.json")
    assert "left out 10 unreadable photos: Ann/2.jpg (" in caplog.text
    assert f"all in {file}" in caplog.text
    assert json.loads(file.read_text())["Ann/4.jpg"] == "a folder"


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "us", {"Ann": 2, "Bob": 2})
    whole = pathlib.Path.iterdir

    def refuse(path):
        if path.name == "Bob":
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    photos = load_photos("folder", tmp_path / "d", folder=folder)
    assert set(photos.people) == {"Ann"}
    assert photos.skipped[0] == "Bob"


def test_photos_that_lie_deeper_are_not_mixed_up(tmp_path):
    write_folder(tmp_path / "us/people", {"Ann": 2, "Bob": 2})
    place = tmp_path / "us"
    with pytest.raises(UserError, match=rf"deeper.*config.data.folder={place}/people") as error:
        load_photos("folder", tmp_path / "d", folder=place)
    assert len(str(error.value)) < 500


def test_names_that_are_not_utf8(tmp_path):
    """Two people whose names differ in such a byte stay distinct."""
    try:
        for name in (b"J\xfcrgen", b"J\xf6rgen"):
            write_folder(tmp_path / "us [1]", {os.fsdecode(name): 2})
        (tmp_path / "us [1]" / os.fsdecode(b"J\xfcrgen/\xff.txt")).write_text("no photo")
    except OSError:
        pytest.skip("a file system of UTF-8 alone")
    photos = load_photos("folder", tmp_path / "d", folder=tmp_path / "us [1]")
    assert Counter(photos.people) == {"J%F6rgen": 2, "J%FCrgen": 2}
    assert photos.skipped == ["J%FCrgen/%FF.txt"]


def test_rows_that_name_no_photo_are_said(tmp_path, caplog):
    folder = write_folder(tmp_path / "us", {"Zoë": 2})
    rows = ["file\texpression\tnoun", "Zoë/1.jpg\tanger\twoman", "Zoe/2.jpg\tanger\twoman"]
    text = unicodedata.normalize("NFD", "\n".join(rows))
    (folder / "captions_meta.tsv").write_bytes(text.encode("utf-16"))
    photos = load_photos("folder", tmp_path / "d", folder=folder)
    assert "woman" in photos.captions[0]
    assert "1 rows name no photo: Zoe/2.jpg" in caplog.text


def test_folder_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"config.data.folder"):
        load_photos("folder", tmp_path)
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        load_photos("folder", tmp_path, folder=tmp_path / "nowhere")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/1.jpg").write_bytes(jpeg(0, 1))
    with pytest.raises(UserError, match=r"no folder per person"):
        load_photos("folder", tmp_path, folder=tmp_path / "flat")
    with pytest.raises(UserError, match=r"'faces'.*lfw, folder"):
        load_photos("faces", tmp_path)


def test_neither_tensorflow_nor_torch_nor_network(tmp_path, lfw_photos):
    """A fake TensorFlow on the path would be imported if anything tried to."""
    path = write_tgz(tmp_path / "m/lfw-deepfunneled.tgz", lfw_photos)
    write_folder(tmp_path / "us", {"Ann": 2})
    (tmp_path / "fake/tensorflow").mkdir(parents=True)
    (tmp_path / "fake/tensorflow/__init__.py").write_text("raise SystemExit('tensorflow')")
    code = f"""
        import socket, sys
        def refuse(*a, **k):
            raise SystemExit("network")
        socket.create_connection = socket.getaddrinfo = socket.socket.connect = refuse
        from persona_jax.data.photo_datasets import load_photos
        from persona_jax.data import encodings, loader, splits
        a = load_photos("lfw", {str(tmp_path / "d")!r}, {str(tmp_path / "m")!r},
                        sha256={sha256(path)!r})
        b = load_photos("folder", {str(tmp_path / "d")!r}, folder={str(tmp_path / "us")!r})
        assert (len(a), len(b)) == (6, 2), (len(a), len(b))
        a.image(5), b.image(1)
        assert not {{"tensorflow", "torch"}} & set(sys.modules)
        print("clean")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": str(tmp_path / "fake"), "HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.endswith("clean\n"), done.stdout + done.stderr


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/lfw, the LFW archive")
def test_real_lfw(tmp_path_factory):
    photos = load_photos("lfw", tmp_path_factory.mktemp("lfw"), SHARED / "lfw")
    counts = Counter(photos.people)
    assert len(photos) == 12_916
    assert len(counts) == 5_731
    assert sum(count >= 10 for count in counts.values()) == 140
    assert photos.skipped == []
    for i in range(0, len(photos), 1000):
        assert photos.image(i).size == (250, 250)
    # No part of a name is in a caption: captions use a short list of words only.
    words = {word for caption in photos.captions for word in caption.split()}
    assert len(words) < 40
    names = {person.replace("_", " ") for person in counts}
    assert not any(name in caption for name in names for caption in set(photos.captions))


def test_manifest_is_one_file_seen_from_both_places():
    root = pathlib.Path(assets.__file__).parents[2]
    link = root / "third_party/manifest.toml"
    if not link.exists():
        pytest.skip("not a checkout")
    assert link.resolve() == (root / "persona_jax/assets/manifest.toml").resolve()
    for asset in assets.manifest().values():
        assert {"home", "licence", "use"} <= set(asset)


def shorten(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(("harm", "word"), [(pathlib.Path.unlink, "missing"), (shorten, "damaged")])
def test_a_built_file_that_is_gone_or_cut_is_named(tmp_path, harm, word):
    folder = write_folder(tmp_path / "us", {"Ann": 2})
    load_photos("folder", tmp_path / "d", folder=folder)
    (file,) = (tmp_path / "d").rglob("*.array_record-*")
    harm(file)
    with pytest.raises(UserError, match=rf"{file}: {word}.*remove the folder {file.parent}"):
        load_photos("folder", tmp_path / "d", folder=folder)
    shutil.rmtree(file.parent)
    assert len(load_photos("folder", tmp_path / "d", folder=folder)) == 2


def test_waiting_for_another_build_is_said(tmp_path, capsys):
    done = threading.Event()

    def second():
        with alone(tmp_path):
            done.set()

    with alone(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        assert not done.wait(0.3)
    thread.join()
    assert done.is_set()
    assert f"waiting for another process that builds data in {tmp_path}" in capsys.readouterr().out


def test_drawn_people_without_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match=r'"portraits": no settings given'):
        load_photos("portraits", tmp_path)
