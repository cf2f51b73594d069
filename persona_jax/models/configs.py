"""Reads a tower's ``config.json`` into a dataclass of supported settings; refuses all others."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from persona_jax.errors import UserError, listed
from persona_jax.runtime import settings

T = TypeVar("T")


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a JSON value has a field's type: a plain type, ``tuple[plain, ...]`` or a union."""
    if isinstance(kind, types.UnionType):
        return any(_is_of(one, value) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_is_of(get_args(kind)[0], x) for x in value)
    if kind is not bool and isinstance(value, bool):
        return False
    return isinstance(value, (float, int) if kind is float else kind)


def parse(cls: type[T], raw: Mapping[str, Any], fixed: Mapping[str, tuple]) -> T:
    """A config dataclass from a published ``config.json``.

    Args:
      cls: frozen dataclass whose fields are the settings that may vary.
      raw: the file's content.
      fixed: settings for which only some values are supported, ``{key: accepted values}``.

    Raises:
      UserError: a setting has an unsupported value. Unknown settings that are off (None or False)
        are accepted, since they change nothing. Keys with a leading underscore are ignored.
    """
    assert dataclasses.is_dataclass(cls)
    fields = {f.name: f.type for f in dataclasses.fields(cls)}

    def understood(key: str, value: Any) -> bool:
        if key in fields:
            return _is_of(fields[key], value)
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
    settings.check({key: raw[key] for key in raw if key in fields}, cls.__name__)
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in raw.items()
        if key in fields
    }
    return cls(**values)


def divides(key: str, value: int, parts: int, what: str) -> None:
    """Raises UserError unless `value`, of setting `key`, divides by `parts`; `what` names these."""
    if value % parts:
        raise UserError(f"{key}={value} does not divide by {parts}, {what}")
