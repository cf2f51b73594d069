"""Face verification: how well embeddings distinguish pairs of one person from pairs of two.

The protocol follows Labeled Faces in the Wild (`pairs.txt`: as many pairs of one person as of two),
but pairs are drawn by seed, so that any set of people can be used.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from persona_jax.errors import UserError

BOOTSTRAPS = 1000


def auc(scores_same: Float[np.ndarray, " S"], scores_different: Float[np.ndarray, " R"]) -> float:
    """Area under the ROC curve: P(same > different) + P(same = different) / 2.

    This is the Mann–Whitney U statistic divided by the number of (same, different) combinations.

    Raises:
        UserError: one kind has no scores, or a score is not finite.
    """
    if not (len(scores_same) and len(scores_different)):
        raise UserError(
            f"AUC needs scores of both kinds of pairs, got {len(scores_same)} same and "
            f"{len(scores_different)} different"
        )
    if not (np.isfinite(scores_same).all() and np.isfinite(scores_different).all()):
        raise UserError("AUC of scores that are not finite; look for NaN in the embeddings")
    ranks_same, ranks_different, levels = _levels(scores_same, scores_different)
    return _weighted_auc(
        np.bincount(ranks_same, minlength=levels), np.bincount(ranks_different, minlength=levels)
    )


def make_pairs(
    people: Sequence[str], count: int, seed: int
) -> tuple[Int[np.ndarray, "P 2"], Int[np.ndarray, "P 2"]]:
    """Draws `count` pairs of photos of one person, and `count` pairs of photos of two people.

    A person is drawn uniformly, then a photo of that person, so that people with hundreds of photos
    do not dominate. A pair may occur twice.

    Args:
        people: name of the person on each photo.
        count: number of pairs of each kind.
        seed: the pairs depend on (people, count, seed) alone.

    Returns:
        Indices into `people`: (same person, different people), each `[count, 2]`.

    Raises:
        UserError: `count` is below 1, or there are fewer than two people, or none has two photos.
    """
    names, person = np.unique(np.asarray(people, dtype=str), return_inverse=True)
    photos = [np.flatnonzero(person == i) for i in range(len(names))]
    several = [ids for ids in photos if len(ids) >= 2]
    if count < 1 or len(photos) < 2 or not several:
        raise UserError(
            f"verification pairs need count ≥ 1, two people and a person with two photos; got "
            f"count {count}, {len(photos)} people, {len(several)} of them with two photos"
        )
    rng = np.random.default_rng(seed)
    same = [
        rng.choice(several[i], 2, replace=False) for i in rng.integers(len(several), size=count)
    ]
    different = [
        [rng.choice(photos[i]) for i in rng.choice(len(photos), 2, replace=False)]
        for _ in range(count)
    ]
    return np.array(same), np.array(different)


def verification(
    embeddings: Float[np.ndarray, "P D"],
    people: Sequence[str],
    count: int = 3000,
    seed: int = 0,
    centre: Float[np.ndarray, " D"] | None = None,
) -> dict[str, float]:
    """Verifies people by the cosine similarity of embeddings of their photos.

    Args:
        embeddings: one per photo.
        people: name of the person on each photo.
        count: number of pairs of each kind (:func:`make_pairs`).
        seed: of the pairs and of the bootstrap.
        centre: subtracted from the embeddings first. Embeddings with a large common component, such
            as CLIP's, need the mean over photos of *other* people here.

    Returns:
        `auc`; `auc_low` and `auc_high`, its 95 % percentile bootstrap interval over *people*
        (pairs that share a person are not independent, so resampling pairs would give an interval
        that is too narrow); `accuracy`, the balanced accuracy at `threshold`, which is chosen to
        maximise it on the same pairs.

    Raises:
        UserError: the lengths differ, an embedding is zero or not finite, or
            :func:`make_pairs` raises it.
    """
    if len(embeddings) != len(people):
        raise UserError(f"verification: {len(embeddings)} embeddings for {len(people)} photos")
    x = np.asarray(embeddings, np.float64)
    x = x if centre is None else x - centre
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0))[:, 0])
    if len(bad):
        raise UserError(
            f"verification: {len(bad)} embeddings are zero or not finite, the first that of photo "
            f"{bad[0]} ({people[bad[0]]})"
        )
    x = x / norms
    same, different = make_pairs(people, count, seed)
    scores_same = np.sum(x[same[:, 0]] * x[same[:, 1]], axis=1)
    scores_different = np.sum(x[different[:, 0]] * x[different[:, 1]], axis=1)
    low, high = _auc_interval(scores_same, scores_different, same, different, people, seed)
    accuracy, threshold = _best_threshold(scores_same, scores_different)
    return {
        "auc": auc(scores_same, scores_different),
        "auc_low": low,
        "auc_high": high,
        "accuracy": accuracy,
        "threshold": threshold,
    }


def _levels(scores_same, scores_different) -> tuple[np.ndarray, np.ndarray, int]:
    """Ranks of the scores among the distinct values of both kinds, and the number of values."""
    values, ranks = np.unique(np.concatenate([scores_same, scores_different]), return_inverse=True)
    return ranks[: len(scores_same)], ranks[len(scores_same) :], len(values)


def _weighted_auc(same, different) -> float:
    """AUC from the total weight of each kind at each distinct score, lowest score first."""
    below = np.cumsum(different) - different / 2
    return float(np.sum(same * below) / (np.sum(same) * np.sum(different)))


def _best_threshold(scores_same, scores_different) -> tuple[float, float]:
    """The best balanced accuracy and its threshold: pairs at or above it count as one person."""
    ranks_same, ranks_different, levels = _levels(scores_same, scores_different)
    kept = np.cumsum(np.bincount(ranks_same, minlength=levels)[::-1])[::-1] / len(ranks_same)
    at_level = np.bincount(ranks_different, minlength=levels)
    rejected = (np.cumsum(at_level) - at_level) / len(ranks_different)
    best = int(np.argmax(kept + rejected))
    values = np.unique(np.concatenate([scores_same, scores_different]))
    return float((kept[best] + rejected[best]) / 2), float(values[best])


def _auc_interval(scores_same, scores_different, same, different, people, seed):
    """The 2.5 and 97.5 % quantiles of the AUC under resampling of people with replacement.

    A pair of one person who is drawn k times has weight k; a pair of two has weight k·k'.
    """
    names, person = np.unique(np.asarray(people, dtype=str), return_inverse=True)
    ranks_same, ranks_different, levels = _levels(scores_same, scores_different)
    rng = np.random.default_rng(seed)
    draws = []
    for times in rng.multinomial(len(names), np.full(len(names), 1 / len(names)), BOOTSTRAPS):
        weight = times[person]
        weight_same = np.bincount(ranks_same, weight[same[:, 0]], levels)
        weight_different = np.bincount(ranks_different, weight[different].prod(axis=1), levels)
        if weight_same.any() and weight_different.any():  # a sample of few people may lack pairs
            draws.append(_weighted_auc(weight_same, weight_different))
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
