"""Times persona_jax beside PyTorch diffusers: same weights, same shapes, same dtype, same run.

python -m benchmarks --size sd15

The sides are processes of their own and take turns, so that a machine that slows down slows down
for all. Prints a table, and with --out FILE.md appends it there: medians with the middle half
of the times, the ratios (above 1 where we are faster), the first call, and the peak of memory.
With --flax PYTHON, the interpreter of an environment that has diffusers 0.39.0, its Flax models are
timed too.
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

TITLES = {
    "ours": "ours",
    "theirs": "PyTorch diffusers",
    "theirs_flax": "diffusers' Flax",
}
"""What stands over each side's column, by the side's module."""
NO_FLAX = {"small": ("clip", "whole_step"), "sd15": ("clip", "whole_step", "step")}
"""What diffusers' Flax has not; its step at sd15 takes over 16 GiB."""
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")


def main(arguments: argparse.Namespace) -> None:
    """Towers → both sides of each item → a table."""
    folder = Path(arguments.folder or tempfile.gettempdir()) / f"benchmarks-{arguments.size}"
    write(SIZES[arguments.size], folder)
    rows = []
    usual = [what for what in WHAT if arguments.size != "sd15" or what != "whole_step"]
    for what in arguments.what or usual:
        rows.append(row(what, take_turns(what, folder, arguments), sides(arguments)))
        print(rows[-1], flush=True)
    text = "\n".join([heading(arguments), "", *header(sides(arguments)), *rows, ""])
    print(text)
    if arguments.out:
        with Path(arguments.out).open("a") as file:
            file.write("\n" + text)


def sides(arguments: argparse.Namespace) -> list[str]:
    """Who takes part."""
    return [side for side in TITLES if side != "theirs_flax" or arguments.flax]


def take_turns(what: str, folder: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    """Each side's times, first call and peak of memory."""
    there = [
        s for s in sides(arguments) if s != "theirs_flax" or what not in NO_FLAX[arguments.size]
    ]
    workers, found = {}, {}
    for side in there:  # one after the other: compilation takes all cores
        workers[side] = start(side, what, folder, arguments)
        found[side] = {"first": float(read(workers[side])), "times": []}
    for turn in range(arguments.repeats):
        for side in there if turn % 2 else there[::-1]:
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
    python = arguments.flax if side == "theirs_flax" else sys.executable
    argv = [python, "-m", "benchmarks.worker", side, what, arguments.size]
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


def header(there: list[str]) -> tuple[str, str]:
    """The first lines of the table."""
    columns = ["", TITLES[there[0]]]
    columns += [title for side in there[1:] for title in (TITLES[side], "ratio")]
    columns += ["first call", "peak memory"]
    return f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"


def row(what: str, found: dict[str, dict], there: list[str]) -> str:
    """One line of the table."""
    ours = found["ours"]
    cells = [what, spread(ours)]
    for side in there[1:]:
        if side not in found:
            cells += ["", ""]
            continue
        ratio = statistics.median(found[side]["times"]) / statistics.median(ours["times"])
        cells += [spread(found[side]), f"{ratio:.2f}"]
    cells += [" / ".join(f"{side['first']:.1f}" for side in found.values()) + " s"]
    cells += [" / ".join(f"{side['peak'] / 2**30:.2f}" for side in found.values()) + " GiB"]
    return f"| {' | '.join(cells)} |"


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
    command = f"python -m benchmarks --size {arguments.size} --dtype {arguments.dtype} --repeats "
    command += f"{arguments.repeats}{' --flax PYTHON' * bool(arguments.flax)}"
    note = (
        "; diffusers' Flax (0.39.0) has no adapter and does less in both" if arguments.flax else ""
    )
    return (
        f"### {arguments.size}, {arguments.dtype}, batch {size.batch}\n\n"
        f"{cores}; {versions}. `{command}`; sampling: {size.steps} guided DDIM steps and the "
        f"decoder; step: of a plain adapter's training; whole_step: of all the UNet's{note}."
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--size", choices=tuple(SIZES), default="small")
    flags.add_argument("--what", nargs="+", choices=WHAT, help="all, but for whole_step at sd15")
    flags.add_argument("--repeats", type=int, default=7)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument("--folder", help="for the towers; the system's for temporary files if not")
    flags.add_argument("--flax", metavar="PYTHON", help="that has diffusers 0.39.0")
    flags.add_argument("--out", help="a Markdown file to append the table to")
    return flags


if __name__ == "__main__":
    main(parser().parse_args())
