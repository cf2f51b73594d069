"""Paths of buckets, gs://bucket/folder say: worked on in a local mirror, kept in the bucket.

What a bucket path names is fetched when it is first asked for (:func:`local`), all that is new or
changed under it is sent every half minute while a command runs, and at its end (:func:`keeping`).
So every part of the program sees folders of this machine, and readers of the bucket whole files.

fsspec, which etils.epath stands on too, knows the kinds of bucket: gs:// with gcsfs, s3:// with
s3fs, and so on (extra ``buckets``).
"""

import contextlib
import filecmp
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from tqdm import tqdm

from persona_jax.errors import UserError
from persona_jax.runtime.locks import alone

EVERY = 30.0
"""Seconds between two looks for what is to be sent."""
UNFINISHED = re.compile(
    r"\.incomplete-|orbax-checkpoint-tmp|\.part$|\.part\.npy$|\.new$|\.lock$|\.unsent$|\.mirrored\.json$"
)
"""In paths of what gets another name when it is whole, and of locks: not sent."""
LIST = ".mirrored.json"
TOKENS = ("generation", "etag", "ETag", "md5Hash", "mtime", "LastModified", "updated", "created")
"""What file systems tell a changed file by, best first."""

Files = dict[str, list]
"""By a file's path under the folder: what it is in the bucket, and what it was here then."""

_mirrors: dict[str, "Mirror"] = {}


def is_bucket(path: str | Path) -> bool:
    """Whether a path is of a bucket rather than of this machine."""
    return re.match(r"(?!https?:)[a-z][a-z0-9+]*://", str(path)) is not None


def local(path: str | Path) -> Path:
    """The path here: of the mirror, fetched, where it is of a bucket; else with ~ expanded.

    Raises:
      UserError: the bucket cannot be read.
    """
    if not is_bucket(path):
        return Path(path).expanduser()
    url = str(path).rstrip("/")
    for outer, mirror in _mirrors.items():
        if url.startswith(f"{outer}/"):
            return mirror.folder / url.removeprefix(f"{outer}/")
    if url not in _mirrors:
        mirror = Mirror(url)
        mirror.fetch()
        _mirrors[url] = mirror
    return _mirrors[url].folder


def bucket_of(path: Path) -> str | None:
    """The bucket path that :func:`local` gave this path for, if any."""
    return next((url for url, mirror in _mirrors.items() if mirror.folder == path), None)


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Within it, what changes in mirrors is sent to their buckets from time to time; at the end,
    however it comes, what has changed since.

    Raises:
      UserError: at the end, a bucket cannot be written.
    """
    done = threading.Event()

    def tend() -> None:
        while not done.wait(EVERY):
            for mirror in list(_mirrors.values()):
                try:
                    mirror.send()
                except UserError as error:  # tried again, and told at the end
                    print(f"warning: {error}", file=sys.stderr)

    thread = threading.Thread(target=tend, daemon=True)
    thread.start()
    try:
        yield
        failed = False
    except BaseException:
        failed = True
        raise
    finally:
        done.set()
        thread.join()
        # What went wrong first is what is told.
        with contextlib.suppress(UserError) if failed else contextlib.nullcontext():
            for mirror in _mirrors.values():
                mirror.send()
        _mirrors.clear()


class Mirror:
    """A file or folder of a bucket, and its copy here.

    Attributes:
      url: in the bucket.
      folder: here (a file, where it is one there).
    """

    def __init__(self, url: str):
        """Nothing is read yet. Raises UserError where that kind of bucket is not known."""
        self.url = url
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        kind, _, rest = url.partition("://")
        self.folder = home / "persona_jax" / "buckets" / kind / rest.strip("/")
        self._list = self.folder.with_name(f"{self.folder.name}{LIST}")
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: {error}; pip install 'persona-jax[buckets]'") from error

    def fetch(self) -> None:
        """Makes the copy what the bucket has; what is here and was never sent stays.

        Raises:
          UserError: the bucket cannot be read.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(self.folder.parent, f"{self.folder.name}.lock"):
            known, there = self._known(), self._there()
            for name in known.keys() - there.keys():
                if known[name][1] == self._here(name):
                    self._path(name).unlink()
                del known[name]
            stale = [name for name, what in there.items() if known.get(name, [0])[0] != what]
            stale += [name for name in known if name not in stale and self._here(name) is None]
            for name in tqdm(stale, desc=f"fetch {self.url}", disable=not stale):
                ours = self._here(name) not in (None, known.get(name, [0, None])[1])
                known[name] = [there[name], self._get(name, keep=ours)]
            self._remember(known)

    def send(self) -> None:
        """Makes the bucket what the copy is.

        Raises:
          UserError: the bucket cannot be written.
        """
        with alone(self.folder.parent, f"{self.folder.name}.lock"):
            known, here = self._known(), self._all_here()
            changed = [name for name, what in here.items() if known.get(name, [0, 0])[1] != what]
            gone = [name for name in known if name not in here]
            if not (changed or gone):
                return
            remedy = f"what is missing there lies in {self.folder}, to be sent with its next use"
            try:
                for name in gone:
                    absent = contextlib.suppress(FileNotFoundError)
                    with self._told(f"{name} not removed", remedy), absent:
                        self._files.rm(self._remote(name))
                    del known[name]
                for name in changed:
                    with self._told(f"{name} not written", remedy):
                        known[name] = [self._put(name), here[name]]
            finally:
                self._remember(known)

    def _there(self) -> dict[str, list]:
        """What the bucket has under the path; nothing where it is not there yet."""
        found: dict[str, dict] = {}
        absent = contextlib.suppress(FileNotFoundError)
        with self._told("not read", "is it right, and yours?"), absent:
            self._files.invalidate_cache()
            found = self._files.find(self._root, detail=True)
        names = {path.removeprefix(self._root).lstrip("/"): info for path, info in found.items()}
        return {
            name: self._what(info) for name, info in names.items() if not UNFINISHED.search(name)
        }

    def _put(self, name: str) -> list:
        """Sends a file; what it is there. One that changes meanwhile is sent again."""
        remote = self._remote(name)
        # (its parents are there in a bucket, and not in other kinds of file system)
        self._files.makedirs(self._files._parent(remote), exist_ok=True)
        self._files.put_file(str(self._path(name)), remote)
        return self._what(self._files.info(remote))

    @contextlib.contextmanager
    def _told(self, what: str, remedy: str) -> Iterator[None]:
        """Whatever goes wrong with the bucket, of which each kind has its own errors, in a line."""
        try:
            yield
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {line}"
            raise UserError(f"{self.url}: {what} ({reason}); {remedy}") from error

    def _what(self, info: dict[str, Any]) -> list:
        token = next((str(info[key]) for key in TOKENS if key in info), "")
        return [info["size"], token]

    def _get(self, name: str, keep: bool) -> list:
        """Fetches a file; `keep` what is here beside it, if it is another."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with self._told(f"{name} not read", "was it removed meanwhile?"):
            self._files.get_file(self._remote(name), str(part))
        if keep and not filecmp.cmp(part, path, shallow=False):
            aside = path.with_name(f"{path.name}.unsent")
            path.rename(aside)
            print(f"{self.url}: {name} changed there and here; ours is {aside}")
        part.replace(path)
        return self._here(name)

    def _all_here(self) -> dict[str, list]:
        if self.folder.is_file():
            return {"": self._here("")}
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        found = {name: self._here(name) for name in names if not UNFINISHED.search(name)}
        return {name: what for name, what in found.items() if what}

    def _here(self, name: str) -> list | None:
        try:
            about = self._path(name).stat()
        except FileNotFoundError:
            return None
        return [about.st_size, about.st_mtime_ns]

    def _path(self, name: str) -> Path:
        return self.folder / name if name else self.folder

    def _remote(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _known(self) -> Files:
        try:
            return json.loads(self._list.read_text())
        except (OSError, ValueError):
            return {}

    def _remember(self, known: Files) -> None:
        beside = self._list.with_suffix(".new")
        beside.write_text(json.dumps(known))
        beside.replace(self._list)
