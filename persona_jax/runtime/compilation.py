"""Compiler options, and a persistent cache of compiled programs."""

import hashlib
import os
import platform
from pathlib import Path

import jax
from jax.sharding import Mesh

MOST = 4 * 2**30
"""Maximal bytes of the cache; the least recently used programs are removed first."""


def compiler_options(mesh: Mesh | None = None) -> dict[str, str]:
    """Compiler options for ``jax.jit`` on a mesh's devices, or on JAX's default devices.

    On CPUs, XLA would remove ``jax.lax.optimization_barrier``, merge the recomputation of
    ``jax.checkpoint`` with the original computation, and so keep the activations in memory.
    """
    platform_name = mesh.devices.flat[0].platform if mesh else jax.default_backend()
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if platform_name == "cpu" else {}


def keep_compiled() -> None:
    """Sets JAX's persistent compilation cache to a folder in the user's cache.

    ``JAX_COMPILATION_CACHE_DIR`` overrides it; ``JAX_ENABLE_COMPILATION_CACHE=false`` disables it.
    Each instruction set has a folder of its own, because a program compiled for one CPU may not run
    on another.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "persona_jax" / f"compiled-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home: no cache
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _processor() -> str:
    """An identifier of this machine's instruction set."""
    flags = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    digest = hashlib.sha256(flags.encode()).hexdigest()[:12]
    return f"{platform.machine()}-{digest}"
