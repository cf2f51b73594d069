"""The one exception a user is meant to see."""


class UserError(Exception):
    """A mistake the user can mend: wrong file, key, argument or value.

    The message is one line: what is wrong, where, and what to do. Entry points print it
    without a traceback and exit with status 2 (see :mod:`persona_jax.runtime.command_line`).

    Attributes:
      argument: what to change, as a function's argument or a configuration's key is called
        ("image_encoder.path"); a command adds which of its flags that is. Empty: not known.
    """

    def __init__(self, message: str, *, argument: str = ""):
        """`message` and `argument` as above."""
        super().__init__(message)
        self.argument = argument


def shown(name: object) -> str:
    """A name as it may stand in a message: in one line, in UTF-8, and not too long."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))
    return text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}"
