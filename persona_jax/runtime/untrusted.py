"""Untrusted files: only regular ones of bounded size are read; JSON objects are validated."""

import json
import stat
from pathlib import Path
from typing import Any

from persona_jax.errors import UserError
from persona_jax.runtime import settings

MOST_JSON = 2**26
"""Maximal bytes of a JSON file. The largest in use (tensor lists, vocabularies) have a few MB."""


def regular(file: Path) -> int:
    """The size in bytes of a regular file. Pipes and devices are refused: they may never end.

    Raises:
      UserError: the path is not a regular file.
      OSError: the path does not exist, or access is denied.
    """
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        kind = "a folder" if stat.S_ISDIR(about.st_mode) else "no regular file"
        raise UserError(f"{file}: expected a file, found {kind}")
    return about.st_size


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object and checks that its settings are in their ranges (:mod:`.settings`).

    Raises:
      UserError: the file cannot be read, is not a JSON object, or has a setting out of range.
      FileNotFoundError: the file does not exist.
    """
    try:
        if (size := regular(file)) > MOST_JSON:
            raise UserError(
                f"{file}: {size} bytes; a JSON file of settings has {MOST_JSON} at most"
            )
        content = parse_json(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: an invalid path, with a NUL say
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {_kind(content)}")
    settings.check(content, str(file))
    return content


def parse_json(text: str | bytes, where: str) -> Any:
    """Parses JSON. Raises UserError if it is malformed or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError(f"{where}: not readable as JSON (nested too deeply)") from error
    except ValueError as error:
        raise UserError(f"{where}: not readable as JSON ({str(error)[:120]})") from error


def _kind(value: object) -> str:
    names = {list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
