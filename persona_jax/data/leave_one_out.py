"""One training example: a target photo, and other photos of the same person as references."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Example(NamedTuple):
    """The photos of one example, as rows of the dataset; N = n - 1.

    Attributes:
      target: row of the photo held out.
      references: rows of the other photos drawn; 0 where `mask` is 0.
      mask: 1 for a reference, 0 for padding, which comes last.
      flip: whether the whole example, target and references, is mirrored.
    """

    target: int
    references: Int[np.ndarray, " N"]
    mask: Float[np.ndarray, " N"]
    flip: bool


def leave_one_out(
    photos: Int[np.ndarray, " K"],
    target: int,
    rng: np.random.Generator,
    *,
    n: int,
    fixed: bool,
    flip: bool,
) -> Example:
    """Holds `target` out of up to `n` photos of its person and draws references from the rest.

    The references are distinct and never the target. Their number is uniform in
    [1, min(n, K) - 1], or exactly min(n, K) - 1 if `fixed` (the paper's setting, n = 10).

    Args:
      photos: rows of all K >= 2 photos of the person.
      target: one of them.
      n: photos drawn in all, the target included; at least 2.
      fixed: whether to use as many references as possible.
      flip: whether to mirror half of the examples (off if identity has a left and a right side).

    Raises:
      ValueError: n or K is below 2, or the target is not among `photos`.
    """
    others = photos[photos != target]
    if n < 2 or len(others) < 1 or len(others) == len(photos):
        raise ValueError(
            f"n = {n}, photos {photos}, target {target}: expected n and photos of at least 2, "
            "the target among them"
        )
    most = min(n, len(photos)) - 1
    count = most if fixed else int(rng.integers(1, most, endpoint=True))
    references = np.zeros(n - 1, np.int64)
    references[:count] = rng.choice(others, count, replace=False)
    mask = (np.arange(n - 1) < count).astype(np.float32)
    return Example(int(target), references, mask, bool(flip and rng.random() < 0.5))


def with_wrong_photos(
    example: Example, strangers: Int[np.ndarray, " S"], rng: np.random.Generator
) -> Example:
    """Replaces a minority of the references, at least one, by photos of other people.

    The positions are random. An example with fewer than three references stays unchanged.

    Args:
      strangers: rows of photos of other people, at least as many as are replaced.
    """
    count = int(example.mask.sum())
    if count < 3:
        return example
    wrong = int(rng.integers(1, (count - 1) // 2, endpoint=True))
    references = example.references.copy()
    references[rng.choice(count, wrong, replace=False)] = strangers[:wrong]
    return example._replace(references=references)
