"""Which arrays of a tree have numbers that nothing good comes of."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def magnitudes(tree: Any) -> Iterator[tuple[str, float]]:
    """The largest magnitude of each array of numbers, by its path; nan where it has one."""
    named = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if named:
        found = np.asarray(_largest(tuple(leaf for _, leaf in named)))
        for (path, _), value in zip(named, found, strict=True):
            yield jax.tree_util.keystr(path, simple=True, separator="."), float(value)


@jax.jit
def _largest(leaves: tuple[Any, ...]) -> jax.Array:
    return jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(jnp.float32) for x in leaves])


def beyond(tree: Any, limit: float = float(np.finfo(np.float32).max)) -> str | None:
    """Says which array has a number that is not finite, or larger than `limit`; None if none."""
    for name, value in magnitudes(tree):
        if not value <= limit:
            what = f"has a number of magnitude {value:.3g}"
            return f"{name} {what if math.isfinite(value) else 'is not finite'}"
    return None
