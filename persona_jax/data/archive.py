"""The LFW archive: found in `manual_dir` or downloaded, verified, and read without unpacking."""

import hashlib
import importlib.resources
import pathlib
import re
import shutil
import tarfile
import tomllib
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator

from tqdm import tqdm

from persona_jax.errors import UserError

NAMES = ("lfw-deepfunneled.tgz", "lfw-deepfunneled.zip")
# What reading a damaged tar, gzip or zip raises.
DAMAGED = (EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError)


def manifest() -> dict:
    """The project's list of outside assets (third_party/manifest.toml)."""
    text = importlib.resources.files("persona_jax").joinpath("assets/manifest.toml").read_text()
    return tomllib.loads(text)


def local_archive(manual_dir: pathlib.Path) -> pathlib.Path | None:
    """The archive already in `manual_dir`, if any."""
    return next((manual_dir / name for name in NAMES if (manual_dir / name).is_file()), None)


def find_archive(manual_dir: pathlib.Path, sha256: str | None) -> tuple[pathlib.Path, str]:
    """The verified archive and its SHA-256, downloaded where `manual_dir` has none.

    Args:
      sha256: hexadecimal digest of a further archive to accept.

    Raises:
      UserError: no archive to be had, or one whose checksum is not known.
    """
    archive = local_archive(manual_dir)
    if archive is None:
        return _download(manual_dir, sha256)
    return archive, verify(archive, sha256)


def verify(archive: pathlib.Path, sha256: str | None) -> str:
    """The archive's SHA-256, if it is one the manifest (or the user) accepts."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    accepted = manifest()["lfw_deepfunneled"]["accepted"]
    if found == (sha256 or "").lower() or {f"sha256:{found}", f"md5:{md5}"} & set(accepted):
        return found
    raise UserError(
        f"{archive}: sha256 {found} is none of the known LFW deep-funneled archives, so it is "
        "damaged or another edition; get it again, or if you trust it, add "
        f"--config.data.archive_sha256={found}"
    )


def _download(manual_dir: pathlib.Path, sha256: str | None) -> tuple[pathlib.Path, str]:
    """Tries the mirrors in turn; a file takes its final name only once verified."""
    mirrors = manifest()["lfw_deepfunneled"]["mirrors"]
    failures = []
    for url in mirrors:
        name = url.rsplit("/", 1)[1]
        partial = manual_dir / f"{name}.part"
        try:
            manual_dir.mkdir(parents=True, exist_ok=True)
            _fetch(url, partial)
            found = verify(partial, sha256)
            return partial.rename(manual_dir / name), found
        except (OSError, UserError) as error:
            failures.append(" ".join(str(error).split()))
        finally:
            partial.unlink(missing_ok=True)
    raise UserError(
        f"no LFW archive in {manual_dir} and none could be downloaded ({'; '.join(failures)}): "
        f"get {' or '.join(NAMES)} from {' or '.join(mirrors)} and put it in {manual_dir} "
        "(or name its folder with --config.data.manual_dir=DIR)"
    )


def _fetch(url: str, path: pathlib.Path) -> None:
    with urllib.request.urlopen(url, timeout=20) as response, path.open("wb") as file:
        total = int(response.headers.get("Content-Length", 0)) or None
        with tqdm.wrapattr(response, "read", total=total, desc=f"download {path.stem}") as reader:
            shutil.copyfileobj(reader, file, 1 << 20)


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
