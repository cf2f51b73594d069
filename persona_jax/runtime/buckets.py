"""Bucket paths such as gs://bucket/folder, read and written through a local mirror.

A bucket path is downloaded when it is first used (:func:`local`). New and changed files under it
are uploaded every 30 seconds while a command runs, and when it ends (:func:`keeping`). The rest of
the program therefore works with local folders only, and the bucket never holds a partial file.

fsspec, on which etils.epath is built too, provides the file systems: gs:// through gcsfs, s3://
through s3fs, and so on (extra ``buckets``).
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
"""Seconds between two uploads of changed files."""
UNFINISHED = re.compile(
    r"\.incomplete-|orbax-checkpoint-tmp|\.part$|\.part\.npy$|\.new$|\.lock$|\.unsent$|\.mirrored\.json$"
)
"""Paths that are not uploaded: files still being written, and locks."""
LIST = ".mirrored.json"
TOKENS = ("generation", "etag", "ETag", "md5Hash", "mtime", "LastModified", "updated", "created")
"""Keys of a file's metadata that show that it has changed, the most reliable first."""

Files = dict[str, list]
"""By a file's path under the folder: its state in the bucket, and its local state at that time."""

_mirrors: dict[str, "Mirror"] = {}


def is_bucket(path: str | Path) -> bool:
    """Whether a path is a bucket's URL rather than a local path."""
    return re.match(r"(?!https?:)[a-z][a-z0-9+]*://", str(path)) is not None


def local(path: str | Path) -> Path:
    """The local path: of the downloaded mirror for a bucket path, else the path with ~ expanded.

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
    """The bucket path whose mirror this local path is, if any."""
    return next((url for url, mirror in _mirrors.items() if mirror.folder == path), None)


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Uploads changed files of all mirrors every :data:`EVERY` seconds, and on leaving the context.

    Raises:
      UserError: a bucket cannot be written at the end, and no other error is already raised.
    """
    done = threading.Event()

    def send_regularly() -> None:
        while not done.wait(EVERY):
            for mirror in list(_mirrors.values()):
                try:
                    mirror.send()
                except UserError as error:  # tried again later; the last upload raises it
                    print(f"warning: {error}", file=sys.stderr)

    thread = threading.Thread(target=send_regularly, daemon=True)
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
        # An upload error must not replace the error that ended the command.
        with contextlib.suppress(UserError) if failed else contextlib.nullcontext():
            for mirror in _mirrors.values():
                mirror.send()
        _mirrors.clear()


class Mirror:
    """A file or folder of a bucket and its local copy.

    Attributes:
      url: of the file or folder in the bucket.
      folder: local path of the copy (of a file if `url` is a file).
    """

    def __init__(self, url: str):
        """Opens the file system without reading. Raises UserError for an unknown kind of URL."""
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
        """Downloads what differs from the bucket; local files that were never uploaded are kept.

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
        """Uploads changed files, and removes from the bucket those that were removed locally.

        Raises:
          UserError: the bucket cannot be written.
        """
        with alone(self.folder.parent, f"{self.folder.name}.lock"):
            known, here = self._known(), self._all_here()
            changed = [name for name, what in here.items() if known.get(name, [0, 0])[1] != what]
            gone = [name for name in known if name not in here]
            if not (changed or gone):
                return
            remedy = f"unsent files stay in {self.folder} and are sent the next time it is used"
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
        """State of each file of the bucket under the path; empty if the path does not exist."""
        infos: dict[str, dict] = {}
        absent = contextlib.suppress(FileNotFoundError)
        with self._told("not read", "check the path and your access to it"), absent:
            self._files.invalidate_cache()
            infos = self._files.find(self._root, detail=True)
        names = {path.removeprefix(self._root).lstrip("/"): info for path, info in infos.items()}
        return {
            name: self._what(info) for name, info in names.items() if not UNFINISHED.search(name)
        }

    def _put(self, name: str) -> list:
        """Uploads a file and returns its state in the bucket.

        A file that changes during the upload is uploaded again with the next :meth:`send`.
        """
        remote = self._remote(name)
        # Buckets have no folders, but other kinds of file system need the parents.
        self._files.makedirs(self._files._parent(remote), exist_ok=True)
        self._files.put_file(str(self._path(name)), remote)
        return self._what(self._files.info(remote))

    @contextlib.contextmanager
    def _told(self, what: str, remedy: str) -> Iterator[None]:
        """Turns any error into a UserError: each file system raises exceptions of its own kinds."""
        try:
            yield
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {line}"
            raise UserError(f"{self.url}: {what} ({reason}); {remedy}") from error

    def _what(self, info: dict[str, Any]) -> list:
        token = next((str(info[key]) for key in TOKENS if key in info), "")
        return [info["size"], token]

    def _get(self, name: str, keep: bool) -> list | None:
        """Downloads a file. With `keep`, a local file of other content is renamed to .unsent."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with self._told(f"{name} not read", "was it removed meanwhile?"):
            self._files.get_file(self._remote(name), str(part))
        if keep and not filecmp.cmp(part, path, shallow=False):
            unsent = path.with_name(f"{path.name}.unsent")
            path.rename(unsent)
            print(f"{self.url}: {name} changed there and here; the local version is now {unsent}")
        part.replace(path)
        return self._here(name)

    def _all_here(self) -> dict[str, list]:
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        below = [path.relative_to(self.folder).as_posix() for path in paths]
        names = [""] if self.folder.is_file() else below
        states = {name: self._here(name) for name in names if not UNFINISHED.search(name)}
        return {name: what for name, what in states.items() if what}

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
