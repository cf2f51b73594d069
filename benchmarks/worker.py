"""One side of a benchmark, in a process of its own: does the work once for every line it is given.

``python -m benchmarks.worker SIDE WHAT SIZE FOLDER DTYPE`` → a line with the first call's seconds
(compilation included), then one with seconds for every line read, and at the end the peak of
resident memory in bytes. SIDE is a module of this package.
"""

import importlib
import resource
import sys
import time
from pathlib import Path


def main(side: str, what: str, size: str, folder: str, dtype: str) -> None:
    """Made, called once, then once a line."""
    from benchmarks.sizes import SIZES

    module = importlib.import_module(f"benchmarks.{side}")
    start = time.perf_counter()
    work = module.make(what, SIZES[size], Path(folder), dtype)
    work()
    print(time.perf_counter() - start, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        work()
        print(time.perf_counter() - start, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
