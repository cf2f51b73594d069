"""The LFW archive: located in `manual_dir` or downloaded, verified, and read without unpacking."""

import pathlib
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator

from persona_jax.data import assets
from persona_jax.errors import UserError

ASSET = "lfw_deepfunneled"
KEY = "config.data.archive_sha256"
# Exceptions raised by reading a damaged tar, gzip or zip file.
DAMAGED = (EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError)


def local_archive(manual_dir: pathlib.Path) -> pathlib.Path | None:
    """Returns the archive in `manual_dir`; None if there is none."""
    return assets.local(ASSET, manual_dir)


def find_archive(manual_dir: pathlib.Path, sha256: str | None) -> tuple[pathlib.Path, str]:
    """Returns the verified archive and its SHA-256; downloads it if `manual_dir` has none.

    Args:
      sha256: hexadecimal digest of one more archive to accept.

    Raises:
      UserError: the archive cannot be obtained, or its checksum is unknown.
    """
    remedy = "or name its folder with config.data.manual_dir=DIR"
    return assets.find(ASSET, manual_dir, sha256, key=KEY, remedy=remedy)


def verify(archive: pathlib.Path, sha256: str | None) -> str:
    """Returns the archive's SHA-256 if the manifest or the user accepts it."""
    return assets.verify(ASSET, archive, sha256, KEY)


def photos(archive: pathlib.Path) -> Iterator[tuple[str, int, str, bytes]]:
    """Streams the archive's photos.

    Yields:
      person, photo number, file (`Person/Person_0001.jpg`) and encoded bytes of each photo.

    Raises:
      UserError: the archive is truncated or damaged.
    """
    try:
        for name, data in _members(archive):
            # Repacked archives nest the official folder deeper: use the last two components only.
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
    # Stream mode "r|gz" would accept an archive truncated between two files as complete.
    with tarfile.open(archive, "r:gz") as files:
        for member in files:
            if member.isfile() and (content := files.extractfile(member)) is not None:
                yield member.name, content.read()
