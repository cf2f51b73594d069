"""Low-rank updates of the attention projections (LoRA, Hu et al. 2021), as a separate tree."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, PRNGKeyArray

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Projections updated in every self- and cross-attention: the usual ones of diffusers and PEFT."""

LoraTree = Mapping[str, Mapping[str, Mapping[str, Array]]]
"""``{torch path of a projection: {"lora_A": {"kernel": [C_in, r]}, "lora_B": {"kernel": [r,
C_out]}}}``; The names are PEFT's, so that a saved tree is a file that diffusers reads."""


def init(key: PRNGKeyArray, params: Mapping, rank: int) -> dict:
    """Initial updates A · B of rank r, exactly zero, for every attention projection of a tower.

    A is drawn from N(0, 1/r²), B is zero (PEFT's "gaussian").

    Args:
      key: randomness.
      params: the tower's parameters.
      rank: r.

    Raises:
      ValueError: the rank is below 1, or the tower has no attention.
    """
    kernels = _kernels(params)
    if rank < 1 or not kernels:
        raise ValueError(f"rank {rank}, {len(kernels)} attention projections: 1 or more of each")
    keys = jax.random.split(key, len(kernels))
    return {
        name: {
            "lora_A": {"kernel": jax.random.normal(k, (kernels[name].shape[0], rank)) / rank},
            "lora_B": {"kernel": jnp.zeros((rank, kernels[name].shape[1]))},
        }
        for k, name in zip(keys, sorted(kernels), strict=True)
    }


def merge(params: Mapping, lora: LoraTree, scale: Array | float = 1.0) -> dict:
    """The tower's parameters as a new tree, with W + scale · A · B for each updated W.

    Args:
      params: the tower's parameters.
      lora: as from :func:`init`.
      scale: α/r of the paper; 0 leaves the tower unchanged.

    Raises:
      KeyError: an update names a projection that the tower does not have.
    """
    flat = traverse_util.flatten_dict(params)
    paths = {".".join(path[:-1]): path for path in flat if path[-1] == "kernel"}
    for name, update in lora.items():
        kernel = flat[paths[name]]
        change = scale * update["lora_A"]["kernel"] @ update["lora_B"]["kernel"]
        flat[paths[name]] = kernel + change.astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)


def _kernels(params: Mapping) -> dict[str, Array]:
    """Kernels ``[C_in, C_out]`` of the attention projections, by torch path."""
    return {
        ".".join(path[:-1]): leaf
        for path, leaf in traverse_util.flatten_dict(params).items()
        if path[-1] == "kernel" and path[-2] in PROJECTIONS
    }
