"""Files from outside: where they come from, and what their bytes must hash to before use.

Their list is ``assets/manifest.toml``: per asset the file names, mirrors and accepted checksums.
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
    """The project's list of outside assets (third_party/manifest.toml)."""
    text = importlib.resources.files("persona_jax").joinpath("assets/manifest.toml").read_text()
    return tomllib.loads(text)


def local(asset: str, folder: pathlib.Path) -> pathlib.Path | None:
    """The asset's file already in `folder`, if any."""
    names = manifest()[asset]["files"]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def verify(asset: str, file: pathlib.Path, sha256: str | None, key: str) -> str:
    """The file's SHA-256 (hex), if it is one that the manifest, or the user, accepts.

    Args:
      sha256: a further digest to accept.
      key: by which the user can give one.

    Raises:
      UserError: the file cannot be read, or is not one of those known.
    """
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            md5 = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    entry = manifest()[asset]
    known = {f"sha256:{found}", f"md5:{md5.hexdigest()}"} & set(entry["accepted"])
    if known or found == (sha256 or "").lower():
        return found
    raise UserError(
        f"{file}: sha256 {found} is none of the known files of {entry['title']}, so it is damaged "
        f"or another edition; get it again, or if you trust it, add {key}={found}"
    )


def find(
    asset: str, folder: pathlib.Path, sha256: str | None, *, key: str, remedy: str
) -> tuple[pathlib.Path, str]:
    """The verified file and its SHA-256, downloaded into `folder` where it is not there.

    A download takes its final name only once verified.

    Args:
      sha256, key: see :func:`verify`.
      remedy: how else to say where the file is, for the error.

    Raises:
      UserError: no such file to be had, or one whose checksum is not known.
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
            found = verify(asset, partial, sha256, key)
            return partial.rename(folder / name), found
        except (OSError, UserError) as error:
            failures.append(" ".join(str(error).split()))
        finally:
            partial.unlink(missing_ok=True)
    raise UserError(
        f"{entry['title']}: not in {folder}, and not to be downloaded ({'; '.join(failures)}): get "
        f"{' or '.join(entry['files'])} from {' or '.join(entry['mirrors'])} and put it in "
        f"{folder} ({remedy})"
    )


def _fetch(url: str, path: pathlib.Path) -> None:
    with urllib.request.urlopen(url, timeout=20) as response, path.open("wb") as file:
        total = int(response.headers.get("Content-Length", 0)) or None
        with tqdm.wrapattr(response, "read", total=total, desc=f"download {path.stem}") as reader:
            shutil.copyfileobj(reader, file, 1 << 20)
