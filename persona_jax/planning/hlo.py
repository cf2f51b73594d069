"""Reads compiled programs: collectives in HLO text, iterations of loops, FLOPs of a jaxpr."""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind and group size in a program.

    Attributes:
      kind: one of :data:`KINDS`.
      group: number of devices that take part in each.
      count: number of executions per call of the program.
      bytes: size of the full arrays (the output of a gather, the input of a reduction), summed over
        all executions.
    """

    kind: str
    group: int
    count: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that each chip sends with ring algorithms.

        A reduce-scatter or an all-gather takes n − 1 steps that each send 1/n of the array; an
        all-reduce is one after the other.
        """
        share = (self.group - 1) / self.group
        times = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.bytes * times.get(self.kind, share)


_OPERATION = re.compile(rf"\s({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+[a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program, summed by kind and group size.

    Those in a loop count once per iteration. An asynchronous pair (``-start``, ``-done``) counts
    once.

    Args:
      text: the optimised HLO module (``compiled.as_text()``).
      devices: number of devices of the program, all of which take part in a collective that names
        no groups.
    """
    bodies = computations(text)
    times = calls(bodies)
    counts: Counter[tuple[str, int]] = Counter()
    sizes: Counter[tuple[str, int]] = Counter()
    for name, lines in bodies.items():
        for line in lines if times[name] else ():
            operation = _OPERATION.search(line)
            if not operation:
                continue
            kind, group = operation[1], group_size(line, devices)
            size = whole_size(kind, bool(operation[2]), line[: operation.start()], group)
            if name.startswith("all-reduce-scatter"):  # a reduce-scatter in TPU programs
                kind = "reduce-scatter"
            if group > 1:
                counts[kind, group] += times[name]
                sizes[kind, group] += times[name] * size
    return [Collective(*key, counts[key], size) for key, size in sorted(sizes.items())]


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation, by its name; ``""`` is the entry computation."""
    bodies: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = "" if line.startswith("ENTRY") else header[1]
            bodies[name] = []
        elif name is not None and " = " in line:
            bodies[name].append(line)
    return bodies


def calls(bodies: Mapping[str, list[str]]) -> dict[str, int]:
    """Number of executions of each computation per call of the program."""
    callers = defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            if "async-done(" in line or "async-update(" in line:
                continue
            turns = trip_count(line, bodies) if " while(" in line else 1
            for called in _CALLED.findall(line):
                for one in re.findall(r"[\w.\-]+", called):
                    callers[one].append((name, turns))
    times: dict[str, int] = {"": 1}

    def runs(name: str) -> int:
        if name not in times:
            times[name] = sum(turns * runs(caller) for caller, turns in callers[name])
        return times[name]

    return {name: runs(name) for name in bodies}


def trip_count(line: str, bodies: Mapping[str, list[str]]) -> int:
    """Iterations of a while loop.

    Read from the compiler's annotation, or else the constant in the loop's condition; 1 if there is
    neither.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    inside = "\n".join(bodies.get(condition[1], [])) if condition else ""
    return max(map(int, re.findall(r"\bs32\[\]\S* constant\((\d+)\)", inside)), default=1)


def group_size(line: str, devices: int) -> int:
    """Number of devices in each group of a collective, in any of HLO's notations."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(tiled[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    return devices


def whole_size(kind: str, started: bool, shape: str, group: int) -> int:
    """Bytes of a collective's full arrays, from the shape of its result.

    Args:
      kind: one of :data:`KINDS`.
      started: whether it is the ``-start`` of an asynchronous pair, whose result is a tuple.
      shape: the instruction's text up to the operation's name.
      group: number of devices in each group.
    """
    sizes = [array_size(*array) for array in _ARRAY.findall(shape.split(" = ", 1)[1])]
    if kind == "reduce-scatter":
        return group * (sizes[-1] if started else sum(sizes))
    if started and kind == "all-gather":  # (operands, results)
        return sum(sizes) * group // (group + 1)
    if started and kind == "collective-permute":  # (operand, result, contexts)
        return sizes[0]
    return sum(sizes)


def array_size(dtype: str, dimensions: str) -> int:
    """Bytes of an array, from HLO's notation of dtype and dimensions: ``bf16``, ``4,128``."""
    width = re.search(r"\d+", dtype)
    bits = int(width[0]) if width else 8  # "pred" names no width
    return math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8


def loop_factor(jaxpr: Any, platform: str) -> float:
    """Factor that corrects a compiler's FLOPs, which count the body of each loop once.

    It is the FLOPs of the program over those with each loop body counted once; 1.0 without loops.
    """
    counts = list(products(jaxpr, platform, 1))
    once = sum(flops for flops, _ in counts)
    return sum(flops * turns for flops, turns in counts) / once if once else 1.0


def kernel_flops(jaxpr: Any, platform: str) -> float:
    """FLOPs of the matrix products in Pallas kernels without a cost estimate, per device.

    Compilers count these kernels as zero.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            if eqn.params["cost_estimate"] is None:
                turns = math.prod(eqn.params["grid_mapping"].grid)
                body = products(eqn.params["jaxpr"], platform, turns)
                total += sum(flops * times for flops, times in body)
            continue
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inside = (kernel_flops(inner, platform) for inner in inner_programs(eqn, platform))
        total += turns * sum(inside)
    return total


def products(jaxpr: Any, platform: str, turns: int) -> Iterator[tuple[float, int]]:
    """(FLOPs, number of executions) of each matrix product and convolution.

    Args:
      jaxpr: the program.
      platform: as in :func:`inner_programs`.
      turns: number of executions of `jaxpr` itself.
    """
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            yield 2.0 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contracted), turns
        elif eqn.primitive.name == "conv_general_dilated":
            numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval
            outputs = kernel.shape[numbers.rhs_spec[0]]
            yield 2.0 * eqn.outvars[0].aval.size * kernel.size / outputs, turns
        below = turns * eqn.params["length"] if eqn.primitive.name == "scan" else turns
        for inner in inner_programs(eqn, platform):
            yield from products(inner, platform, below)


def inner_programs(eqn: Any, platform: str) -> Iterator[Any]:
    """The jaxprs inside an equation; of alternatives by platform, the one for `platform`."""
    branches = eqn.params.get("branches_platforms")
    if branches:
        chosen = next(i for i, names in enumerate(branches) if names is None or platform in names)
        yield eqn.params["branches"][chosen].jaxpr
        return
    for value in eqn.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns"):
                yield one
            elif hasattr(getattr(one, "jaxpr", None), "eqns"):
                yield one.jaxpr
