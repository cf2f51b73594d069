"""One process of a machine at a time."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def alone(data_dir: pathlib.Path, lock: str = ".lock") -> Iterator[None]:
    """Lets one process of a machine build what lies in `data_dir` while the others wait.

    lock: name of the file in `data_dir` that stands for what is built.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / lock).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that builds data in {data_dir}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
