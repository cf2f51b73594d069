"""Atomic writes of files and folders, with the permissions of the umask."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from persona_jax.errors import UserError

DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ESTALE, errno.EMFILE),
)
"""Error numbers caused by the disk or the path, not by the program."""


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Writes a file atomically: yields a temporary path beside `file` that replaces it at the end.

    The temporary file is removed if writing fails. It keeps the suffix of `file` and is unique to
    the process. Its permissions follow the umask, whatever the writer sets.
    """
    part = file.with_name(f".incomplete-{os.getpid()}-{file.name}")
    try:
        part.unlink(missing_ok=True)
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)
        part.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Writes a folder atomically: yields an empty one beside it, which gets its name at the end.

    Raises:
      OSError: it cannot be written, or `folder` exists and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".incomplete-") as temporary:
        inside = Path(temporary) / folder.name
        inside.mkdir()
        yield inside
        inside.replace(folder)


@contextlib.contextmanager
def as_os_error(file: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions by which a library reports a failed write into an OSError naming the file.

    Args:
      file: that is written.
      kinds: the library's exceptions.
    """
    try:
        yield
    except kinds as error:
        message = " ".join(str(error).split())
        number = next((n for n in DISK if os.strerror(n) in message), errno.EIO)
        raise OSError(number, os.strerror(number), str(file)) from error


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def name_below(folder: Path, name: str, what: str) -> Path:
    """``folder/name``, for a `name` that is not a path.

    Args:
      folder: the parent.
      name: of a file or folder in it.
      what: how the error calls the name, such as a flag.

    Raises:
      UserError: `name` is a path and would lead outside `folder`.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UserError(f"{what} {name!r}: expected a name, found a path or nothing")
    return folder / name
