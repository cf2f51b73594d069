"""Reading a tower's ``config.json``: what is supported is a dataclass, all else is refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from persona_jax.errors import UserError, listed

T = TypeVar("T")


def parse(cls: type[T], raw: Mapping[str, Any], fixed: Mapping[str, tuple]) -> T:
    """A config dataclass from a published ``config.json``.

    Args:
      cls: frozen dataclass whose fields are the settings that may vary.
      raw: the file's content.
      fixed: settings that are understood in these values only, ``{key: accepted values}``.

    Raises:
      UserError: a setting has a value that is not supported. Unknown settings that are switched
        off (None or False) are harmless and pass; keys with a leading underscore are notes.
    """
    fields = {f.name: f.type for f in dataclasses.fields(cls)}

    def understood(key: str, value: Any) -> bool:
        if key in fields:
            plain = {float: (float, int), int: int, bool: bool, str: str}
            return isinstance(value, plain.get(fields[key], (int, list, tuple)))
        return value in fixed[key] if key in fixed else value is None or value is False

    wrong = [
        f"{key}={value!r:.60}"
        for key, value in raw.items()
        if not key.startswith("_") and not understood(key, value)
    ]
    if wrong:
        raise UserError(
            f"{cls.__name__}: unsupported settings in config.json: {listed(wrong, 300)}", wrong
        )
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in raw.items()
        if key in fields
    }
    return cls(**values)
