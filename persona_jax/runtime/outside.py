"""Files from outside, read with bounds: regular ones only, no larger than can be; JSON objects."""

import json
import stat
from pathlib import Path
from typing import Any

from persona_jax.errors import UserError
from persona_jax.runtime import settings

MOST_JSON = 2**26
"""Bytes of a JSON file. The largest that is read names tensors, and vocabularies: a few MB."""


def regular(file: Path) -> int:
    """The size in bytes of what must be a regular file: a pipe or device may never end.

    Raises:
      UserError: it is something else.
      OSError: it is not there, or may not be looked at.
    """
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        kind = "a folder" if stat.S_ISDIR(about.st_mode) else "no regular file"
        raise UserError(f"{file}: expected a file, found {kind}")
    return about.st_size


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds, its settings within their ranges (:mod:`.settings`).

    Raises:
      UserError: not such a file; says why.
      FileNotFoundError: it is not there.
    """
    try:
        if (size := regular(file)) > MOST_JSON:
            raise UserError(
                f"{file}: {size} bytes; a JSON file of settings has {MOST_JSON} at most"
            )
        found = parse_json(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # (ValueError: a path that cannot be)
        raise UserError(f"{file}: cannot be read ({getattr(error, 'strerror', error)})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object, found {_kind(found)}")
    settings.check(found, str(file))
    return found


def parse_json(text: str | bytes, where: str) -> Any:
    """What JSON says. Raises UserError where it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError(f"{where}: not readable as JSON (nested too deeply)") from error
    except ValueError as error:
        raise UserError(f"{where}: not readable as JSON ({str(error)[:120]})") from error


def _kind(value: object) -> str:
    names = {list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
