"""One side of a benchmark in its own process: runs an item once for every line on stdin.

``python -m benchmarks.worker SIDE WHAT SIZE BATCH STEPS FOLDER DTYPE``. SIDE is a module of this
package; BATCH or STEPS 0 stand for those of the size. The first line on stdout is the time of the
first call in seconds, compilation included. One line of seconds follows for every line read. At the
end comes a line of JSON: peak memory in bytes (of the accelerator, if there is one), and the
floating-point operations of a call, if the side counts them.
"""

import importlib
import json
import resource
import sys
import time
from pathlib import Path


def main(side: str, what: str, size: str, batch: str, steps: str, folder: str, dtype: str) -> None:
    """Makes the item's function, calls it once, then once per line read."""
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
