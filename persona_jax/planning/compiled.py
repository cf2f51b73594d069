"""Compiling a program for devices that need not exist, and what the compiler says of it."""

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
"""Kinds of memory, by the names of :attr:`Compiled.memory`; aliased outputs lie in arguments."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, per device.

    Attributes:
      memory: bytes by kind (:data:`MEMORY`); empty where it did not fit.
      flops: floating point operations, loops counted as often as they turn, and what kernels do
        whose cost the compiler is not told.
      accessed: bytes that operations read and write; in a program with loops, scaled as its FLOPs.
      optimal_seconds: the compiler's own estimate; None where it gives none or a nonsense one.
      collectives: see :mod:`persona_jax.planning.hlo`.
      seconds: what compilation took.
      shortage: (bytes used, bytes there are) of a program that did not fit; else None.
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
        """Bytes of memory in use at once."""
        if self.shortage:
            return self.shortage[0]
        return float(sum(self.memory.values()) - 2 * self.memory["aliased"])

    @classmethod
    def from_json(cls, text: str) -> "Compiled":
        """The inverse of ``json.dumps(dataclasses.asdict(…))``."""
        raw = json.loads(text)
        raw["collectives"] = tuple(Collective(*one) for one in raw["collectives"])
        raw["shortage"] = tuple(raw["shortage"]) if raw["shortage"] else None
        return cls(**raw)


def lower(
    function: Any, arguments: tuple, device: Any, devices: int, say: str = ""
) -> tuple[str, Callable[[], Compiled]]:
    """Lowers a jitted function; gives the program's key and what compiles it, for
    :func:`remembered`.

    Args:
      function: from ``jax.jit``.
      arguments: abstract, with shardings over the devices.
      device: one of them.
      devices: how many there are.
      say: what is compiled, for the progress line.
    """
    traced = function.trace(*arguments)
    lowered = traced.lower()
    jaxpr = traced.jaxpr.jaxpr
    factor = hlo.loop_factor(jaxpr, device.platform)
    kernels = hlo.kernel_flops(jaxpr, device.platform)

    def find() -> Compiled:
        found = measure(lowered, factor, devices, say)
        return dataclasses.replace(found, flops=found.flops + kernels)

    return program_key(lowered.as_text(), device), find


def program_key(text: str, device: Any) -> str:
    """Names a compiled program: by what is lowered (which configuration, sources and number of
    devices make), the kind of device, the compilers and their flags, and the code that reads what
    they say."""
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
    """Compiles a lowered program; one that does not fit gives a :class:`Compiled` with a shortage.

    Args:
      lowered: from ``jax.jit(…).lower``.
      loop_factor: see :func:`persona_jax.planning.hlo.loop_factor`.
      devices: of the program.
      say: what is compiled, for the progress line; "" says nothing.
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
    """Without JAX's cache of compiled programs: those for absent devices cannot be read back, and
    what is read back has no analysis."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _raise(error: Exception) -> Any:
    raise error


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def shortage_in(message: str) -> tuple[float, float] | None:
    """(bytes used, bytes there are) from what a compiler says when memory is short; None for any
    other message."""
    size = r"([\d.]+)([KMGT]?)"
    for pattern in (rf"\({size}\) exceeds available \w+ \({size}\)", rf"Used {size} of {size} hbm"):
        if found := re.search(pattern, message):
            used, unit, there, other = found.groups()
            return float(used) * _UNITS[unit], float(there) * _UNITS[other]
    return None


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Says every half minute that `what` is still being compiled, and for how long; nothing where
    it is empty."""
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(30.0):
            elapsed = time.monotonic() - start
            print(f"compiling {what}: {elapsed:.0f} s", file=sys.stderr, flush=True)

    if what:
        print(f"compiling {what} …", file=sys.stderr, flush=True)
        threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def remembered(folder: Path, key: str, find: Callable[[], Compiled]) -> Compiled:
    """What `find` gives, kept in ``folder/KEY.json``.

    Raises:
      UserError: the folder cannot be written.
    """
    file = folder / f"{key}.json"
    if file.exists():
        return Compiled.from_json(file.read_text())
    try:  # before minutes of compilation, not after
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f"{key}.new"
        beside.touch()
    except OSError as error:
        raise UserError(
            f"cache {folder}: {error.strerror}; choose another folder", argument="cache"
        ) from error
    found = find()
    beside.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    os.replace(beside, file)
    return found
