"""The LFW archive: found in `manual_dir` or downloaded, verified, and read without unpacking."""

import pathlib
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

from persona_jax.data import outside
from persona_jax.errors import UserError

ASSET = "lfw_deepfunneled"
KEY = "config.data.archive_sha256"
# What reading a damaged tar, gzip or zip raises.
DAMAGED = (EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError)


def local_archive(manual_dir: pathlib.Path) -> pathlib.Path | None:
    """The archive already in `manual_dir`, if any."""
    return outside.local(ASSET, manual_dir)


def find_archive(manual_dir: pathlib.Path, sha256: str | None) -> tuple[pathlib.Path, str]:
    """The verified archive and its SHA-256, downloaded where `manual_dir` has none.

    Args:
      sha256: hexadecimal digest of a further archive to accept.

    Raises:
      UserError: no archive to be had, or one whose checksum is not known.
    """
    remedy = "or name its folder with config.data.manual_dir=DIR"
    return outside.find(ASSET, manual_dir, sha256, key=KEY, remedy=remedy)


def verify(archive: pathlib.Path, sha256: str | None) -> str:
    """The archive's SHA-256, if it is one the manifest (or the user) accepts."""
    return outside.verify(ASSET, archive, sha256, KEY)


def photos(archive: pathlib.Path) -> Iterator[tuple[str, int, str, bytes]]:
    """Person, photo number, file (`Person/Person_0001.jpg`) and bytes of every photo, streamed.

    Raises:
      UserError: the archive ends early or is damaged.
    """
    try:
        for name, data in _members(archive):
            # Repacked archives nest the official folder once more: only the last two names count.
            parts = name.split("/")
            if match := re.fullmatch(r"(.+)_(\d{4})\.jpg", parts[-1]):
                person, number = match.groups()
                if len(parts) >= 2 and parts[-2] == person:
                    yield person, int(number), "/".join(parts[-2:]), data
    except DAMAGED as error:
        raise UserError(
            f"{archive}: truncated or damaged ({error}); delete it and get it again"
        ) from error


def _members(archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as files:
            for info in files.infolist():
                yield info.filename, files.read(info)
        return
    # Not the pipe mode "r|gz", which takes an archive cut between two files for a whole one.
    with tarfile.open(archive, "r:gz") as files:
        for member in files:
            if member.isfile():
                yield member.name, files.extractfile(member).read()
