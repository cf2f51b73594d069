"""Accelerators in numbers, and the time that a program takes at least on them."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from persona_jax.planning.hlo import Collective

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip does at best.

    Attributes:
      name: as in topologies.
      hbm: bytes that programs can use.
      flops: of bfloat16 products, per second.
      bandwidth: of its memory, bytes per second.
      link: bytes per second that one link sends in one direction.
      links: links of a chip with all its neighbours.
    """

    name: str
    hbm: float
    flops: float
    bandwidth: float
    link: float
    links: int


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 30.5 * GIB, 275e12, 1200e9, 50e9, 6),
        Chip("v5e", 15.75 * GIB, 197e12, 819e9, 50e9, 4),
        Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 100e9, 6),
        Chip("v6e", 31.25 * GIB, 918e12, 1638e9, 100e9, 4),
        Chip("H100", 79.0 * GIB, 989e12, 3350e9, 25e9, 18),
    )
}
"""FLOPs, bandwidths and ports: Google Cloud's pages of each TPU (cloud.google.com/tpu/docs/v4, v5e,
v5p, v6e; the interconnect there is both directions of all ports, here one of one) and NVIDIA's H100
SXM data sheet (dense bfloat16, NVLink's 18 links of 50 GB/s both ways). Memory of TPUs: what libtpu
0.0.42's compiler says is available; of the H100, about what its driver leaves of 80 GB."""

_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}


def chip_of(device: Any) -> Chip | None:
    """The facts of a device; None where there are none (CPUs, other GPUs)."""
    kind = device.device_kind
    return CHIPS.get("H100" if "H100" in kind else _KINDS.get(kind, ""))


def per_device(chip: Chip, devices: int, chips: int) -> Chip:
    """A chip's share for each of its cores, where JAX counts cores as devices."""
    cores = max(devices // chips, 1)
    return dataclasses.replace(
        chip,
        hbm=chip.hbm / cores,
        flops=chip.flops / cores,
        bandwidth=chip.bandwidth / cores,
        link=chip.link / cores,
    )


def dimensions(topology: str) -> tuple[int, ...]:
    """Chips along each axis: ``v5e:2x4`` → (2, 4)."""
    return tuple(int(n) for n in re.findall(r"\d+", topology.split(":")[1]))


def links_used(name: str, shape: Sequence[int]) -> int:
    """Links of a chip that a ring over all chips of a topology can use.

    An axis that closes to a ring has two, an open one counts as one. Axes close where a v5e or v6e
    slice is 16 long, and in v4 and v5p slices made of whole 4×4×4 cubes.
    """
    closed = 16 if name in ("v5e", "v6e") else 4
    cubes = name in ("v5e", "v6e") or all(n % 4 == 0 for n in shape)
    return sum(2 if cubes and n % closed == 0 else 1 for n in shape if n > 1)


class Roofline(NamedTuple):
    """Seconds that a program takes at least, by what limits it.

    Attributes:
      compute: FLOPs at the peak.
      memory: bytes that operations read and write, at the memory's bandwidth; an upper bound, as
        what stays on the chip is counted too.
      interconnect: bytes sent at the links' bandwidth.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def step(self) -> float:
        """Compute and memory side by side, the interconnect after them: nothing of it hidden."""
        return max(self.compute, self.memory) + self.interconnect

    @property
    def share(self) -> float:
        """The interconnect's share of the step."""
        return self.interconnect / self.step if self.step else 0.0


def roofline(
    chip: Chip, links: int, flops: float, accessed: float, collectives: Sequence[Collective]
) -> Roofline:
    """The roofline of a program's FLOPs, bytes and collectives per device.

    Latencies are not in it: thousands of small collectives take longer.
    """
    sent = sum(collective.sent for collective in collectives)
    network = sent / (max(links, 1) * chip.link)
    return Roofline(flops / chip.flops, accessed / chip.bandwidth, network)


def largest_batch(small: tuple[int, float], large: tuple[int, float], limit: float) -> int:
    """The largest batch within `limit` bytes on the line through two (batch, bytes); 0 where not
    even one example fits."""
    (few, less), (many, more) = small, large
    slope = (more - less) / (many - few)
    if slope <= 0:
        return many
    return max(math.floor(few + (limit - less) / slope), 0)
