"""Buckets, imitated by fsspec's in-memory file system."""

import fsspec
import pytest

from persona_jax.errors import UserError
from persona_jax.runtime import buckets

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """An empty bucket, and an empty local mirror."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(buckets, "_mirrors", {})
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return files


def forget(monkeypatch) -> None:
    """Resets the state that a new process would not have."""
    monkeypatch.setattr(buckets, "_mirrors", {})


def test_local_paths_are_unchanged(tmp_path):
    assert buckets.local(tmp_path) == tmp_path
    assert buckets.local("~/x").is_absolute()
    assert not buckets.is_bucket("a/b")
    assert not buckets.is_bucket("https://x/y.png")
    assert buckets.is_bucket("gs://bucket/x")


def test_files_are_uploaded_and_downloaded(empty, tmp_path, monkeypatch):
    with buckets.keeping():
        here = buckets.local(URL)
        assert not here.exists()
        assert buckets.bucket_of(here) == URL
        (here / "deep/er").mkdir(parents=True)
        (here / "deep/er/a.txt").write_text("one")
        (here / "b.part").write_text("unfinished")
    assert empty.find("/bucket") == ["/bucket/run/deep/er/a.txt"]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with buckets.keeping():
        there = buckets.local(URL)
        assert there != here
        assert (there / "deep/er/a.txt").read_text() == "one"
        (there / "deep/er/a.txt").write_text("two, longer")
        (there / "c.txt").write_text("three")
    assert empty.cat("/bucket/run/deep/er/a.txt") == b"two, longer"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert (buckets.local(URL) / "deep/er/a.txt").read_text() == "two, longer"
    assert (here / "c.txt").read_text() == "three"


def test_nothing_is_transferred_twice(empty, monkeypatch):
    empty.pipe("/bucket/run/a.txt", b"one")
    asked = []

    def counted(name):
        method = getattr(type(empty), name)

        def call(*args, **options):
            asked.append(name)
            return method(*args, **options)

        return call

    for name in ("get_file", "put_file"):
        monkeypatch.setattr(type(empty), name, counted(name))
    for expected in (["get_file"], ["get_file"], ["get_file", "put_file"]):
        forget(monkeypatch)
        with buckets.keeping():
            here = buckets.local(URL)
            if expected[-1] == "put_file":
                (here / "b.txt").write_text("two")
        assert asked == expected


def test_deletions_are_mirrored(empty, monkeypatch):
    empty.pipe({"/bucket/run/a.txt": b"one", "/bucket/run/b.txt": b"two"})
    with buckets.keeping():
        here = buckets.local(URL)
        (here / "a.txt").unlink()
    assert empty.find("/bucket") == ["/bucket/run/b.txt"]
    empty.rm("/bucket/run/b.txt")
    with buckets.keeping():
        assert list(buckets.local(URL).iterdir()) == []


def test_a_single_file(empty):
    empty.pipe("/bucket/photo.jpg", b"picture")
    assert buckets.local("memory://bucket/photo.jpg").read_bytes() == b"picture"


def test_files_of_a_killed_command_are_uploaded_by_the_next(empty, monkeypatch):
    here = buckets.local(URL)
    here.mkdir(parents=True)
    (here / "a.txt").write_text("late")
    forget(monkeypatch)  # nothing was sent
    with buckets.keeping():
        assert (buckets.local(URL) / "a.txt").read_text() == "late"
    assert empty.cat("/bucket/run/a.txt") == b"late"


def test_conflicting_changes_are_both_kept(empty, monkeypatch, capsys):
    empty.pipe("/bucket/run/a.txt", b"one")
    here = buckets.local(URL)
    (here / "a.txt").write_text("ours, unsent")
    empty.pipe("/bucket/run/a.txt", b"theirs")
    forget(monkeypatch)
    assert (buckets.local(URL) / "a.txt").read_text() == "theirs"
    assert (here / "a.txt.unsent").read_text() == "ours, unsent"
    assert "changed there and here" in capsys.readouterr().out


def test_uploads_while_a_command_runs_and_after_it_fails(empty, monkeypatch):
    monkeypatch.setattr(buckets, "EVERY", 0.05)

    def fail():
        with buckets.keeping():
            here = buckets.local(URL)
            here.mkdir(parents=True)
            (here / "a.txt").write_text("one")
            for _ in range(200):
                if empty.exists("/bucket/run/a.txt"):
                    break
                buckets.threading.Event().wait(0.05)
            assert empty.cat("/bucket/run/a.txt") == b"one"
            (here / "b.txt").write_text("two")
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        fail()
    assert empty.cat("/bucket/run/b.txt") == b"two"


def test_errors_are_one_line(empty, monkeypatch):
    with pytest.raises(UserError, match="nosuchkind://x: Protocol not known"):
        buckets.local("nosuchkind://x")

    def refuse(*_, **__):
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(type(empty), "find", refuse)
        with pytest.raises(UserError, match=r"memory://bucket/run: not read .*not yours"):
            buckets.local(URL)
    monkeypatch.setattr(type(empty), "put_file", refuse)

    def write():
        with buckets.keeping():
            here = buckets.local(URL)
            here.mkdir(parents=True)
            (here / "a").write_text("x")

    with pytest.raises(
        UserError, match=r"a not written \(PermissionError: not yours\); unsent files stay"
    ):
        write()


def test_a_path_within_a_mirror_is_the_mirrors(empty, capsys):
    empty.pipe("/bucket/run/example/1.png", b"picture")
    with buckets.keeping():
        here = buckets.local(URL)
        assert buckets.local(f"{URL}/example/1.png") == here / "example/1.png"
        assert (here / "example/1.png").read_bytes() == b"picture"
    with buckets.keeping():  # in the other order, each has its own list
        buckets.local(f"{URL}/example/1.png")
        buckets.local(URL)
    assert "changed" not in capsys.readouterr().out
    assert empty.find("/bucket") == ["/bucket/run/example/1.png"]
