"""Times persona_jax beside PyTorch diffusers: same weights, same shapes, same dtype, same run.

python -m benchmarks --size sd15

The sides are processes of their own and take turns, so that a machine that slows down slows down
for all. Prints a table, and with --out FILE.md appends it there: medians with the middle half of
the times, the ratios (above 1 where we are faster), our share of the speed at which a large matrix
product runs (by what PyTorch counts of the work), the first call, and the peak of memory.
With --compile PyTorch is timed with torch.compile too; with --flax PYTHON, the interpreter of an
environment that has diffusers 0.39.0, its Flax models are. Where there is a GPU all sides use it:

python -m benchmarks --size sd15 --dtype bfloat16 --compile --batch 8 --steps 50
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.sizes import SIZES, WHAT, size_of, write

TITLES = {
    "ours": "ours",
    "theirs": "PyTorch diffusers",
    "theirs_compiled": "with torch.compile",
    "theirs_flax": "diffusers' Flax",
}
"""What stands over each side's column, by the side's module."""
LACKS = {
    "theirs_compiled": ("matmul",),
    "theirs_flax": ("matmul", "clip", "whole_step"),
}
"""What a side has not."""
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")


def main(arguments: argparse.Namespace) -> None:
    """Towers → both sides of each item → a table."""
    folder = Path(arguments.folder or tempfile.gettempdir()) / f"benchmarks-{arguments.size}"
    write(SIZES[arguments.size], folder)
    rows, most = [], None
    usual = [what for what in WHAT if arguments.size != "sd15" or what != "whole_step"]
    for what in arguments.what or usual:
        found = take_turns(what, folder, arguments)
        if what == "matmul":
            most = found["theirs"]["flops"] / min(min(side["times"]) for side in found.values())
        rows.append(row(what, found, sides(arguments), most))
        print(rows[-1], flush=True)
    text = "\n".join([heading(arguments), "", *header(sides(arguments)), *rows, ""])
    print(text)
    if arguments.out:
        with Path(arguments.out).open("a") as file:
            file.write("\n" + text)


def sides(arguments: argparse.Namespace) -> list[str]:
    """Who takes part."""
    asked = {"theirs_compiled": arguments.compile, "theirs_flax": arguments.flax}
    return [side for side in TITLES if asked.get(side, True)]


def take_turns(what: str, folder: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    """Each side's times, first call and peak of memory."""
    there = [side for side in sides(arguments) if what not in LACKS.get(side, ())]
    if (what, arguments.size) == ("step", "sd15") and "theirs_flax" in there:
        there.remove("theirs_flax")  # takes over 16 GiB
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
        found[side] |= json.loads(read(worker))
        worker.wait()
    return found


def start(side: str, what: str, folder: Path, arguments: argparse.Namespace) -> subprocess.Popen:
    """A side, at work."""
    python = arguments.flax if side == "theirs_flax" else sys.executable
    argv = [python, "-m", "benchmarks.worker", side, what, arguments.size, arguments.batch]
    argv += [arguments.steps, folder, arguments.dtype]
    return subprocess.Popen(
        [str(argument) for argument in argv],
        # Where there is a GPU all sides have to find room on it.
        env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", **os.environ},
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
    columns += ["share of matmul", "first call", "peak memory"]
    return f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"


def row(what: str, found: dict[str, dict], there: list[str], most: float | None) -> str:
    """One line of the table; `most`: operations a second of the matrix product, if it was timed."""
    ours = found["ours"]
    cells = [what, spread(ours)]
    for side in there[1:]:
        if side not in found:
            cells += ["", ""]
            continue
        ratio = statistics.median(found[side]["times"]) / statistics.median(ours["times"])
        cells += [spread(found[side]), f"{ratio:.2f}"]
    share = most and found["theirs"]["flops"] / statistics.median(ours["times"]) / most
    cells += [f"{share:.0%}" if share else ""]
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
    size = size_of(arguments.size, arguments.batch, arguments.steps)
    cores = f"{os.cpu_count()} cores, {platform.machine()}{gpu()}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    command = f"python -m benchmarks --size {arguments.size} --dtype {arguments.dtype} --repeats "
    command += f"{arguments.repeats}"
    for name in ("batch", "steps"):
        command += f" --{name} {getattr(arguments, name)}" * bool(getattr(arguments, name))
    command += " --compile" * arguments.compile + " --flax PYTHON" * bool(arguments.flax)
    note = (
        "; diffusers' Flax (0.39.0) has no adapter and does less in both" if arguments.flax else ""
    )
    return (
        f"### {arguments.size}, {arguments.dtype}, batch {size.batch}\n\n"
        f"{cores}; {versions}. `{command}`; sampling: {size.steps} guided DDIM steps and the "
        f"decoder; step: of a plain adapter's training; whole_step: of all the UNet's{note}."
    )


def gpu() -> str:
    """The graphics card's name, after a comma, if there is one."""
    import torch

    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--size", choices=tuple(SIZES), default="small")
    flags.add_argument("--what", nargs="+", choices=WHAT, help="all, but for whole_step at sd15")
    flags.add_argument("--repeats", type=int, default=7)
    flags.add_argument("--batch", type=int, default=0, help="pictures at once; the size's own")
    flags.add_argument("--steps", type=int, default=0, help="of DDIM; the size's own")
    flags.add_argument("--compile", action="store_true", help="PyTorch with torch.compile too")
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument("--folder", help="for the towers; the system's for temporary files if not")
    flags.add_argument("--flax", metavar="PYTHON", help="that has diffusers 0.39.0")
    flags.add_argument("--out", help="a Markdown file to append the table to")
    return flags


if __name__ == "__main__":
    main(parser().parse_args())
