"""Returns freed memory to the operating system (glibc)."""

import contextlib
import ctypes
import functools

import jax

LARGE = 2**28
"""Bytes of weights read, above which :func:`give_back` is worth its time."""

LONG = 2.0
"""Seconds of compilation, above which :func:`give_back` is worth its time."""


def give_back() -> None:
    """Returns freed memory now; glibc would keep it, and nothing would use it again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@functools.cache  # one listener is enough
def give_back_after_compilation() -> None:
    """Calls :func:`give_back` after each compilation of more than :data:`LONG` seconds.

    The compiler leaves two thirds of a gigabyte of freed memory after a large program.
    """

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs > LONG:
            give_back()

    jax.monitoring.register_event_duration_secs_listener(listen)
