"""Attribution: how much each reference photo contributed to an adapter's images."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from persona_jax.data import images
from persona_jax.errors import UserError
from persona_jax.models.adapter import Adapter
from persona_jax.models.aggregators import SelfAttentionAggregator
from persona_jax.pipelines.generation import References
from persona_jax.pipelines.image_encoders import ImageEncoder

Batch = UInt8[np.ndarray, "_ S S 3"]
"""A batch of images."""


@dataclasses.dataclass(frozen=True)
class Attribution:
    """The contributions of N photos.

    Attributes:
      shares: attention weight of each photo in the pooled embedding, mean over heads; sums to 1
        ``[N]``.
      heads: the same for each pooling head ``[H, N]``.
      influence: how much the images change without the photo: 1 − cosine between the image
        encoder's embeddings with and without it, mean over images ``[N]``. NaN for a photo of
        weight 0.
      without: the first image, generated without that photo; None where `influence` is NaN.
    """

    shares: Float[np.ndarray, " N"]
    heads: Float[np.ndarray, "H N"]
    influence: Float[np.ndarray, " N"]
    without: list[np.ndarray | None]

    def record(self) -> dict:
        """The numbers for JSON, rounded; None where `influence` is NaN."""
        moved = [None if np.isnan(x) else round(float(x), 4) for x in self.influence]
        return {
            "shares": [round(float(x), 4) for x in self.shares],
            "heads": np.round(self.heads, 4).tolist(),
            "influence": moved,
        }


def check(adapter: Adapter, weights: Float[np.ndarray, " N"], name: str) -> None:
    """Checks that attribution is possible.

    Args:
      adapter: must have a self-attention aggregator.
      weights: of the photos; at least two must be above 0.
      name: of the adapter, for the error.

    Raises:
      UserError: the aggregator has no attention, or fewer than two photos have a weight.
    """
    if not isinstance(adapter.aggregator.module, SelfAttentionAggregator):
        raise UserError(
            f"attribution: {name} does not attend to photos; it is for self-attention",
            argument="attribution",
        )
    if (weights > 0).sum() < 2:
        raise UserError(
            "attribution: give two photos or more, to leave one out", argument="attribution"
        )


def attribute(
    adapter: Adapter,
    encoder: ImageEncoder,
    references: References,
    generated: Iterable[Batch],
    resample: Callable[[Sequence[References]], Iterable[Batch]],
) -> Attribution:
    """Computes shares of attention, and leave-one-out influence.

    Args:
      adapter: with a self-attention aggregator.
      encoder: its image encoder.
      references: its references, the same for all images.
      generated: the images from all references, in batches.
      resample: generates the same images from other references.
    """
    weights = np.asarray(references.weights[0])
    assert adapter.aggregator.module is not None
    out = adapter.aggregator.module.apply(
        {"params": adapter.params["aggregator"]},
        references.embeddings[:1],
        references.weights[:1],
    )
    _, shares = cast(tuple[Array, Array], out)  # where collections are mutable: another tuple
    heads = np.asarray(shares[0])
    whole, influence = _unit_embeddings(encoder, generated), []
    without: list[np.ndarray | None] = []
    for i in range(len(weights)):
        if weights[i] == 0:
            influence.append(np.nan)
            without.append(None)
            continue
        rest = references.weights.at[:, i].set(0.0)
        others = iter(resample([dataclasses.replace(references, weights=rest)]))
        first = next(others)
        moved = _unit_embeddings(encoder, itertools.chain([first], others))
        influence.append(float((1 - (moved * whole).sum(axis=1)).mean()))
        without.append(first[0])
    return Attribution(heads.mean(axis=0), heads, np.asarray(influence), without)


def draw(result: Attribution, photos: Sequence[Image.Image], size: int) -> Image.Image:
    """Draws each photo with its share and influence, and below it an image without that photo."""
    titles = [
        f"{share:.0%}" + ("" if np.isnan(moved) else f", moves {moved:.3f}")
        for share, moved in zip(result.shares, result.influence, strict=True)
    ]
    return images.grid([list(photos), result.without], size=max(size, 96), titles=titles)


def _unit_embeddings(encoder: ImageEncoder, batches: Iterable[Batch]) -> Float[np.ndarray, "P D"]:
    """Unit embeddings of images."""
    embeddings = np.concatenate([encoder.encode(map(Image.fromarray, some)) for some in batches])
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
