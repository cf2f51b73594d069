"""The one exception a user is meant to see."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake the user can mend: wrong file, key, argument or value.

    The message is one line of less than 500 characters: what is wrong, where, and what to do. Entry
    points print it without a traceback and exit with status 2 (see
    :mod:`persona_jax.runtime.command_line`).

    Attributes:
      details: all that the message names the first few of, a line each; printed with ``--verbose``.
      argument: what to change, as a function's argument is called; a command adds which of its
        flags that is. Empty: not known. (Of configurations, a message has ``config.a.b=VALUE``.)
    """

    def __init__(self, message: str, details: Sequence[str] = (), *, argument: str = ""):
        """`message`, `details` and `argument` as above, line breaks as spaces; what a terminal does
        not show is written as in Python."""
        super().__init__(_printable(" ".join(message.split())))
        self.details = tuple(map(_printable, details))
        self.argument = argument


def shown(name: object) -> str:
    """A name as it may stand in a message: in one line, in UTF-8, and not too long."""
    text = _printable(str(name))
    return text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(names: Sequence[str], room: int = 120) -> str:
    """The first names, as many as `room` characters take but at least one, and how many more."""
    chosen: list[str] = []
    length = 0
    for name in names:
        length += len(name) + 2
        if chosen and length > room:
            break
        chosen.append(name if len(name) <= room else f"{name[:room]}…")
    more = f" and {len(names) - len(chosen)} more" if len(names) > len(chosen) else ""
    return ", ".join(chosen) + more
