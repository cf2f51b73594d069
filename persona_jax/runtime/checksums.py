"""Checksums of a folder's files, written beside them, so that a flipped bit is not read unnoticed.

``checksums.json`` holds the XXH3-128 of every file below its folder: fast enough to be computed
each time that files are read, and meant against failing disks and copies, not against forgery.
"""

import errno
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from persona_jax.errors import UserError
from persona_jax.runtime.files import whole_file

NAME = "checksums.json"
KIND = "xxh3_128"
_PIECE = 2**22


def digest(file: Path) -> str:
    """XXH3-128 of a file's bytes, hex."""
    if not file.is_file():  # a pipe may never end
        raise FileNotFoundError(errno.ENOENT, "No such file", str(file))
    found = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            found.update(piece)
    return found.hexdigest()


def write(folder: Path, only: Sequence[str] | None = None) -> None:
    """Writes ``checksums.json`` of the files that are now below `folder`.

    Args:
      only: files and folders below it; None: all.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    names = {path.relative_to(folder).as_posix(): path for path in files}
    found = {name: digest(path) for name, path in names.items() if _counts(name, only)}
    with whole_file(folder / NAME) as beside:
        beside.write_text(json.dumps({KIND: found}, indent=1) + "\n")


def fault(
    folder: Path, only: Sequence[str] | None = None, share: tuple[int, int] = (0, 1)
) -> str | None:
    """What differs from what was written; None where nothing does, or no checksums are kept.

    Args:
      only: files and folders below `folder` that matter; None: all.
      share: (k, n): every n-th file, beginning with the k-th, where n processes share the work.

    Raises:
      OSError: a file is there and cannot be read.
    """
    try:
        known = _read(folder / NAME)
    except FileNotFoundError:
        return None
    except ValueError:
        return f"{NAME} cannot be read"
    names = [name for name in sorted(known) if _counts(name, only)]
    first, step = share
    for name in names[first::step]:
        try:
            if digest(folder / name) != known[name]:
                return f"{name} is not as it was written"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return f"{name} is missing"
    return None


def verify(folder: Path, only: Iterable[str] | None, remedy: str) -> None:
    """Refuses files that are not as they were written.

    Args:
      only: see :func:`fault`.
      remedy: what to do, for the error.

    Raises:
      UserError: names the file.
    """
    try:
        found = fault(folder, None if only is None else list(only))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); {remedy}") from error
    if found:
        raise UserError(
            f"{folder}: damaged, {found}; {remedy}, or remove {NAME} there if you changed it"
        )


def _counts(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(name == one or name.startswith(f"{one}/") for one in only)


def _read(file: Path) -> dict[str, str]:
    """Checksums by file. Raises ValueError where they are not what :func:`write` wrote."""
    found = json.loads(file.read_text())
    if isinstance(found, dict) and KIND not in found:
        return {}  # another program's
    known = found.get(KIND) if isinstance(found, dict) else None
    if not isinstance(known, dict) or not all(isinstance(x, str) for x in known.values()):
        raise ValueError(f"no {KIND}")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in known):
        raise ValueError("names outside the folder")
    return known
