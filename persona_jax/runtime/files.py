"""Files and folders that get their names when they are whole, with the permissions of the umask."""

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
"""What is the matter with a disk or a place, not with the program."""


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path beside `file` to write, which replaces it at the end; gone where writing fails.

    Whatever writes it, and with what mode, the file is as readable as the umask says. Each process
    has a path of its own; it ends as the file's name does.
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
    """An empty folder beside `folder` to fill, which gets its name at the end.

    Raises OSError where it cannot be written, or `folder` is there and not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".incomplete-") as temporary:
        inside = Path(temporary) / folder.name
        inside.mkdir()
        yield inside
        inside.replace(folder)


@contextlib.contextmanager
def as_os_error(file: Path, *kinds: type[Exception]) -> Iterator[None]:
    """What libraries raise where a disk does not take a file, as an OSError that names it."""
    try:
        yield
    except kinds as error:
        told = " ".join(str(error).split())
        number = next((n for n in DISK if os.strerror(n) in told), errno.EIO)
        raise OSError(number, os.strerror(number), str(file)) from error


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def name_below(folder: Path, name: str, what: str) -> Path:
    """``folder/name``, where `name` is one name and not a path.

    Args:
      what: how to call the name in an error, a flag say.

    Raises:
      UserError: it is a path, and would lead elsewhere.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UserError(f"{what} {name!r}: expected a name, found a path or nothing")
    return folder / name
