"""The device mesh ("data", "fsdp") and the sharding of arrays over it.

JAX's runtime does the distributed work. This module connects the processes
(:func:`initialize_distributed`), lays out the devices (:func:`make_mesh`) and chooses the axis
over which each array is split (:func:`batch_sharding`, :func:`shard_params`).
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

# Arrays with fewer elements are not split, because each use of a split array costs a gather.
SMALL = 2**16


def initialize_distributed() -> None:
    """Connects this process to the others of its run, if the environment describes any.

    Must be called before any device is used. The processes are given by JAX_COORDINATOR_ADDRESS
    (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID together, or JAX detects SLURM or a TPU pod;
    otherwise the run has one process. CPU devices communicate through gloo.

    Raises:
      UserError: only some of the three variables are set, or one is not a number.
    """
    if jax.distributed.is_initialized():
        return
    use_cpu_cores()
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given and not _in_cluster():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's preemption service intercepts SIGTERM, which training/loop.py handles itself.
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
    """Makes each CPU core a device, unless XLA_FLAGS sets the number of CPU devices.

    XLA parallelises one program badly over cores: on two cores, two devices train 1.6 times as fast
    as one. The number is a power of two, at most 8, because it must divide batches. Accelerators
    are not affected.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(RuntimeError):  # JAX has started: its devices are fixed
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
    """Calls `work` in process 0 while the others wait, to write files that all of them read."""
    if jax.process_index() == 0:
        work()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first_process")


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices in a mesh with axes ("data", "fsdp").

    Args:
      data: size of the axis; -1: the number of devices divided by the other axis.
      fsdp: size of the axis; -1 as for `data`, but not both.
      devices: None: all devices of all processes.

    Raises:
      UserError: the product of the sizes is not the number of devices.
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
    # Not jax.make_mesh's default, Explicit: it puts shardings in types, which Linen cannot trace.
    axis_types = (AxisType.Auto,) * 2
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def local_sharding(size: int) -> NamedSharding:
    """A sharding over devices of this process alone, for work that each process does separately.

    The number of devices is the largest that divides both `size`, the length of the first axis, and
    the number of local devices.
    """
    devices = jax.local_devices()[: math.gcd(size, len(jax.local_devices()))]
    return NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays of which every device holds a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def traced_for(mesh: Mesh) -> contextlib.AbstractContextManager:
    """A context in which traced code can query the mesh of its batch.

    :func:`persona_jax.models.attention.attention` needs it to partition kernels that the compiler
    cannot partition.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def tree_names(tree: Any) -> list[str]:
    """The path of each leaf, joined by ".", in the order of jax.tree.leaves."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


def shard_params(mesh: Mesh, tree: Any) -> Any:
    """The shardings of parameters, or of a whole train state.

    A leaf is split over "fsdp" along its largest divisible axis if it has at least :data:`SMALL`
    elements; otherwise it is replicated. The result depends on shapes alone, so optimizer moments
    are sharded like their parameters.

    Args:
      mesh: of :func:`make_mesh`.
      tree: arrays or anything with ``.shape``.

    Returns:
      A tree of NamedSharding with the structure of `tree`.
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
    """Puts each array on devices by its sharding.

    Arrays already on a device may share memory with the result: do not donate it.

    Args:
      tree: arrays; those in host memory must be equal in all processes. Each device gets its own
        part only.
      shardings: a tree of them, or one for all arrays.
    """

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        on_device = isinstance(array, jax.Array)
        if on_device and (sharding.is_fully_addressable or not array.is_fully_addressable):
            return jax.device_put(array, sharding)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda array: put(array, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def to_host(tree: Any) -> Any:
    """Gathers a tree as full numpy arrays in every process; all processes must call it together."""

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
    """Puts the global batch on the devices.

    Args:
      mesh: of :func:`make_mesh`.
      batch: this process's part, a tree of numpy arrays ``[B / processes, …]``.

    Returns:
      The tree with global arrays ``[B, …]``, sharded by :func:`batch_sharding`.

    Raises:
      UserError: B is not a multiple of the number of devices.
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
