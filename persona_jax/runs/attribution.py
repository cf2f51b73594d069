"""What each reference photo contributed to an adapter's pictures."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from persona_jax.data import images
from persona_jax.errors import UserError
from persona_jax.models.adapter import Adapter
from persona_jax.models.aggregators import SelfAttentionAggregator
from persona_jax.pipelines.generation import References
from persona_jax.pipelines.image_encoders import ImageEncoder

Batch = UInt8[np.ndarray, "_ S S 3"]
"""Pictures."""


@dataclasses.dataclass(frozen=True)
class Attribution:
    """For N photos.

    Attributes:
      shares: how much of the pooled embedding each gives, over heads; sums to 1 ``[N]``.
      heads: the same for each pooling head ``[H, N]``.
      influence: how far the pictures move, in the image encoder's view, when it is left out: 1 −
        cosine between what the image encoder sees of both, mean over pictures ``[N]``. NaN for a
        photo left out anyway.
      without: the first picture, painted without that photo; None where it is NaN.
    """

    shares: Float[np.ndarray, " N"]
    heads: Float[np.ndarray, "H N"]
    influence: Float[np.ndarray, " N"]
    without: list[np.ndarray | None]

    def record(self) -> dict:
        """As plain numbers, for JSON; None where nothing was measured."""
        moved = [None if np.isnan(x) else round(float(x), 4) for x in self.influence]
        return {
            "shares": [round(float(x), 4) for x in self.shares],
            "heads": np.round(self.heads, 4).tolist(),
            "influence": moved,
        }


def check(adapter: Adapter, weights: Float[np.ndarray, " N"], name: str) -> None:
    """Raises UserError where there is nothing to attribute: another aggregator, which attends to
    nothing, or fewer than two photos that count. `name` is the adapter's."""
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
    """Shares of attention, and leave-one-out influence.

    Args:
      adapter: one with self-attention.
      encoder: its image encoder.
      references: its references, the same for all pictures.
      generated: its pictures from all of them, some at a time.
      resample: other references → the same pictures again.
    """
    weights = np.asarray(references.weights[0])
    assert adapter.aggregator.module is not None
    _, heads = adapter.aggregator.module.apply(
        {"params": adapter.params["aggregator"]},
        references.embeddings[:1],
        references.weights[:1],
    )
    heads = np.asarray(heads[0])
    whole, influence, without = _unit_embeddings(encoder, generated), [], []
    for i in range(len(weights)):
        if weights[i] == 0:
            influence.append(np.nan)
            without.append(None)
            continue
        others = iter(resample([references.replace(weights=references.weights.at[:, i].set(0.0))]))
        first = next(others)
        moved = _unit_embeddings(encoder, itertools.chain([first], others))
        influence.append(float((1 - (moved * whole).sum(axis=1)).mean()))
        without.append(first[0])
    return Attribution(heads.mean(axis=0), heads, np.asarray(influence), without)


def draw(found: Attribution, photos: Sequence[Image.Image], size: int) -> Image.Image:
    """The photos with their shares and influences above; below each, a picture without it."""
    titles = [
        f"{share:.0%}" + ("" if np.isnan(moved) else f", moves {moved:.3f}")
        for share, moved in zip(found.shares, found.influence, strict=True)
    ]
    return images.grid([list(photos), found.without], size=max(size, 96), titles=titles)


def _unit_embeddings(encoder: ImageEncoder, batches: Iterable[Batch]) -> Float[np.ndarray, "P D"]:
    """Unit embeddings of pictures."""
    seen = np.concatenate([encoder.encode(map(Image.fromarray, some)) for some in batches])
    return seen / np.linalg.norm(seen, axis=1, keepdims=True)
