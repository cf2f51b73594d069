"""The platform that a program is traced for."""

import jax


def platform() -> str:
    """The platform ("cpu", "gpu", "tpu") of the mesh being traced for; without one, the default
    backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()
