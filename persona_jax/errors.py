"""The one exception a user is meant to see."""


class UserError(Exception):
    """A mistake the user can mend: wrong file, key, flag or value.

    The message is one line: what is wrong, where, and what to do. Entry points print it
    without a traceback and exit with status 2 (see :mod:`persona_jax.runtime.command_line`).
    """
