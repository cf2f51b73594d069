"""Workarounds for Orbax and tensorstore: literal paths, one-line errors, reading to numpy."""

import contextlib
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from persona_jax.errors import UserError

UNSAFE = re.compile(r"[\\*?\[\]\ud800-\udfff]")
"""Characters that are unsafe in paths: Orbax takes them as patterns; tensorstore takes a backslash
as a slash, and fails on names that are not UTF-8."""


def barrier(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier between processes, except that a process whose write has failed raises.

    The other processes wait elsewhere for the missing files, so a failed process would wait here
    for minutes. Raising ends it at once, and the launcher then ends the others.

    Args:
      key: name of the barrier.
      timeout_ms: how long to wait for the other processes.
    """
    if error := sys.exc_info()[1]:
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def hush() -> None:
    """Suppress output that repeats an exception which Orbax raises as well.

    On a failed read or write, Orbax's threads also log the traceback, and tensorstore's threads
    print "Event loop is closed" through sys.unraisablehook, where it cannot be caught.
    """
    logger = logging.getLogger("absl")
    if _not_orbax in logger.filters:
        return
    logger.addFilter(_not_orbax)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def one_line(error: BaseException) -> str:
    """An error's type and message in one line of at most 240 characters."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    # tensorstore's messages begin with the operation and end with the cause: keeps both ends.
    return text if len(text) <= 240 else f"{text[:80]} … {text[-150:]}"


def read_numpy(folder: Path) -> Any:
    """Reads a tree saved by Orbax as nested dicts of numpy arrays."""
    handler = ocp.PyTreeCheckpointHandler()
    try:
        with plainly_named(folder) as plain:
            names = jax.tree.map(lambda _: "", handler.metadata(plain).tree)
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
            arguments = ocp.args.PyTreeRestore(names, restore_args=as_numpy)
            return handler.restore(plain, args=arguments)
    finally:
        handler.close()


@contextlib.contextmanager
def plainly_named(directory: Path) -> Iterator[Path]:
    """A path to `directory` that Orbax and tensorstore take literally.

    It is a temporary symbolic link if the directory's path has characters in :data:`UNSAFE`.

    Raises:
      UserError: the folder for temporary files has such a path, too.
    """
    if not UNSAFE.search(str(directory)):
        yield directory
        return
    home = Path(tempfile.mkdtemp(prefix="persona_jax-"))
    try:
        if UNSAFE.search(str(home)):
            raise UserError(
                f"{directory}: its name, and that of the folder for temporary files, {home.parent},"
                " have one of \\ * ? [ ]; rename one, or set TMPDIR"
            )
        (home / "link").symlink_to(directory)
        yield home / "link"
    finally:
        shutil.rmtree(home, ignore_errors=True)
