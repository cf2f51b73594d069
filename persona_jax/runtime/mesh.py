"""Devices as one mesh ("data", "fsdp"), and where every array lies on it.

JAX's runtime is the distributed engine; this file only says who takes part
(:func:`initialize_distributed`), how the devices are laid out (:func:`make_mesh`) and which
axis of which array is split (:func:`batch_sharding`, :func:`shard_params`).
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from persona_jax.errors import UserError

# Splitting an array costs a gather at each use: below this many elements it is not worth it.
SMALL = 2**16


def initialize_distributed() -> None:
    """Join the other processes of this run, if the environment says there are any.

    Call it before anything touches a device. Either JAX_COORDINATOR_ADDRESS (host:port),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID are all set, or JAX finds SLURM or a TPU pod by itself;
    otherwise this is a run of one process. CPU devices talk through gloo.

    Raises UserError if only some of the three variables are set, or one is not a number.
    """
    if jax.distributed.is_initialized():
        return
    use_cpu_cores()
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given and not _in_cluster():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's preemption notice swallows SIGTERM, and nothing here asks it (see training/loop.py).
    jax.config.update("jax_enable_preemption_service", False)
    if not given:
        jax.distributed.initialize()
        return
    if missing := [name for name in names if name not in given]:
        raise UserError(
            f"environment: {', '.join(given)} set without {', '.join(missing)}; "
            "set all three (one value each per process) or none"
        )
    count, index = given["JAX_NUM_PROCESSES"], given["JAX_PROCESS_ID"]
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise UserError(
            f"environment: JAX_NUM_PROCESSES={count!r} and JAX_PROCESS_ID={index!r}: "
            "expected whole numbers with 0 <= id < number"
        )
    jax.distributed.initialize(given["JAX_COORDINATOR_ADDRESS"], int(count), int(index))


def use_cpu_cores() -> None:
    """Make CPU cores devices of the mesh, unless XLA_FLAGS says how many there are.

    XLA spreads one program badly over cores: two devices train 1.6 times as fast as one on two
    cores. A power of two, at most 8, because batches have to divide. No effect on accelerators.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(RuntimeError):  # JAX has started: its devices are what they are
        jax.config.update("jax_num_cpu_devices", min(8, 2 ** int(math.log2(cores or 1))))


def _in_cluster() -> bool:
    """Whether this process was started by SLURM with others, or on a TPU VM."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return True
    has_tpu = find_spec("libtpu") is not None and any(
        any(Path("/dev").glob(pattern)) for pattern in ("accel*", "vfio/[0-9]*")
    )
    return has_tpu and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")


def first_process(work: Callable[[], Any]) -> None:
    """Do `work` in process 0, the others waiting until it is done: for files all of them read."""
    if jax.process_index() == 0:
        work()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first_process")


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return all devices of all processes, or those given, as a mesh with axes ("data", "fsdp").

    One of the two may be -1: "whatever is left". Raises UserError if the product is not the
    number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = {"data": data, "fsdp": fsdp}
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) == 1 and known > 0 and count % known == 0:
        sizes[free[0]] = count // known
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != count:
        raise UserError(
            f"mesh data={data} fsdp={fsdp}: data x fsdp must be the number of devices, {count} "
            "here; set one of them to -1 to let it follow"
        )
    # Explicit axes, the default of jax.make_mesh, put shardings in types; Linen can't trace them.
    axis_types = (AxisType.Auto,) * 2
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def local_sharding(size: int) -> NamedSharding:
    """Return the sharding of `size` rows over as many devices of this process as divide them: for
    work that every process does for itself."""
    devices = jax.local_devices()[: math.gcd(size, len(jax.local_devices()))]
    return NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def traced_for(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Within it, what is traced knows the mesh over which its batch lies, and may share out kernels
    that the compiler cannot (:func:`persona_jax.models.attention.attention`)."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def tree_names(tree: Any) -> list[str]:
    """Return the path of each leaf, joined by ".", in the order of jax.tree.leaves."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


def shard_params(mesh: Mesh, tree: Any) -> Any:
    """Return the tree of shardings for parameters (or a whole train state).

    tree: arrays or anything with .shape. Of leaves with at least SMALL elements, the largest axis
    divisible by fsdp is split over it; others are whole. As the answer depends on shapes alone,
    optimiser moments lie like their parameters.
    """
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(mesh, tuple(leaf.shape))), tree)


def _spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    fsdp = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or math.prod(shape) < SMALL or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * largest, "fsdp")


def place(tree: Any, shardings: Any) -> Any:
    """Return tree with each array laid out by its sharding (a tree, or one for all).

    Arrays in host memory are the same in every process; each device takes its own part only.
    What lies on a device already is not copied there: do not donate the result.
    """

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        there = isinstance(array, jax.Array)
        if there and (sharding.is_fully_addressable or not array.is_fully_addressable):
            return jax.device_put(array, sharding)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda array: put(array, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def to_host(tree: Any) -> Any:
    """Return tree as numpy arrays, whole in every process; all processes must ask together."""

    def fetch(array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(fetch, tree)


def gathered(tree: Any) -> Any:
    """Return tree with what is split among devices as numpy arrays, whole in every process; all
    processes must ask together. The rest stays as it is."""

    def gather(leaf: Any) -> Any:
        split = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        return to_host(leaf) if split else leaf

    return jax.tree.map(gather, tree)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Return the global batch on the devices, given this process's part of it.

    batch: tree of numpy arrays [B / processes, …]. Raises UserError if B does not divide among
    the devices.
    """
    sharding = batch_sharding(mesh)
    local = jax.local_device_count()
    for name, array in zip(tree_names(batch), jax.tree.leaves(batch), strict=True):
        if array.shape[0] % local:
            raise UserError(
                f"batch: {name} has {array.shape[0]} examples for the {local} devices of a process;"
                f" choose a batch size that is a multiple of {jax.device_count()}"
            )
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, array), batch
    )
