"""The captions a base learns from: a photo may have several, and each step draws one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from persona_jax.data.photos import Photos


def captions_of(photos: Photos, rows: Sequence[int] | Int[np.ndarray, " P"]) -> list[list[str]]:
    """One list of P captions per kind: what may change from photo to photo; and, of portraits,
    the same with the looks that the photo shows."""
    plain = [photos.captions[row] for row in rows]
    if not photos.has("full_caption"):
        return [plain]
    full = photos.truth("full_caption")
    return [plain, [str(full[row]) for row in rows]]


def draw_caption(
    keys: Key[Array, " B"], tokens: Int[Array, "B V T"], full: float
) -> Int[Array, "B T"]:
    """The full caption, the last of V, with probability `full`; else the plain one."""
    chosen = jax.vmap(jax.random.uniform)(keys) < full
    return jnp.where(chosen[:, None], tokens[:, -1], tokens[:, 0])
