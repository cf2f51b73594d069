"""Data of accelerators, and lower bounds of the time a program takes on them (roofline)."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from persona_jax.planning.hlo import Collective

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip.

    Attributes:
      name: as in topologies ("v5e:2x4").
      hbm: bytes of memory that programs can use.
      flops: bfloat16 FLOP/s.
      bandwidth: of its memory, bytes/s.
      link: bytes/s that one link sends in one direction.
      links: number of links to other chips.
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
"""Sources of FLOP/s, bandwidths and links: for TPUs, Google Cloud's page of each
(cloud.google.com/tpu/docs/v4, v5e, v5p, v6e), whose interconnect figure is the sum over both
directions of all links, here of one direction of one link; for the H100, NVIDIA's SXM data sheet
(dense bfloat16; NVLink has 18 links of 50 GB/s, both directions together). Usable memory: for TPUs,
as reported by the compiler of libtpu 0.0.42; for the H100, about what the driver leaves of 80 GB.
"""

_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}


def chip_of(device: Any) -> Chip | None:
    """The chip of a JAX device; None if it is not in :data:`CHIPS` (CPUs, other GPUs)."""
    kind = device.device_kind
    return CHIPS.get("H100" if "H100" in kind else _KINDS.get(kind, ""))


def per_device(chip: Chip, devices: int, chips: int) -> Chip:
    """A device's share of a chip: JAX counts the cores of some chips as devices."""
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

    An axis with wrap-around links counts two, any other axis of several chips counts one. Axes wrap
    around where a v5e or v6e slice is 16 long, and in v4 and v5p slices of whole 4×4×4 cubes.
    """
    closed = 16 if name in ("v5e", "v6e") else 4
    cubes = name in ("v5e", "v6e") or all(n % 4 == 0 for n in shape)
    return sum(2 if cubes and n % closed == 0 else 1 for n in shape if n > 1)


class Roofline(NamedTuple):
    """Seconds that a program takes at peak rates, by resource.

    Attributes:
      compute: FLOPs at the peak rate.
      memory: bytes that operations read and write, at the memory's bandwidth. Too high, because
        data that stays in on-chip memory is counted as well.
      interconnect: bytes sent, at the links' bandwidth.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def step(self) -> float:
        """Seconds of one step: compute and memory overlap, the interconnect overlaps neither."""
        return max(self.compute, self.memory) + self.interconnect

    @property
    def share(self) -> float:
        """The interconnect's share of the step, 0 to 1."""
        return self.interconnect / self.step if self.step else 0.0


def roofline(
    chip: Chip, links: int, flops: float, accessed: float, collectives: Sequence[Collective]
) -> Roofline:
    """The roofline of a program.

    Latencies are not included: thousands of small collectives take longer.

    Args:
      chip: a device's share of a chip, from :func:`per_device`.
      links: from :func:`links_used`.
      flops: of one device.
      accessed: bytes that the operations of one device read and write.
      collectives: of the program.
    """
    sent = sum(collective.sent for collective in collectives)
    network = sent / (max(links, 1) * chip.link)
    return Roofline(flops / chip.flops, accessed / chip.bandwidth, network)


def largest_batch(small: tuple[int, float], large: tuple[int, float], limit: float) -> int:
    """The largest batch that takes at most `limit` bytes, by linear extrapolation.

    Args:
      small: (batch, bytes) of one compiled program.
      large: (batch, bytes) of another, with a larger batch.
      limit: bytes available.

    Returns:
      The batch; 0 if not even one example fits. If memory does not grow, the batch of `large`.
    """
    (few, less), (many, more) = small, large
    slope = (more - less) / (many - few)
    if slope <= 0:
        return many
    return max(math.floor(few + (limit - less) / slope), 0)
