"""Times persona_jax beside PyTorch diffusers: same weights, same shapes, same dtype, same run.

python -m benchmarks --size sd15

Both sides are processes of their own and take turns, so that a machine that slows down slows down
for both. Prints a table, and with --out FILE.md appends it there: medians with the middle half
of the times, the ratio (above 1 where we are faster), the first call, and the peak of memory.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.sizes import SIZES, WHAT, write

SIDES = ("ours", "theirs")
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")


def main(arguments: argparse.Namespace) -> None:
    """Towers → both sides of each item → a table."""
    folder = Path(arguments.folder or tempfile.gettempdir()) / f"benchmarks-{arguments.size}"
    write(SIZES[arguments.size], folder)
    rows = []
    for what in arguments.what:
        rows.append(row(what, pair(what, folder, arguments)))
        print(rows[-1], flush=True)
    text = "\n".join([heading(arguments), "", *HEADER, *rows, ""])
    print(text)
    if arguments.out:
        with Path(arguments.out).open("a") as file:
            file.write("\n" + text)


def pair(what: str, folder: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    """Each side's times, first call and peak of memory; they take turns."""
    workers = {side: start(side, what, folder, arguments) for side in SIDES}
    found = {side: {"first": float(read(worker)), "times": []} for side, worker in workers.items()}
    for turn in range(arguments.repeats):
        for side in SIDES if turn % 2 else SIDES[::-1]:
            workers[side].stdin.write("once\n")
            workers[side].stdin.flush()
            found[side]["times"].append(float(read(workers[side])))
    for side, worker in workers.items():
        worker.stdin.close()
        found[side]["peak"] = float(read(worker))
        worker.wait()
    return found


def start(side: str, what: str, folder: Path, arguments: argparse.Namespace) -> subprocess.Popen:
    """A side, at work."""
    argv = [sys.executable, "-m", "benchmarks.worker", side, what, arguments.size]
    return subprocess.Popen(
        [*argv, str(folder), arguments.dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read(worker: subprocess.Popen) -> str:
    """The next line; an error where the side is dead."""
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{' '.join(worker.args[2:])}: exit status {worker.wait()}")
    return line


HEADER = (
    "| | ours | PyTorch diffusers | ratio | first call | peak memory |",
    "|---|---|---|---|---|---|",
)


def row(what: str, found: dict[str, dict]) -> str:
    """One line of the table."""
    ours, theirs = (found[side] for side in SIDES)
    ratio = statistics.median(theirs["times"]) / statistics.median(ours["times"])
    firsts = f"{ours['first']:.1f} / {theirs['first']:.1f} s"
    peaks = f"{ours['peak'] / 2**30:.2f} / {theirs['peak'] / 2**30:.2f} GiB"
    return f"| {what} | {spread(ours)} | {spread(theirs)} | {ratio:.2f} | {firsts} | {peaks} |"


def spread(side: dict) -> str:
    """Median and the middle half, in seconds."""
    times = side["times"]
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return f"{middle:.3g} s ({low:.3g} to {high:.3g})"


def heading(arguments: argparse.Namespace) -> str:
    """What was timed, where, with what."""
    size = SIZES[arguments.size]
    cores = f"{os.cpu_count()} cores, {platform.machine()}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return (
        f"### {arguments.size}, {arguments.dtype}, batch {size.batch}\n\n"
        f"{cores}; {versions}. `python -m benchmarks --size {arguments.size} --dtype "
        f"{arguments.dtype} --repeats {arguments.repeats}`; sampling: {size.steps} guided DDIM "
        "steps and the decoder; step: of a plain adapter's training."
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--size", choices=tuple(SIZES), default="small")
    flags.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    flags.add_argument("--repeats", type=int, default=7)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument("--folder", help="for the towers; the system's for temporary files if not")
    flags.add_argument("--out", help="a Markdown file to append the table to")
    return flags


if __name__ == "__main__":
    main(parser().parse_args())
