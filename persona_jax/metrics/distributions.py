"""Distances between two sets of images by their features: FID, KID, IS, precision and recall.

Features and logits may come from any network. All computations are in float64.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from persona_jax.errors import UserError

BLOCK = 4096
"""Rows that are made float64 at a time."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and scatter of features; the moments of parts can be merged (:func:`merge`).

    Attributes:
      count: number of images.
      mean: of their features ``[D]``.
      scatter: Σ (x − mean)(x − mean)ᵀ ``[D, D]``.
    """

    count: int
    mean: Float[np.ndarray, " D"]
    scatter: Float[np.ndarray, "D D"]

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Unbiased covariance of the features.

        Raises:
          UserError: fewer than two pictures.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs 2 pictures or more, got {self.count}")
        return self.scatter / (self.count - 1)


def moments(
    features: Float[np.ndarray, "P D"], rows: Int[np.ndarray, " R"] | None = None
) -> Moments:
    """The moments of the features of P images, or of some rows of them.

    Only :data:`BLOCK` rows at a time are held in float64.

    Raises:
      UserError: a feature is not finite.
    """
    count = len(features) if rows is None else len(rows)

    def block(start: int) -> Moments:
        chosen = slice(start, start + BLOCK) if rows is None else rows[start : start + BLOCK]
        wide = features[chosen].astype(np.float64)
        if not np.isfinite(wide).all():
            raise UserError("features that are not finite; look for NaN in the pictures")
        mean = wide.mean(axis=0)
        wide -= mean
        return Moments(len(wide), mean, wide.T @ wide)

    return merge(block(start) for start in range(0, count, BLOCK))


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of the images of all parts together, one part at a time.

    The parallel update of Chan, Golub & LeVeque (1983); unlike sums of squares, it does not lose
    digits where the mean is large.
    """
    return functools.reduce(_merged, parts)


def _merged(one: Moments, other: Moments) -> Moments:
    count = one.count + other.count
    step = other.mean - one.mean
    between = np.outer(step, step * (one.count * other.count / count))
    return Moments(
        count, one.mean + step * (other.count / count), one.scatter + other.scatter + between
    )


@runtime_checkable
class Statistics(Protocol):
    """Statistics of features, however they are stored."""

    @property
    def mean(self) -> Float[np.ndarray, " D"]:
        """Mean ``[D]``."""

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """Covariance ``[D, D]``."""


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """FID (Heusel et al. 2017, eq. 6): ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½).

    tr (Σ₁ Σ₂)^½ is computed as the sum of the singular values of Σ₁^½ Σ₂^½, which are real and
    accurate for covariances of any rank.
    """
    first, second = one.covariance, other.covariance
    shared = np.linalg.svd(_root(first) @ _root(second), compute_uv=False).sum()
    mean = ((one.mean - other.mean) ** 2).sum()
    return float(mean + np.trace(first) + np.trace(second) - 2.0 * shared)


def frechet_distance_infinity(
    features: Float[np.ndarray, "P D"], reference: Statistics, seed: int
) -> float:
    """FID extrapolated to infinitely many images (Chong & Forsyth 2020).

    FID is about linear in 1/N. It is computed on 15 random subsets, whose sizes N are evenly spaced
    from a tenth of the images to all; the result is the value of the fitted line at 1/N = 0.

    Args:
      features: of all generated images; float32 is enough.
      reference: statistics of the real images.
      seed: of the subsets.

    Raises:
      UserError: fewer than 20 images.
    """
    if len(features) < 20:
        raise UserError(f"FID infinity needs 20 pictures or more, got {len(features)}")
    rng = np.random.default_rng(seed)
    sizes = np.linspace(len(features) // 10, len(features), 15).astype(np.int64)
    distances = []
    for size in sizes:
        chosen = rng.choice(len(features), size, replace=False)
        distances.append(frechet_distance(moments(features, chosen), reference))
    _, at_zero = np.polyfit(1.0 / sizes, distances, 1)
    return float(at_zero)


def kernel_distance(
    one: Float[np.ndarray, "P D"],
    other: Float[np.ndarray, "R D"],
    seed: int,
    subsets: int = 100,
    subset_size: int = 1000,
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018): unbiased squared MMD with the kernel (x·y / D + 1)³, over random
    subsets, as torch-fidelity has it: of all features (float32 ones will do), one subset at a time
    in float64.

    Args:
      one, other: features of the two sets.
      seed: of the subsets.
      subsets: number of subsets.
      subset_size: images in each; at most the size of the smaller set.

    Returns:
      (mean, standard deviation) over the subsets.

    Raises:
      UserError: a set has fewer than two images.
    """
    size = min(subset_size, len(one), len(other))
    if size < 2:
        raise UserError(f"KID needs 2 pictures or more on each side, got {size}")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = one[rng.choice(len(one), size, replace=False)].astype(np.float64)
        y = other[rng.choice(len(other), size, replace=False)].astype(np.float64)
        values.append(squared_mmd(x, y))
    return float(np.mean(values)), float(np.std(values))


def precision_recall(
    generated: Float[np.ndarray, "P D"], real: Float[np.ndarray, "R D"], k: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1).

    The manifold of a set is the union of balls around its features, each with the distance to the
    feature's k-th nearest neighbour in the set as radius. Precision is the share of generated
    images within the manifold of the real ones; recall is the share of real images within the
    manifold of the generated ones. It needs all features (float32 is enough); distances are
    computed in float64, in blocks of rows. Time grows with P · R; the paper uses 50,000 of each.

    Returns:
      (precision, recall), each from 0 to 1.

    Raises:
      UserError: a set has k images or fewer, or the feature sizes differ.
    """
    if min(len(generated), len(real)) <= k or generated.shape[1] != real.shape[1]:
        raise UserError(
            f"precision and recall with k = {k}: features {generated.shape} and {real.shape}; "
            f"expected the same network's, of more than {k} pictures each"
        )

    def within(points: np.ndarray, centres: np.ndarray) -> float:
        # Index k, not k − 1: the nearest neighbour of a feature in its own set is itself.
        own = _distance_blocks(centres, centres)
        radii = np.concatenate([np.partition(rows, k, axis=1)[:, k].copy() for rows in own])
        found = _distance_blocks(points, centres)
        return float(np.concatenate([(rows <= radii).any(axis=1) for rows in found]).mean())

    return within(generated, real), within(real, generated)


def _distance_blocks(x: Float[np.ndarray, "M D"], y: Float[np.ndarray, "N D"]) -> Iterator:
    """:func:`_squared_distances` of some rows of `x` at a time from all of `y`, float64."""
    for start in range(0, len(x), 512):
        rows = x[start : start + 512].astype(np.float64)
        parts = (y[i : i + BLOCK].astype(np.float64) for i in range(0, len(y), BLOCK))
        yield np.concatenate([_squared_distances(rows, part) for part in parts], axis=1)


def _squared_distances(x: Float[np.ndarray, "M D"], y: Float[np.ndarray, "N D"]) -> np.ndarray:
    squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * x @ y.T
    return np.maximum(squares, 0.0)


def squared_mmd(x: Float[np.ndarray, "M D"], y: Float[np.ndarray, "M D"]) -> float:
    """Unbiased squared maximum mean discrepancy with KID's kernel (Gretton et al. 2012, eq. 4)."""
    count, dim = x.shape

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / dim + 1.0) ** 3

    def within(a: np.ndarray) -> float:
        all_pairs = kernel(a, a)
        return (all_pairs.sum() - np.trace(all_pairs)) / (count * (count - 1))

    return float(within(x) + within(y) - 2.0 * kernel(x, y).mean())


def inception_score(
    logits: Float[np.ndarray, "P C"], seed: int, splits: int = 10, uniform: bool = False
) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016): exp E KL(p(y|x) ‖ p(y)), over shuffled splits.

    Args:
      logits: of the classes.
      seed: of the shuffle by NumPy's legacy generator, as in torch-fidelity.
      splits: number of equal parts. Fewer splits give a higher score, so report this number too.
      uniform: use p(y) = 1 / C, as some papers define it, instead of the marginal.

    Returns:
      (mean, standard deviation) over the splits.

    Raises:
      UserError: fewer images than splits.
    """
    if splits < 1 or len(logits) < splits:
        raise UserError(f"Inception Score of {len(logits)} pictures in {splits} splits; use fewer")
    order = np.random.RandomState(seed).permutation(len(logits))
    # torch-fidelity's cuts, so that the scores agree when splits have unequal lengths.
    cuts = [len(logits) * i // splits for i in range(splits + 1)]
    scores = []
    for start, end in pairwise(cuts):
        part = logits[order[start:end]].astype(np.float64)
        part -= np.logaddexp.reduce(part, axis=1, keepdims=True)
        p = np.exp(part)
        q = np.full_like(p[0], 1.0 / len(p[0])) if uniform else p.mean(axis=0)
        positive = np.broadcast_to(q > 0, p.shape)  # classes of probability 0 in all images add 0
        log_ratio = np.subtract(
            part, np.log(q, where=q > 0, out=np.zeros_like(q)), where=positive, out=0 * p
        )
        scores.append(np.exp((p * log_ratio).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _root(matrix: np.ndarray) -> np.ndarray:
    """Symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
