"""How far two sets of pictures are apart, by their features: FID, KID, IS, precision and recall.

Features and logits come from one of the networks that score; nothing here knows which. All float64.
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
    """Mean and scatter of pictures' features; those of parts merge in any order (:func:`merge`).

    Attributes:
      count: pictures.
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
    """The moments of P pictures' features, or of some rows of them; :data:`BLOCK` rows at a time,
    so that it takes little memory beside the features.

    Raises:
      UserError: a feature that is not finite.
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
    """The moments of all parts' pictures together, by the parallel update of Chan, Golub & LeVeque
    (1983): no sums of squares, whose rounding errors grow with the mean. One part is held at a
    time."""
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
    """Mean ``[D]`` and covariance ``[D, D]`` of features."""

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """FID (Heusel et al. 2017, eq. 6): ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½).

    The last trace is the sum of the singular values of Σ₁^½ Σ₂^½, which stay real and accurate for
    covariances of any rank.
    """
    first, second = one.covariance, other.covariance
    shared = np.linalg.svd(_root(first) @ _root(second), compute_uv=False).sum()
    mean = ((one.mean - other.mean) ** 2).sum()
    return float(mean + np.trace(first) + np.trace(second) - 2.0 * shared)


def frechet_distance_infinity(
    features: Float[np.ndarray, "P D"], reference: Statistics, seed: int
) -> float:
    """FID extrapolated to infinitely many pictures (Chong & Forsyth 2020).

    FID is computed of random subsets, evenly spaced from a tenth of the pictures to all, and is
    linear in 1/N: the line's value at 0. It takes all features; float32 ones will do.

    Raises:
      UserError: fewer than 20 pictures.
    """
    if len(features) < 20:
        raise UserError(f"FID infinity needs 20 pictures or more, got {len(features)}")
    rng = np.random.default_rng(seed)
    sizes = np.linspace(len(features) // 10, len(features), 15).astype(np.int64)
    found = []
    for size in sizes:
        chosen = rng.choice(len(features), size, replace=False)
        found.append(frechet_distance(moments(features, chosen), reference))
    _, at_zero = np.polyfit(1.0 / sizes, found, 1)
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
      one, other: features.
      seed: which subsets are drawn.
      subsets: how many.
      subset_size: pictures in each; as many as the smaller set has, if that is fewer.

    Returns:
      (mean, standard deviation) over the subsets.

    Raises:
      UserError: fewer than two pictures on a side.
    """
    size = min(subset_size, len(one), len(other))
    if size < 2:
        raise UserError(f"KID needs 2 pictures or more on each side, got {size}")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(subsets):
        x = one[rng.choice(len(one), size, replace=False)].astype(np.float64)
        y = other[rng.choice(len(other), size, replace=False)].astype(np.float64)
        found.append(squared_mmd(x, y))
    return float(np.mean(found)), float(np.std(found))


def precision_recall(
    generated: Float[np.ndarray, "P D"], real: Float[np.ndarray, "R D"], k: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1).

    A set's manifold is the union of balls about its features that reach to each one's k-th nearest
    neighbour in the set. Precision is the share of generated pictures within the real ones'
    manifold, recall the share of real ones within the generated ones'. It takes all features
    (float32 ones will do); distances are float64, of a block of rows at a time. The time grows with
    P · R: the paper takes 50,000 of each.

    Raises:
      UserError: no more than k pictures on a side, or features of different networks.
    """
    if min(len(generated), len(real)) <= k or generated.shape[1] != real.shape[1]:
        raise UserError(
            f"precision and recall with k = {k}: features {generated.shape} and {real.shape}; "
            f"expected the same network's, of more than {k} pictures each"
        )

    def within(points: np.ndarray, centres: np.ndarray) -> float:
        # The nearest of a feature's neighbours in its own set is itself.
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
      seed: of the shuffle, NumPy's legacy generator, as torch-fidelity does it.
      splits: equal parts; the score grows with fewer, so it belongs beside the number.
      uniform: take p(y) as 1 / C, which some papers write, instead of the marginal.

    Returns:
      (mean, standard deviation) over the splits.

    Raises:
      UserError: fewer pictures than splits.
    """
    if splits < 1 or len(logits) < splits:
        raise UserError(f"Inception Score of {len(logits)} pictures in {splits} splits; use fewer")
    order = np.random.RandomState(seed).permutation(len(logits))
    # The same cuts as torch-fidelity's, so that splits of unequal length agree.
    cuts = [len(logits) * i // splits for i in range(splits + 1)]
    scores = []
    for start, end in pairwise(cuts):
        part = logits[order[start:end]].astype(np.float64)
        part -= np.logaddexp.reduce(part, axis=1, keepdims=True)
        p = np.exp(part)
        q = np.full_like(p[0], 1.0 / len(p[0])) if uniform else p.mean(axis=0)
        there = np.broadcast_to(q > 0, p.shape)  # what no picture shows adds nothing
        off = np.subtract(
            part, np.log(q, where=q > 0, out=np.zeros_like(q)), where=there, out=0 * p
        )
        scores.append(np.exp((p * off).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _root(matrix: np.ndarray) -> np.ndarray:
    """Symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
