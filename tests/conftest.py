"""Settings of all tests: eight CPU devices, exact matmuls, shapes checked at run time."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
os.environ.setdefault("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
if "--slow" not in sys.argv and "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    # Small tests spend most time compiling, full-size ones running.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # tests take a third

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("persona_jax", "beartype.beartype")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def clear_compiled_programs_when_memory_is_short():
    """Compiled programs take gigabytes; they are cleared between modules."""
    yield
    if _resident() > 3 * 2**30:
        from persona_jax.runtime import memory

        jax.clear_caches()
        memory.give_back()


def _resident() -> int:
    """Returns this process's resident memory in bytes; 0 if the system does not report it."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run full-size and long tests")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="full-size or long: run with --slow"))
