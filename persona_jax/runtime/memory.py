"""Memory that is free again goes back to the system, where the C library can (glibc)."""

import contextlib
import ctypes
import functools

import jax

LARGE = 2**28
"""Bytes of weights read, after which it is worth the time."""

LONG = 2.0
"""Seconds of a compilation that may have taken much memory."""


def give_back() -> None:
    """What was freed goes back now: it is kept for later otherwise, and never used again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@functools.cache  # one listener is enough
def give_back_after_compilation() -> None:
    """What the compiler leaves, two thirds of a gigabyte after a large program, goes back after
    every long compilation."""

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and seconds > LONG:
            give_back()

    jax.monitoring.register_event_duration_secs_listener(listen)
