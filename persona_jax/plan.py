"""Estimates memory, time and the largest batch of a training step or a sampler.

python -m persona_jax.plan --config configs/sa.py:sd15 --topology v5e:16x16 --batch_per_chip 4
python -m persona_jax.plan --config configs/sa.py

Compiles the training step of persona_jax.train from shapes alone. It needs no weights, no photos,
and with --topology no TPU either, only libtpu (pip install -e '.[tpu]'). Without --topology it
plans for the devices of this machine. config.batch_size is the total of all chips. Results are
cached; Stable Diffusion 1.5 takes minutes to compile. Times are lower bounds, from the chip's peak
rates.
"""

import argparse
import math
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from persona_jax.errors import UserError
from persona_jax.pipelines.pipeline import dtype_on
from persona_jax.planning import abstract, chips, compiled
from persona_jax.planning.chips import GIB, Chip
from persona_jax.planning.compiled import Compiled
from persona_jax.runtime import buckets, settings
from persona_jax.runtime.command_line import config_parser, run_with_arguments
from persona_jax.runtime.mesh import initialize_distributed, make_mesh
from persona_jax.runtime.settings import number

EXAMPLES = "v5e:2x2, v5e:16x16, v6e:2x4, v5p:2x2x1, v4:2x2x1"


LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes may use the TPU: this one does not
    "TPU_SKIP_MDS_QUERY": "1",  # there may be no metadata server, which would give the next two
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment of libtpu; none of the values affect the topology to compile for."""


class Machine(NamedTuple):
    """The devices to plan for.

    Attributes:
      name: for the report.
      devices: of a topology, or of this machine.
      chip: peak rates and memory of one device; None if unknown.
      links: number of interconnect links of each chip that ring collectives use.
      memory: bytes of each device.
    """

    name: str
    devices: Sequence[Any]
    chip: Chip | None
    links: int
    memory: float


def main(arguments: argparse.Namespace) -> None:
    """Compiles the program for two batch sizes and prints the plan."""
    config = arguments.config
    settings.require(config, {"method": str, "accumulate": int}, "--config")
    machine = topology(arguments.topology) if arguments.topology else this_machine()
    batch = batch_per_chip(config, arguments.batch_per_chip, len(machine.devices))
    plans = {batch: plan(arguments, machine, batch)}
    if not arguments.quick and (other := another_batch(batch, config.accumulate)):
        plans[other] = plan(arguments, machine, other)
    print(page(arguments, machine, batch, plans))
    if shortage(plans[batch], machine):
        raise UserError(advice(config, machine, batch, plans))


def batch_per_chip(config: ConfigDict, asked: int | None, chips: int) -> int:
    """Examples per chip: `asked`, or the share of ``config.batch_size``.

    A share that is not a multiple of ``config.accumulate`` is rounded up, and a line is printed.
    """
    if asked is not None:
        return asked
    batch = -(-config.batch_size // (chips * config.accumulate)) * config.accumulate
    if batch * chips != config.batch_size:
        print(
            f"config.batch_size={config.batch_size} does not divide among {chips} chips x "
            f"accumulate {config.accumulate}, and training refuses it; planned: {batch * chips}"
        )
    return batch


def plan(arguments: argparse.Namespace, machine: Machine, batch: int) -> Compiled:
    """Compiles the training step or the sampler for `batch` examples per chip; cached on disk.

    Raises:
      UserError: see :mod:`persona_jax.planning.abstract`.
    """
    config, device = arguments.config.copy_and_resolve_references(), machine.devices[0]
    config.batch_size = batch * len(machine.devices)
    mesh = make_mesh(**config.mesh, devices=machine.devices)
    program = abstract.sampler if arguments.sampler else abstract.training_step
    function, shapes = program(config, mesh, dtype_on(config.dtype, device.platform))
    say = f"for {machine.name}, {batch} a chip"
    key, find = compiled.lower(function, shapes, device, len(machine.devices), say)
    folder = buckets.local(arguments.cache or buckets.local(config.data.data_dir) / "plans")
    return compiled.remembered(folder, key, find)


def topology(name: str) -> Machine:
    """The devices of a TPU topology, which this machine need not have.

    Raises:
      UserError: libtpu is not installed, or does not know the name.
    """
    match = re.fullmatch(r"(v4|v5e|v5p|v6e):\d+x\d+(x\d+)?", name)
    shape = chips.dimensions(name) if match else ()
    flat = match is not None and match[1] in ("v5e", "v6e")
    # libtpu would abort the process for these.
    if not match or flat == (len(shape) == 3) or (flat and max(shape) > 16):
        raise UserError(f"--topology {name}: not a TPU topology; for example {EXAMPLES}")
    if find_spec("libtpu") is None:
        raise UserError(f"--topology {name}: libtpu is not installed; pip install -e '.[tpu]'")
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # libtpu raises several kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--topology {name}: {reason}; for example {EXAMPLES}") from error
    chip = chips.per_device(chips.CHIPS[match[1]], len(devices), math.prod(shape))
    return Machine(name, devices, chip, chips.links_used(match[1], shape), chip.hbm)


def this_machine() -> Machine:
    """The devices that training would use on this machine."""
    initialize_distributed()
    devices = jax.devices()
    chip, name = chips.chip_of(devices[0]), f"{len(devices)} x {devices[0].device_kind}"
    if devices[0].platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    else:
        stats = devices[0].memory_stats() or {}
        memory = float(stats.get("bytes_limit", chip.hbm if chip else math.inf))
    return Machine(name, devices, chip, chip.links if chip else 0, memory)


def another_batch(batch: int, accumulate: int) -> int:
    """A second batch size for linear extrapolation: half, or twice if there is no half."""
    half = batch // (2 * accumulate) * accumulate
    return half or 2 * batch


def page(
    arguments: argparse.Namespace, machine: Machine, batch: int, plans: dict[int, Compiled]
) -> str:
    """Formats the plan as text."""
    config, count = arguments.config, len(machine.devices)
    what = f"sampler of {config.sampling.steps} steps" if arguments.sampler else "training step"
    unit = "pictures" if arguments.sampler else "examples"
    mesh = make_mesh(**config.mesh, devices=machine.devices).shape
    dtype = jax.numpy.dtype(dtype_on(config.dtype, machine.devices[0].platform))
    lines = [
        f"{what}, {machine.name}: {count} devices, mesh data={mesh['data']} fsdp={mesh['fsdp']}, "
        f"{batch * count} {unit} ({batch} a chip), {dtype}"
    ]
    compiled_plan = plans[batch]
    if not compiled_plan.shortage:
        lines += memory_lines(compiled_plan, machine) + work_lines(
            compiled_plan, machine, batch, unit
        )
    lines += largest_line(plans, machine, config)
    return "\n".join(lines)


def memory_lines(program: Compiled, machine: Machine) -> list[str]:
    """Memory used per chip, by kind, and the memory of the chip."""
    parts = [f"{kind} {size / GIB:.2f}" for kind, size in program.memory.items()]
    total, there = program.total / GIB, machine.memory / GIB
    share = f" ({program.total / machine.memory:.0%})" if machine.memory < math.inf else ""
    return [f"memory of a chip, GiB: {total:.2f} of {there:.2f}{share}: {', '.join(parts)}"]


def work_lines(program: Compiled, machine: Machine, batch: int, unit: str) -> list[str]:
    """FLOPs, bytes and collectives of a chip, with a lower bound of the time."""
    lines = [
        f"work of a chip: {program.flops / 1e12:.3f} TFLOP, "
        f"{program.accessed / 1e9:.2f} GB read and written, "
        f"{sum(c.sent for c in program.collectives) / 1e6:.2f} MB sent"
    ]
    lines += [
        f"  {c.count} {c.kind} among {c.group}: {c.bytes / 1e6:.2f} MB" for c in program.collectives
    ] or ["  no collectives"]
    if machine.chip is None:
        return [*lines, "no peak rates known of this device: no estimate of time"]
    times = chips.roofline(
        machine.chip, machine.links, program.flops, program.accessed, program.collectives
    )
    lines += [
        f"at peak rates: compute {times.compute * 1e3:.2f} ms, memory {times.memory * 1e3:.2f} ms, "
        f"interconnect {times.interconnect * 1e3:.2f} ms",
        f"estimate: {times.step * 1e3:.2f} ms, {times.share:.2%} of it in collectives; "
        f"{batch * len(machine.devices) / times.step:.1f} {unit}/s, "
        f"{batch / times.step:.2f} a chip",
    ]
    if program.optimal_seconds:
        lines += [f"the compiler's own estimate: {program.optimal_seconds * 1e3:.2f} ms"]
    return lines


def largest_line(plans: dict[int, Compiled], machine: Machine, config: ConfigDict) -> list[str]:
    """The largest batch that fits, extrapolated if two batch sizes were compiled."""
    if len(plans) < 2 or machine.memory == math.inf:
        return []
    (few, less), (many, more) = sorted(plans.items())
    per = chips.largest_batch((few, less.total), (many, more.total), machine.memory)
    per -= per % config.accumulate
    return [
        f"largest batch: {per} a chip, {per * len(machine.devices)} in all; extrapolated on a line "
        f"through {few} ({less.total / GIB:.2f} GiB) and {many} ({more.total / GIB:.2f} GiB)"
    ]


def shortage(program: Compiled, machine: Machine) -> tuple[float, float] | None:
    """(bytes needed, bytes of a device) if a program does not fit; else None.

    Compilers for accelerators refuse such a program themselves. That for CPUs does not.
    """
    if program.shortage or program.total <= machine.memory:
        return program.shortage
    return float(program.total), machine.memory


def advice(config: ConfigDict, machine: Machine, batch: int, plans: dict[int, Compiled]) -> str:
    """The error for too little memory, with the settings to change."""
    lacking = shortage(plans[batch], machine)
    assert lacking is not None
    used, there = lacking
    fixed = 0.0
    if len(plans) > 1:
        (few, less), (many, more) = sorted(plans.items())
        fixed = less.total - few * (more.total - less.total) / (many - few)
    ways = [f"--batch_per_chip below {batch} (or a smaller --config.batch_size)"]
    if batch > 1:
        ways += [f"--config.accumulate={2 * config.accumulate}, the same batch in smaller parts"]
    if config.remat == "none":
        ways += ["--config.remat=transformers, which computes more and keeps less"]
    if len(machine.devices) > config.mesh.fsdp:
        ways += ["a larger --config.mesh.fsdp, which splits frozen weights among chips"]
    if fixed > there / 2:
        ways.reverse()
    return (
        f"{machine.name}: out of memory, {used / GIB:.2f} GiB of {there / GIB:.2f} a chip, "
        f"{(used - there) / GIB:.2f} too much; change {'; or '.join(ways)}"
    )


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    flags = config_parser(__doc__)
    flags.add_argument("--topology", help=f"of TPUs: {EXAMPLES}; this machine if not given")
    flags.add_argument(
        "--batch_per_chip",
        type=number(settings.COUNT),
        help="replaces config.batch_size, the total of all chips",
    )
    flags.add_argument("--sampler", action="store_true", help="the sampler, not the training step")
    flags.add_argument("--quick", action="store_true", help="compile once: no largest batch")
    flags.add_argument(
        "--cache",
        type=settings.path,
        help="folder for cached results; default: data.data_dir/plans",
    )
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
