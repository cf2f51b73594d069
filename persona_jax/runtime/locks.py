"""File locks between the processes of one machine."""

import contextlib
import errno
import fcntl
import pathlib
from collections.abc import Iterator

NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers of a folder that this process may not write to, and so needs no lock for."""


@contextlib.contextmanager
def alone(data_dir: pathlib.Path, lock: str = ".lock") -> Iterator[None]:
    """Lets one process of a machine write to `data_dir` while the others wait.

    A folder without write permission can only be read, so there is no lock and no wait.

    Args:
      data_dir: made if absent.
      lock: name of the lock file in it.
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
