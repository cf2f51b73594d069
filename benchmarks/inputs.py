"""Measures the input pipeline's examples per second, beside those of a training step.

python -m benchmarks.inputs --size small

Writes random encodings in the format of training; then only the loader runs, with ten photos per
example. Both ways of reading are timed: from arrays held in memory, as small ones are, and record
by record from files. The step is the one of ``python -m benchmarks``.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.__main__ import read, start
from benchmarks.sizes import SIZES, TEXT_LENGTH, Size, write
from persona_jax.data import records
from persona_jax.data.loader import batches
from persona_jax.data.records import Records, Writer

PEOPLE, PHOTOS, SHARD = 100, 10, 250


def main(arguments: argparse.Namespace) -> None:
    """Prints examples per second of each way of reading, relative to those of the step."""
    size = SIZES[arguments.size]
    with tempfile.TemporaryDirectory() as folder:
        measured = {}
        for title, held in (("held in memory", 2**40), ("record by record", 0)):
            records.IN_MEMORY = held
            measured[title] = [rate(encodings(size, Path(folder)), size.batch) for _ in range(5)]
    towers = Path(arguments.folder or tempfile.gettempdir()) / f"benchmarks-{arguments.size}"
    write(size, towers)
    worker = start("ours", "step", towers, arguments)
    read(worker)
    steps = []
    for _ in range(5):
        worker.stdin.write("once\n")
        worker.stdin.flush()
        steps.append(size.batch / float(read(worker)))
    worker.kill()
    step = statistics.median(steps)
    for title, rates in measured.items():
        middle = statistics.median(rates)
        print(
            f"{arguments.size}, batch {size.batch}, {title}: {middle:.0f} examples/s "
            f"({min(rates):.0f} to {max(rates):.0f}), {middle / step:.0f} times the "
            f"step's {step:.1f}"
        )


def encodings(size: Size, folder: Path) -> Mapping[str, Records]:
    """Returns random encodings of 1,000 photos in both orientations; writes the shards once."""
    side, channels = size.unet["sample_size"], size.vae["latent_channels"]
    shapes = {
        "moments": ((2, side, side, 2 * channels), "float32"),
        "embeddings": ((2, size.image_encoder["projection_dim"]), "float32"),
        "tokens": ((TEXT_LENGTH,), "int32"),
    }
    rng, out = np.random.default_rng(0), {}
    for label, (shape, dtype) in shapes.items():
        leading = 1 if label == "tokens" else 2
        files = [folder / f"{label}-{i}" for i in range(PEOPLE * PHOTOS // SHARD)]
        for file in files:
            if not file.exists():
                with Writer(file) as writer:
                    for _ in range(SHARD):
                        row = rng.integers(0, 99, shape).astype(dtype)
                        writer.append(row[None] if leading == 1 else row)
        out[label] = Records(files, (PEOPLE * PHOTOS, *shape), dtype, leading)
    return out


def rate(arrays: Mapping[str, Records], batch: int, seconds: float = 3.0) -> float:
    """Returns the loader's examples per second."""
    people = [np.arange(i * PHOTOS, (i + 1) * PHOTOS) for i in range(PEOPLE)]
    stream = batches(arrays, people, batch_size=batch, n=PHOTOS, fixed=False, flip=True, seed=0)
    next(stream)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        next(stream)
        count += batch
    return count / (time.perf_counter() - begin)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--size", choices=tuple(SIZES), default="small")
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.set_defaults(batch=0, steps=0)  # the size's own
    flags.add_argument("--folder", help="where towers are kept (the system's temporary folder)")
    return flags


if __name__ == "__main__":
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # array_record reads absl's flags, which must be parsed
    main(parser().parse_args())
