"""Atomic writes of files and folders, permissions, checksums and locks."""

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from persona_jax.errors import UserError
from persona_jax.runtime import checksums, command_line, files, untrusted
from persona_jax.runtime.locks import alone


def test_a_file_that_fails_half_way_leaves_the_one_before(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("before")

    def write():
        with files.whole_file(file) as part:
            part.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert file.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_are_as_readable_as_the_umask_says(tmp_path, umask):
    """Also if a library creates files that only the owner can read."""
    before = os.umask(umask)
    try:
        with files.whole_folder(tmp_path / "folder") as folder, files.whole_file(folder / "a") as a:
            a.unlink()
            os.close(os.open(a, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder/a").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    def write():
        with files.whole_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../../x", "/etc/x", "a/b", "a\0b"])
def test_only_plain_names_are_accepted(tmp_path, name):
    with pytest.raises(UserError, match=r"--person .*: expected a name"):
        files.name_below(tmp_path, name, "--person")
    assert files.name_below(tmp_path, "ann [2]", "--person") == tmp_path / "ann [2]"


def test_checksums_name_what_changed(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("a", "b/c", "b/d"):
        (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(1000))
    assert checksums.fault(tmp_path) is None  # no checksums yet
    checksums.write(tmp_path)
    assert checksums.fault(tmp_path) is None
    (tmp_path / "b/c").write_bytes(b"other")
    assert checksums.fault(tmp_path) == "b/c is not as it was written"
    assert checksums.fault(tmp_path, ["a", "b/d"]) is None
    assert {checksums.fault(tmp_path, None, (k, 3)) for k in range(3)} == {
        None, "b/c is not as it was written",
    }  # fmt: skip
    (tmp_path / "b/c").unlink()
    assert checksums.fault(tmp_path, ["b"]) == "b/c is missing"
    with pytest.raises(UserError, match=r"damaged, b/c is missing; again, or remove checksums"):
        checksums.verify(tmp_path, None, "again")
    (tmp_path / checksums.NAME).write_text("{")
    assert checksums.fault(tmp_path) == "checksums.json cannot be read"
    (tmp_path / checksums.NAME).write_text('{"xxh3_128": {"../x": "00"}}')
    assert checksums.fault(tmp_path) == "checksums.json cannot be read"
    (tmp_path / checksums.NAME).write_text('{"sha256": {}}')  # checksums of another program
    assert checksums.fault(tmp_path) is None


def test_a_place_that_cannot_be_written_is_read_without_a_lock(tmp_path, monkeypatch):
    def refused(path, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "open", refused)
    with alone(tmp_path):
        pass
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(OSError, match="Read-only"), alone(tmp_path / "new"):
        pass


@pytest.mark.parametrize("number", files.DISK)
def test_errors_of_the_disk_are_one_line(number, capsys):
    def main(arguments):
        raise OSError(number, os.strerror(number), "/data/x")

    with pytest.raises(SystemExit) as stop:
        command_line.run_with_arguments(command_line.argparse.ArgumentParser(), main, ["x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: /data/x: {os.strerror(number)}\n"


def test_a_librarys_own_error_of_a_full_disk_is_a_line(capsys):
    def main(arguments):
        try:
            raise RuntimeError("Writing to x: No space left on device [type.googleapis.com/…]")
        except RuntimeError as error:
            raise ValueError("in a builder") from error

    with pytest.raises(SystemExit) as stop:
        command_line.run_with_arguments(command_line.argparse.ArgumentParser(), main, ["x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: No space left on device (RuntimeError)")


def test_pipes_and_folders_are_refused_as_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json"):
        with pytest.raises(UserError, match="expected a file, found"):
            untrusted.read_json(tmp_path / name)
    with pytest.raises(UserError, match="expected a file, found no regular file"):
        untrusted.read_json(Path("/dev/zero"))
