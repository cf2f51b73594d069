"""The exception for users' errors, and formatting of its messages."""

from collections.abc import Sequence


class UserError(Exception):
    """An error that the user can correct: a wrong file, key, argument or value.

    The message is one line of less than 500 characters: what is wrong, where, and what to do.
    Commands print it without a traceback and exit with status 2 (see
    :mod:`persona_jax.runtime.command_line`).

    Attributes:
      details: the full list, one line each, if the message names only the first few items; printed
        with ``--verbose``.
      argument: name of the function argument to change; a command names the flag for it. Empty: not
        known. (For configurations, the message contains ``config.a.b=VALUE``.)
    """

    def __init__(self, message: str, details: Sequence[str] = (), *, argument: str = ""):
        """Takes the attributes and the message.

        Line breaks of the message become spaces; unprintable characters are escaped as in Python.
        """
        super().__init__(_printable(" ".join(message.split())))
        self.details = tuple(map(_printable, details))
        self.argument = argument


def shown(name: object) -> str:
    """Formats a name for a message: on one line, in UTF-8, at most 200 characters."""
    text = _printable(str(name))
    return text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(names: Sequence[str], room: int = 120) -> str:
    """Formats the first names that fit in `room` characters, at least one, and counts the rest."""
    chosen: list[str] = []
    length = 0
    for name in names:
        length += len(name) + 2
        if chosen and length > room:
            break
        chosen.append(name if len(name) <= room else f"{name[:room]}…")
    more = f" and {len(names) - len(chosen)} more" if len(names) > len(chosen) else ""
    return ", ".join(chosen) + more
