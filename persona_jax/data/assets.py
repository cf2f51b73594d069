"""Outside assets: locates or downloads files and verifies their checksums before use.

``assets/manifest.toml`` lists file names, mirrors and accepted checksums of each asset.
"""

import hashlib
import importlib.resources
import pathlib
import shutil
import tomllib
import urllib.request

from tqdm import tqdm

from persona_jax.errors import UserError


def manifest() -> dict:
    """Returns the project's list of outside assets (assets/manifest.toml)."""
    text = importlib.resources.files("persona_jax").joinpath("assets/manifest.toml").read_text()
    return tomllib.loads(text)


def local(asset: str, folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the asset's file in `folder`; None if there is none."""
    names = manifest()[asset]["files"]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def verify(asset: str, file: pathlib.Path, sha256: str | None, key: str) -> str:
    """Returns the file's SHA-256 (hex) if the manifest or the user accepts it.

    Args:
      sha256: one more digest to accept.
      key: the setting by which a user gives that digest, for the error.

    Raises:
      UserError: the file cannot be read, or its checksum is unknown.
    """
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            md5 = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    entry = manifest()[asset]
    known = {f"sha256:{digest}", f"md5:{md5.hexdigest()}"} & set(entry["accepted"])
    if known or digest == (sha256 or "").lower():
        return digest
    raise UserError(
        f"{file}: sha256 {digest} is none of the known files of {entry['title']}, so it is damaged "
        f"or another edition; get it again, or if you trust it, add {key}={digest}"
    )


def find(
    asset: str, folder: pathlib.Path, sha256: str | None, *, key: str, remedy: str
) -> tuple[pathlib.Path, str]:
    """Returns the verified file and its SHA-256; downloads it into `folder` if it is absent.

    A download gets its final name only after verification.

    Args:
      sha256, key: see :func:`verify`.
      remedy: another way to name the file's location, for the error.

    Raises:
      UserError: the file cannot be obtained, or its checksum is unknown.
    """
    if (file := local(asset, folder)) is not None:
        return file, verify(asset, file, sha256, key)
    entry, failures = manifest()[asset], []
    for url in entry["mirrors"]:
        name = url.rsplit("/", 1)[1]
        partial = folder / f"{name}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(url, partial)
            digest = verify(asset, partial, sha256, key)
            return partial.rename(folder / name), digest
        except (OSError, UserError) as error:
            failures.append(" ".join(str(error).split()))
        finally:
            partial.unlink(missing_ok=True)
    raise UserError(
        f"{entry['title']}: not in {folder}, and the download failed ({'; '.join(failures)}): get "
        f"{' or '.join(entry['files'])} from {' or '.join(entry['mirrors'])} and put it in "
        f"{folder} ({remedy})"
    )


def _fetch(url: str, path: pathlib.Path) -> None:
    with urllib.request.urlopen(url, timeout=20) as response, path.open("wb") as file:
        total = int(response.headers.get("Content-Length", 0)) or None
        with tqdm.wrapattr(response, "read", total=total, desc=f"download {path.stem}") as reader:
            shutil.copyfileobj(reader, file, 1 << 20)
