"""One process of a machine at a time."""

import contextlib
import errno
import fcntl
import pathlib
from collections.abc import Iterator

NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Of a place that this process may not write to, and so neither builds in."""


@contextlib.contextmanager
def alone(data_dir: pathlib.Path, lock: str = ".lock") -> Iterator[None]:
    """Lets one process of a machine build what lies in `data_dir` while the others wait.

    What lies in a place that cannot be written to can only be read: nobody is waited for.

    lock: name of the file in `data_dir` that stands for what is built.
    """
    with contextlib.ExitStack() as stack:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((data_dir / lock).open("w"))
        except OSError as error:
            if error.errno not in NOT_OURS or not data_dir.is_dir():
                raise
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that builds data in {data_dir}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
