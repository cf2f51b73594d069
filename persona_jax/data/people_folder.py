"""A photo folder with one subfolder per person: lists each person's files and what is left out."""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import stat
import urllib.parse
from collections.abc import Sequence

from persona_jax.data.photo_decoding import READING
from persona_jax.errors import UserError, shown

LABELS = "captions_meta.tsv"


@dataclasses.dataclass(frozen=True)
class PeopleFolder:
    """The contents of a photo folder.

    Attributes:
      folder: the folder.
      files: regular files in each person's folder, sorted by name; people sorted by name.
      left_out: path below `folder` of each entry that is not used, and the reason.
    """

    folder: pathlib.Path
    files: dict[str, list[pathlib.Path]]
    left_out: dict[str, str]

    @property
    def digest(self) -> str:
        """A hash of name, size and modification time of all files."""
        entries = []
        for path in [self.folder / LABELS, *(x for files in self.files.values() for x in files)]:
            if path.exists():
                about = path.stat()
                name = os.fspath(path.relative_to(self.folder))
                entries.append((name, about.st_size, about.st_mtime_ns))
        listed = json.dumps([READING, entries, list(self.files), sorted(self.left_out)])
        return hashlib.sha256(listed.encode()).hexdigest()

    @property
    def no_photo(self) -> str:
        """The error message if no file is a readable photo."""
        deeper = [name for name, why in self.left_out.items() if why == "a folder"]
        if not deeper:
            return f"photo folder {shown(self.folder)}: no readable photo in it"
        above = shown(self.folder / deeper[0].split("/")[0])
        return (
            f"photo folder {shown(self.folder)}: photos are expected as PERSON/PHOTO, and lie "
            f"deeper; if {above} holds a folder per person, name it: config.data.folder={above}"
        )


def list_people(folder: pathlib.Path) -> PeopleFolder:
    """Lists `folder` without reading the files; ignores names that begin with a dot.

    Raises:
      UserError: the folder does not exist, or has no subfolder.
    """
    left_out: dict[str, str] = {}
    if not folder.is_dir():
        raise UserError(f"photo folder {shown(folder)}: no such folder; expected PERSON/PHOTO.jpg")
    files = {}
    for path in _entries(folder, ".", left_out):
        name, kind = legible(path.name), _kind(path)
        if kind == "a folder":
            files[name] = [
                file
                for file in _entries(path, name, left_out)
                if not _noted(f"{name}/{legible(file.name)}", _kind(file), left_out)
            ]
        elif path.name != LABELS:
            left_out[name] = kind or "not in a person's folder"
    if not files:
        what = f" ({_first(left_out)})" if left_out else ""
        raise UserError(
            f"photo folder {shown(folder)}: no folder per person{what}; expected PERSON/PHOTO.jpg"
        )
    return PeopleFolder(folder, files, left_out)


def legible(name: str) -> str:
    """Returns a file's name in UTF-8; a name that is not UTF-8 is percent-encoded as in a URL."""
    try:
        return os.fsencode(name).decode()
    except UnicodeDecodeError:
        return urllib.parse.quote(os.fsencode(name), safe=" !#$&'()+,;=@[]")


def _entries(folder: pathlib.Path, name: str, left_out: dict[str, str]) -> list[pathlib.Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        left_out[name] = error.strerror or type(error).__name__
        return []


def _kind(path: pathlib.Path) -> str | None:
    """Returns what a path is if it is not a regular file; None if it is one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "a link to nothing" if path.is_symlink() else error.strerror
    if stat.S_ISDIR(mode):
        return "a folder"
    return None if stat.S_ISREG(mode) else "not a regular file"


def _noted(name: str, why: str | None, left_out: dict[str, str]) -> bool:
    """Records why an entry is left out; returns whether it is."""
    if why is not None:
        left_out[name] = why
    return why is not None


def _first(left_out: dict[str, str]) -> str:
    return some([f"{name}: {why}" for name, why in left_out.items()])


def some(names: Sequence[str], room: int = 200) -> str:
    """Joins the first names, in about `room` characters, and adds how many more there are."""
    printable = [shown(name) for name in names]
    most = max(1, sum(end <= room for end in itertools.accumulate(map(len, printable))))
    more = f" and {len(printable) - most} more" if len(printable) > most else ""
    return ", ".join(printable[:most]) + more
