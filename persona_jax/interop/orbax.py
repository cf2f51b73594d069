"""What Orbax and tensorstore need around them: literal paths, quiet failures, plain reading."""

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
"""In a path: Orbax reads it as a pattern, tensorstore a backslash as a slash and only UTF-8."""


def barrier(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier between processes, but one whose writing has failed does not wait there.

    The others wait elsewhere for what it could not write, all of them for minutes; so it raises
    what went wrong, ends, and whoever started the processes ends the others.
    """
    if error := sys.exc_info()[1]:
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def hush() -> None:
    """Keep a failed read or write to the one line of the exception it also raises.

    Orbax's threads log its traceback once more, and tensorstore's, finding the event loop gone,
    print that as an exception nobody can catch.
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
    """An error of theirs, told in a line of 240 characters."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    # Tensorstore begins with what it was doing and ends with why it could not.
    return text if len(text) <= 240 else f"{text[:80]} … {text[-150:]}"


def read_numpy(folder: Path) -> Any:
    """A tree that Orbax saved, as nested dicts of numpy arrays."""
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
    """A path to `directory` that Orbax and tensorstore take literally: a link, where its own name
    has what they read as a pattern or another path."""
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
