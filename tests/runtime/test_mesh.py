import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from persona_jax.errors import UserError
from persona_jax.runtime import mesh as m


def test_make_mesh_fills_what_is_left():
    assert dict(m.make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(m.make_mesh(fsdp=2).shape) == {"data": 4, "fsdp": 2}
    assert dict(m.make_mesh(2, -1).shape) == {"data": 2, "fsdp": 4}
    assert set(m.make_mesh().axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("sizes", [(3, 1), (-1, 3), (-1, -1), (0, 8), (8, 0), (4, 1), (-2, -4)])
def test_make_mesh_refuses_what_does_not_divide(sizes):
    with pytest.raises(UserError, match="number of devices, 8"):
        m.make_mesh(*sizes)


def test_shard_params_by_size():
    mesh = m.make_mesh(4, 2)
    tree = {
        "down_blocks.0": {"kernel": np.zeros((256, 512)), "bias": np.zeros(512)},
        "odd": np.zeros((513, 511)),
        "small": np.zeros((6, 4)),
    }
    got = m.shard_params(mesh, tree)
    assert got["down_blocks.0"]["kernel"].spec == P(None, "fsdp")
    assert got["down_blocks.0"]["bias"].spec == P()
    assert got["odd"].spec == P()
    assert got["small"].spec == P()
    placed = m.place(tree, got)
    assert placed["down_blocks.0"]["kernel"].addressable_shards[0].data.shape == (256, 256)


def test_put_batch_over_all_devices():
    mesh = m.make_mesh(4, 2)
    array = np.arange(32, dtype=np.float32).reshape(16, 2)
    placed = m.put_batch(mesh, {"x": array})["x"]
    assert len({str(shard.index) for shard in placed.addressable_shards}) == 8
    np.testing.assert_array_equal(placed, array)
    with pytest.raises(UserError, match="x has 12 examples for the 8 devices"):
        m.put_batch(mesh, {"x": array[:12]})


def test_distributed_needs_all_three_variables(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(UserError, match="without JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        m.initialize_distributed()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    with pytest.raises(UserError, match="0 <= id < number"):
        m.initialize_distributed()


def test_libtpu_without_a_tpu_is_no_cluster(monkeypatch):
    monkeypatch.setattr(m, "find_spec", lambda name: object())
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    monkeypatch.setattr(m.Path, "glob", lambda self, pattern: iter(()))
    assert not m._in_cluster()
    monkeypatch.setattr(m.Path, "glob", lambda self, pattern: iter(["/dev/accel0"]))
    assert m._in_cluster()


JOINED = """
import time
from persona_jax.runtime.mesh import initialize_distributed
initialize_distributed()
print("joined", flush=True)
time.sleep(60)
"""


def test_sigterm_ends_a_process_that_has_not_begun_to_train():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    names = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "1", "PROCESS_ID": "0"}
    environment = os.environ | {f"JAX_{name}": value for name, value in names.items()}
    command = [sys.executable, "-c", JOINED]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "joined\n"
        process.terminate()
        assert process.wait(timeout=20) == -signal.SIGTERM
