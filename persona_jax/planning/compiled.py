"""Compiles programs for devices that need not be present, and reads the compiler's analysis."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from persona_jax.errors import UserError
from persona_jax.planning import hlo
from persona_jax.planning.hlo import Collective

MEMORY = ("arguments", "outputs", "temporaries", "aliased", "generated code")
"""Keys of :attr:`Compiled.memory`. Aliased outputs share the memory of arguments."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's analysis of a program, per device.

    Attributes:
      memory: bytes by kind (:data:`MEMORY`); empty if the program does not fit.
      flops: floating point operations. Loop bodies count once per iteration; kernels whose cost
        the compiler does not know are included.
      accessed: bytes that operations read and write; with loops, scaled like the FLOPs.
      optimal_seconds: the compiler's own estimate; None if it gives none or loops make it wrong.
      collectives: see :mod:`persona_jax.planning.hlo`.
      seconds: time that compilation took.
      shortage: (bytes needed, bytes available) if the program does not fit; else None.
    """

    memory: dict[str, int]
    flops: float
    accessed: float
    optimal_seconds: float | None
    collectives: tuple[Collective, ...]
    seconds: float
    shortage: tuple[float, float] | None = None

    @property
    def total(self) -> float:
        """Peak memory, bytes."""
        if self.shortage:
            return self.shortage[0]
        return float(sum(self.memory.values()) - 2 * self.memory["aliased"])

    @classmethod
    def from_json(cls, text: str) -> "Compiled":
        """The inverse of ``json.dumps(dataclasses.asdict(…))``."""
        raw = json.loads(text)
        raw["collectives"] = tuple(Collective(**one) for one in raw["collectives"])
        raw["shortage"] = tuple(raw["shortage"]) if raw["shortage"] else None
        return cls(**raw)


def lower(
    function: Any, arguments: tuple, device: Any, devices: int, say: str = ""
) -> tuple[str, Callable[[], Compiled]]:
    """Lowers a jitted function.

    Args:
      function: from ``jax.jit``.
      arguments: abstract, with shardings over the devices.
      device: one of the devices.
      devices: number of devices.
      say: name of the program in progress lines; "" prints none.

    Returns:
      The program's key and a function that compiles it, for :func:`remembered`.
    """
    traced = function.trace(*arguments)
    lowered = traced.lower()
    jaxpr = traced.jaxpr.jaxpr
    factor = hlo.loop_factor(jaxpr, device.platform)
    kernels = hlo.kernel_flops(jaxpr, device.platform)

    def find() -> Compiled:
        compiled = measure(lowered, factor, devices, say)
        return dataclasses.replace(compiled, flops=compiled.flops + kernels)

    return program_key(lowered.as_text(), device), find


def program_key(text: str, device: Any) -> str:
    """Cache key of a compiled program, sha256 in hex.

    It covers the lowered program (and so the configuration, the sources and the number of devices),
    the kind of device, the compilers and their flags, and the code that reads their analysis.
    """
    sources = [Path(__file__), Path(hlo.__file__)]
    parts = [
        text,
        device.device_kind,
        str(getattr(device, "client", None) and device.client.platform_version),
        *(f"{name} {_version(name)}" for name in ("jax", "jaxlib", "libtpu")),
        *(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")),
        *(source.read_text() for source in sources),
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def measure(lowered: Any, loop_factor: float, devices: int, say: str = "") -> Compiled:
    """Compiles a lowered program. If it does not fit into memory, the result has a shortage.

    Args:
      lowered: from ``jax.jit(…).lower``.
      loop_factor: see :func:`persona_jax.planning.hlo.loop_factor`.
      devices: number of devices of the program.
      say: name of the program in progress lines; "" prints none.

    Raises:
      JaxRuntimeError: compilation fails for another reason.
    """
    start = time.perf_counter()
    try:
        with progress(say), not_kept():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        seconds = time.perf_counter() - start
        return Compiled({}, 0.0, 0.0, None, (), seconds, shortage_in(str(error)) or _raise(error))
    seconds = time.perf_counter() - start
    sizes, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    names = ("argument", "output", "temp", "alias", "generated_code")
    own = cost.get("optimal_seconds", 0.0)
    return Compiled(
        {
            kind: getattr(sizes, f"{name}_size_in_bytes")
            for kind, name in zip(MEMORY, names, strict=True)
        },
        cost.get("flops", 0.0) * loop_factor,
        cost.get("bytes accessed", 0.0) * loop_factor,
        own if own > 0 and loop_factor == 1 else None,
        tuple(hlo.collectives(compiled.as_text(), devices)),
        seconds,
    )


@contextlib.contextmanager
def not_kept() -> Iterator[None]:
    """Disables JAX's cache of compiled programs: programs for absent devices cannot be read from
    it, and programs read from it have no analysis."""
    # JAX defines its options at run time.
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _raise(error: Exception) -> Any:
    raise error


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def shortage_in(message: str) -> tuple[float, float] | None:
    """(bytes needed, bytes available) from a compiler's out-of-memory message; None for others."""
    size = r"([\d.]+)([KMGT]?)"
    for pattern in (rf"\({size}\) exceeds available \w+ \({size}\)", rf"Used {size} of {size} hbm"):
        if match := re.search(pattern, message):
            used, used_unit, available, available_unit = match.groups()
            return float(used) * _UNITS[used_unit], float(available) * _UNITS[available_unit]
    return None


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Prints to stderr, every 30 seconds, for how long `what` has been compiling; prints nothing if
    `what` is empty."""
    done, start = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(30.0):
            elapsed = time.monotonic() - start
            print(f"compiling {what}: {elapsed:.0f} s", file=sys.stderr, flush=True)

    if what:
        print(f"compiling {what} …", file=sys.stderr, flush=True)
        threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def remembered(folder: Path, key: str, find: Callable[[], Compiled]) -> Compiled:
    """The result of `find`, cached in ``folder/KEY.json``.

    Raises:
      UserError: the folder cannot be written.
    """
    file = folder / f"{key}.json"
    if file.exists():
        return Compiled.from_json(file.read_text())
    try:  # fails before minutes of compilation, not after
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f"{key}.new"
        beside.touch()
    except OSError as error:
        raise UserError(
            f"cache {folder}: {error.strerror}; choose another folder", argument="cache"
        ) from error
    result = find()
    beside.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    os.replace(beside, file)
    return result
