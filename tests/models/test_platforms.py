"""Which platform a program is traced for."""

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from persona_jax.models.platforms import platform
from persona_jax.runtime.mesh import make_mesh, traced_for


def test_the_platform_is_the_meshs_or_jaxs_default():
    assert platform() == jax.default_backend() == "cpu"
    there = AbstractMesh((4,), ("data",), abstract_device=AbstractDevice("TPU v5 lite", 1, "tpu"))
    with jax.sharding.use_abstract_mesh(there):
        assert platform() == "tpu"
    with traced_for(make_mesh()):
        assert platform() == "cpu"


def test_the_platform_is_known_within_shard_map():
    seen = []

    def each(x):
        seen.append(platform())
        return x

    spec = PartitionSpec("data")
    mesh = make_mesh()
    jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec)(np.zeros(mesh.size))
    assert set(seen) == {"cpu"}
