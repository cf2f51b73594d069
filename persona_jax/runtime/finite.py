"""Finds arrays with numbers that are not finite, or too large."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def magnitudes(tree: Any) -> Iterator[tuple[str, float]]:
    """Yields the path and largest magnitude of each floating-point array; NaN if it has a NaN."""
    named = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if named:
        largest = np.asarray(_largest(tuple(leaf for _, leaf in named)))
        for (path, _), value in zip(named, largest, strict=True):
            yield jax.tree_util.keystr(path, simple=True, separator="."), float(value)


@jax.jit
def _largest(leaves: tuple[Any, ...]) -> jax.Array:
    return jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(jnp.float32) for x in leaves])


def beyond(tree: Any, limit: float = float(np.finfo(np.float32).max)) -> str | None:
    """Names the first array with a number that is not finite or exceeds `limit`; None if none."""
    for name, value in magnitudes(tree):
        if not value <= limit:
            what = f"has a number of magnitude {value:.3g}"
            return f"{name} {what if math.isfinite(value) else 'is not finite'}"
    return None
