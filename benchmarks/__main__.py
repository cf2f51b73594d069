"""Times persona_jax beside PyTorch diffusers: same weights, same shapes, same dtype, same run.

python -m benchmarks --size sd15

Each side runs in its own process, and the sides take turns, so that a slow phase of the machine
affects all of them. Prints a table, and appends it to a file with --out FILE.md. It shows the
median time with its interquartile range, the ratios (above 1: persona_jax is faster), the share of
the speed of a large matrix product (operations as counted by PyTorch), the time of the first call,
and peak memory. --compile also times PyTorch with torch.compile. --flax PYTHON, an interpreter
whose environment has diffusers 0.39.0, also times its Flax models. If there is a GPU, all sides use
it:

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
"""Column title of each side, by the side's module."""
LACKS = {
    "theirs_compiled": ("matmul",),
    "theirs_flax": ("matmul", "clip", "whole_step"),
}
"""Items that a side cannot run."""
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")


def main(arguments: argparse.Namespace) -> None:
    """Writes the towers, times each item on all sides, and prints the table."""
    folder = Path(arguments.folder or tempfile.gettempdir()) / f"benchmarks-{arguments.size}"
    write(SIZES[arguments.size], folder)
    rows, most = [], None
    usual = [what for what in WHAT if arguments.size != "sd15" or what != "whole_step"]
    for what in arguments.what or usual:
        results = take_turns(what, folder, arguments)
        if what == "matmul":
            most = results["theirs"]["flops"] / min(min(side["times"]) for side in results.values())
        rows.append(row(what, results, sides(arguments), most))
        print(rows[-1], flush=True)
    text = "\n".join([heading(arguments), "", *header(sides(arguments)), *rows, ""])
    print(text)
    if arguments.out:
        with Path(arguments.out).open("a") as file:
            file.write("\n" + text)


def sides(arguments: argparse.Namespace) -> list[str]:
    """Returns the sides to time."""
    asked = {"theirs_compiled": arguments.compile, "theirs_flax": arguments.flax}
    return [side for side in TITLES if asked.get(side, True)]


def take_turns(what: str, folder: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    """Returns each side's times and first call in seconds, its peak memory in bytes, and FLOPs."""
    there = [side for side in sides(arguments) if what not in LACKS.get(side, ())]
    if (what, arguments.size) == ("step", "sd15") and "theirs_flax" in there:
        there.remove("theirs_flax")  # needs more than 16 GiB
    workers, results = {}, {}
    for side in there:  # one after the other, because compilation uses all cores
        workers[side] = start(side, what, folder, arguments)
        results[side] = {"first": float(read(workers[side])), "times": []}
    for turn in range(arguments.repeats):
        for side in there if turn % 2 else there[::-1]:
            workers[side].stdin.write("once\n")
            workers[side].stdin.flush()
            results[side]["times"].append(float(read(workers[side])))
    for side, worker in workers.items():
        worker.stdin.close()
        results[side] |= json.loads(read(worker))
        worker.wait()
    return results


def start(side: str, what: str, folder: Path, arguments: argparse.Namespace) -> subprocess.Popen:
    """Starts the worker process of a side."""
    python = arguments.flax if side == "theirs_flax" else sys.executable
    argv = [python, "-m", "benchmarks.worker", side, what, arguments.size, arguments.batch]
    argv += [arguments.steps, folder, arguments.dtype]
    return subprocess.Popen(
        [str(argument) for argument in argv],
        # JAX would reserve most of the GPU's memory, which all sides share.
        env={"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", **os.environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def read(worker: subprocess.Popen) -> str:
    """Returns the worker's next line. Raises SystemExit if it has ended."""
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{' '.join(worker.args[2:])}: exit status {worker.wait()}")
    return line


def header(there: list[str]) -> tuple[str, str]:
    """Returns the first two lines of the table."""
    columns = ["", TITLES[there[0]]]
    columns += [title for side in there[1:] for title in (TITLES[side], "ratio")]
    columns += ["share of matmul", "first call", "peak memory"]
    return f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"


def row(what: str, results: dict[str, dict], there: list[str], most: float | None) -> str:
    """Returns one line of the table.

    Args:
      what: the item.
      results: of :func:`take_turns`.
      there: the sides that have a column.
      most: FLOP/s of the matrix product, if it was timed.
    """
    ours = results["ours"]
    cells = [what, spread(ours)]
    for side in there[1:]:
        if side not in results:
            cells += ["", ""]
            continue
        ratio = statistics.median(results[side]["times"]) / statistics.median(ours["times"])
        cells += [spread(results[side]), f"{ratio:.2f}"]
    share = most and results["theirs"]["flops"] / statistics.median(ours["times"]) / most
    cells += [f"{share:.0%}" if share else ""]
    cells += [" / ".join(f"{side['first']:.1f}" for side in results.values()) + " s"]
    cells += [" / ".join(f"{side['peak'] / 2**30:.2f}" for side in results.values()) + " GiB"]
    return f"| {' | '.join(cells)} |"


def spread(side: dict) -> str:
    """Returns median and quartiles, in seconds."""
    times = side["times"]
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return f"{middle:.3g} s ({low:.3g} to {high:.3g})"


def heading(arguments: argparse.Namespace) -> str:
    """Returns the table's heading: size, machine, versions, command and items."""
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
        f"decoder; step: one training step of a plain adapter; whole_step: of the whole UNet{note}."
    )


def gpu() -> str:
    """Returns a comma and the GPU's name; an empty string without a GPU."""
    import torch

    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--size", choices=tuple(SIZES), default="small")
    flags.add_argument(
        "--what", nargs="+", choices=WHAT, help="items to time (all; at sd15 all but whole_step)"
    )
    flags.add_argument("--repeats", type=int, default=7)
    flags.add_argument("--batch", type=int, default=0, help="batch size (that of the size)")
    flags.add_argument("--steps", type=int, default=0, help="DDIM steps (those of the size)")
    flags.add_argument("--compile", action="store_true", help="also time torch.compile")
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_argument("--folder", help="where towers are kept (the system's temporary folder)")
    flags.add_argument("--flax", metavar="PYTHON", help="interpreter that has diffusers 0.39.0")
    flags.add_argument("--out", help="Markdown file to append the table to")
    return flags


if __name__ == "__main__":
    main(parser().parse_args())
