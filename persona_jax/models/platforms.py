"""Which platform a program is traced for."""

import jax


def platform() -> str:
    """Name of it, "cpu", "gpu", "tpu": that of the mesh that is being traced for, and where there
    is none the one that JAX runs on."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()
