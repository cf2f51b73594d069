"""Checksums of a folder's files, stored in the folder, to detect damaged files.

``checksums.json`` holds the XXH3-128 of every file below its folder. The hash is fast enough to be
computed at every read; it detects failing disks and copies, not forgery.
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
    checksum = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            checksum.update(piece)
    return checksum.hexdigest()


def write(folder: Path, only: Sequence[str] | None = None) -> None:
    """Writes ``checksums.json`` for the files that are now below `folder`.

    Args:
      folder: gets the file.
      only: files and folders below it to include; None: all.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    names = {path.relative_to(folder).as_posix(): path for path in files}
    digests = {name: digest(path) for name, path in names.items() if _counts(name, only)}
    with whole_file(folder / NAME) as beside:
        beside.write_text(json.dumps({KIND: digests}, indent=1) + "\n")


def fault(
    folder: Path, only: Sequence[str] | None = None, share: tuple[int, int] = (0, 1)
) -> str | None:
    """Compares a folder's files with its checksums.

    Args:
      folder: with the file ``checksums.json``.
      only: files and folders below `folder` to check; None: all.
      share: (k, n): checks every n-th file from the k-th on, for n processes that share the work.

    Returns:
      The first difference; None if there is none, or the folder has no checksums.

    Raises:
      OSError: a file exists but cannot be read.
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
    """Raises an error if files differ from their checksums.

    Args:
      folder: see :func:`fault`.
      only: see :func:`fault`.
      remedy: what the user can do, for the error.

    Raises:
      UserError: a file is missing, damaged or unreadable; it is named.
    """
    try:
        difference = fault(folder, None if only is None else list(only))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); {remedy}") from error
    if difference:
        raise UserError(
            f"{folder}: damaged, {difference}; {remedy}, or remove {NAME} there if you changed it"
        )


def _counts(name: str, only: Sequence[str] | None) -> bool:
    return only is None or any(name == one or name.startswith(f"{one}/") for one in only)


def _read(file: Path) -> dict[str, str]:
    """Checksums by file. Raises ValueError if :func:`write` cannot have written them."""
    content = json.loads(file.read_text())
    if isinstance(content, dict) and KIND not in content:
        return {}  # of another program
    known = content.get(KIND) if isinstance(content, dict) else None
    if not isinstance(known, dict) or not all(isinstance(x, str) for x in known.values()):
        raise ValueError(f"no {KIND}")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in known):
        raise ValueError("names outside the folder")
    return known
