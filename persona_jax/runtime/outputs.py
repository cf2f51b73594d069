"""Places for results: tried before the work, and written whole or not at all."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from persona_jax.errors import UserError, shown
from persona_jax.runtime import buckets, files


def try_folder(out: str | Path, flag: str, names: str = "") -> Path:
    """The folder that a flag names, in which files can be written; what it lacks is not made yet.

    Args:
      out: as it was given; may be in a bucket.
      flag: which flag.
      names: pattern (:mod:`re`) of the files to be written.

    Raises:
      UserError: nothing can be written there, or a folder stands where a file is to be.
    """
    if not str(out):
        raise UserError(f"{flag}: empty; name a folder")
    place = buckets.local(out)
    try:
        absent = [path for path in (place, *place.parents) if not path.exists()]
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"0")
        folders = [x.name for x in os.scandir(place) if x.is_dir() and re.fullmatch(names, x.name)]
        for path in absent:
            with contextlib.suppress(OSError):  # of use to somebody else meanwhile
                path.rmdir()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{flag} {shown(out)}: {_reason(error)}; choose another folder") from error
    if folders:
        raise UserError(
            f"{flag} {shown(out)}: {shown(folders[0])} is a folder there, and a file is to be "
            "written in its place; choose another folder"
        )
    return place


def try_file(out: str | Path, flag: str) -> Path:
    """The file that a flag names, which can be written. Raises as :func:`try_folder`."""
    place = buckets.local(out)
    try_folder(place.parent, flag, re.escape(place.name))
    if not place.name or len(os.fsencode(place.name)) > 230:
        raise UserError(f"{flag} {shown(out)}: no name for a file; choose another")
    return place


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """:func:`persona_jax.runtime.files.whole_file` for what a flag asked for, in a folder that is
    made where absent.

    Raises:
      UserError: it cannot be written; what had that name before is as it was.
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
    """A file in UTF-8, whole (:func:`whole`)."""
    with whole(file) as beside:
        beside.write_text(text, encoding="utf-8")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
