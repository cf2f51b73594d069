"""One side of a benchmark, in a process of its own: does the work once for every line it is given.

``python -m benchmarks.worker SIDE WHAT SIZE BATCH STEPS FOLDER DTYPE`` (0: the size's own) → a line
with the first call's seconds (compilation included), then one with seconds for every line read, and
at the end one of JSON: the peak of memory in bytes, the accelerator's where there is one, and the
floating point operations of a call where the side counts them. SIDE is a module of this package.
"""

import importlib
import json
import resource
import sys
import time
from pathlib import Path


def main(side: str, what: str, size: str, batch: str, steps: str, folder: str, dtype: str) -> None:
    """Made, called once, then once a line."""
    from benchmarks.sizes import size_of

    module = importlib.import_module(f"benchmarks.{side}")
    start = time.perf_counter()
    work = module.make(what, size_of(size, int(batch), int(steps)), Path(folder), dtype)
    work()
    print(time.perf_counter() - start, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        work()
        print(time.perf_counter() - start, flush=True)
    peak = module.device_memory() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    flops = module.count(work) if hasattr(module, "count") else None
    print(json.dumps({"peak": peak, "flops": flops}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
