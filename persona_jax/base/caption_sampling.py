"""The captions a base learns from: a photo may have several kinds, and each step draws one."""

from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from persona_jax.data.photo_datasets import Photos
from persona_jax.data.portraits import descriptions as words
from persona_jax.errors import UserError


def captions_of(
    photos: Photos, rows: Sequence[int] | Int[np.ndarray, " P"]
) -> dict[str, list[str]]:
    """P captions by kind.

    "plain" says what may change from photo to photo; of portraits, "full" says also what the photo
    shows of the person.
    """
    kinds = {"plain": [photos.captions[row] for row in rows]}
    if photos.has("full_caption"):
        texts = photos.truth("full_caption")
        kinds["full"] = [str(texts[row]) for row in rows]
    return kinds


def looks_of(
    photos: Photos, rows: Sequence[int] | Int[np.ndarray, " P"]
) -> tuple[list[tuple[str, str]], Int[np.ndarray, "P K"]]:
    """K pairs of opposite sentences about looks, and which of each is true of P photos.

    Returns:
      The sentences, and 0 or 1, or −1 where the photo says neither ``[P, K]``; no pairs at all
      where a dataset knows nothing of looks.
    """
    if not photos.has("identity"):
        return [], np.empty((len(rows), 0), np.int32)
    identity, scene = photos.truth("identity")[rows], photos.truth("scene")[rows]
    return words.opposites(), words.which_opposite(identity, scene)


def odds_of(kinds: Collection[str], shares: Mapping[str, float]) -> Float[np.ndarray, " V"]:
    """How often each of the V kinds is drawn: its share; "plain" has what is left, and the shares
    of kinds that the photos lack.

    Raises:
      UserError: a negative share, or shares of more than 1 together.
    """
    if min(shares.values()) < 0 or sum(shares.values()) > 1:
        raise UserError(f"captions: shares {dict(shares)}; expected 0 or more, at most 1 together")
    odds = {kind: float(shares.get(kind, 0.0)) for kind in kinds}
    odds["plain"] = 1.0 - sum(odds.values())
    return np.asarray([odds[kind] for kind in kinds], np.float32)


def draw_caption(
    keys: Key[Array, " B"], tokens: Int[Array, "B V T"], odds: Float[Array | np.ndarray, " V"]
) -> Int[Array, "B T"]:
    """One of the V kinds for each photo, drawn with these odds."""
    draw = jax.vmap(lambda key: jax.random.choice(key, len(odds), p=jnp.asarray(odds)))
    return jnp.take_along_axis(tokens, draw(keys)[:, None, None], axis=1)[:, 0]
