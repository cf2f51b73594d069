"""Output folders are tested before the work starts, and files are written atomically."""

import errno
import os
import pathlib

import pytest

from persona_jax.errors import UserError
from persona_jax.runtime import outputs


def everything(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_place_that_can_be_written_stays_as_it_was(tmp_path):
    assert outputs.try_folder(tmp_path / "a/b", "--out") == tmp_path / "a/b"
    assert outputs.try_file(tmp_path / "c/d.npz", "--save") == tmp_path / "c/d.npz"
    assert everything(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "out/0001.png").mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    wrong = {
        "": "empty",
        str(tmp_path / "file"): "File exists",
        str(tmp_path / "file/within"): "Not a directory",
        str(tmp_path / ("n" * 300)): "File name too long",
        str(tmp_path / "a\0b"): "null",
        str(tmp_path / "loop/a"): "symbolic links",
        str(tmp_path / "out"): "0001.png is a folder",
        "/proc/nothing": "choose another folder",
    }
    before = everything(tmp_path)
    for out, words in wrong.items():
        with pytest.raises(UserError, match=words) as error:
            outputs.try_folder(out, "--out", r"\d{4}\.png")
        assert str(error.value).startswith("--out")
        assert len(str(error.value)) < 500
    for out in (tmp_path / "out", tmp_path / "file/x.npz", tmp_path / ("n" * 250)):
        with pytest.raises(UserError, match="--save"):
            outputs.try_file(out, "--save")
    assert everything(tmp_path) == before

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", full)
    with pytest.raises(UserError, match="No space left"):
        outputs.try_folder(tmp_path / "new", "--out")


def test_a_file_cut_short_leaves_the_one_before(tmp_path):
    file = tmp_path / "a.txt"
    outputs.write_text(file, "é")

    def cut(error):
        with outputs.whole(file) as beside:
            beside.write_text("half of i")
            raise error

    with pytest.raises(UserError, match=r"a.txt: cannot be written \(No space left"):
        cut(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(KeyboardInterrupt):
        cut(KeyboardInterrupt())
    assert file.read_text(encoding="utf-8") == "é"
    assert everything(tmp_path) == ["a.txt"]


def test_files_are_for_others_to_read_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        outputs.write_text(tmp_path / "a.txt", "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644
