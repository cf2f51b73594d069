"""Compilation: what the compiler is told, and programs kept on disk, so that a run's second start
does not compile again."""

import hashlib
import os
import platform
from pathlib import Path

import jax
from jax.sharding import Mesh

MOST = 4 * 2**30
"""Bytes kept; what was not used for longest goes first."""


def compiler_options(mesh: Mesh | None = None) -> dict[str, str]:
    """What ``jax.jit`` passes to the compiler of a mesh's devices, or of those JAX runs on.

    XLA's compiler for CPUs would drop ``jax.lax.optimization_barrier``, find that what
    ``jax.checkpoint`` computes again is there already, and keep it.
    """
    where = mesh.devices.flat[0].platform if mesh else jax.default_backend()
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if where == "cpu" else {}


def keep_compiled() -> None:
    """Points JAX's persistent compilation cache at a folder of the user's, unless
    ``JAX_COMPILATION_CACHE_DIR`` names one or ``JAX_ENABLE_COMPILATION_CACHE=false`` wants none.

    A folder for each kind of processor: programs for a CPU do not run on just any other.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "persona_jax" / f"compiled-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to: compile every time
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _processor() -> str:
    """Names this machine's instruction set."""
    flags = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    digest = hashlib.sha256(flags.encode()).hexdigest()[:12]
    return f"{platform.machine()}-{digest}"
