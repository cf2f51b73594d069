"""Output paths: checked before the work starts, and written atomically."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from persona_jax.errors import UserError, shown
from persona_jax.runtime import buckets, files


def try_folder(out: str | Path, flag: str, names: str = "") -> Path:
    """Checks that files can be written in an output folder. A folder that is absent stays absent.

    Args:
      out: the folder as the user gave it; may be in a bucket.
      flag: the flag it was given by, for the error.
      names: pattern (:mod:`re`) of the files to be written.

    Returns:
      The local path of the folder.

    Raises:
      UserError: the folder cannot be written to, or a file's name is taken by a folder.
    """
    if not str(out):
        raise UserError(f"{flag}: empty; name a folder")
    folder = buckets.local(out)
    try:
        absent = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
        folders = [x.name for x in os.scandir(folder) if x.is_dir() and re.fullmatch(names, x.name)]
        for path in absent:
            with contextlib.suppress(OSError):  # another process has put files in it
                path.rmdir()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{flag} {shown(out)}: {_reason(error)}; choose another folder") from error
    if folders:
        raise UserError(
            f"{flag} {shown(out)}: {shown(folders[0])} is a folder there, and a file is to be "
            "written in its place; choose another folder"
        )
    return folder


def try_file(out: str | Path, flag: str) -> Path:
    """Checks that an output file can be written; see :func:`try_folder`.

    Returns:
      The local path of the file.

    Raises:
      UserError: it cannot be written.
    """
    file = buckets.local(out)
    try_folder(file.parent, flag, re.escape(file.name))
    if not file.name or len(os.fsencode(file.name)) > 230:
        raise UserError(f"{flag} {shown(out)}: not a name for a file; choose another")
    return file


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Writes an output file atomically, as :func:`persona_jax.runtime.files.whole_file` does.

    The folder is made if absent.

    Raises:
      UserError: the file cannot be written; an earlier file of that name is unchanged.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.whole_file(file) as beside:
            yield beside
    except OSError as error:
        raise UserError(
            f"{shown(file)}: cannot be written ({_reason(error)}); make room or write elsewhere"
        ) from error


def write_text(file: Path, text: str) -> None:
    """Writes a text file in UTF-8 atomically (:func:`whole`)."""
    with whole(file) as beside:
        beside.write_text(text, encoding="utf-8")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
