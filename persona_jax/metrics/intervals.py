"""Bootstrap intervals of means over people and training seeds (Efron & Tibshirani 1993)."""

import dataclasses

import numpy as np
from jaxtyping import Float

from persona_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Formats as ``0.231 (0.225 to 0.238)``."""
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def bootstrap(values: Float[np.ndarray, "R P"], draws: int = 2000) -> Mean:
    """The mean over R seeds and P people, with its 95 % percentile bootstrap interval.

    People and seeds are both resampled with replacement. To compare two methods on the same people
    and seeds, pass the differences.

    Args:
      values: one for each training seed and person.
      seed: of the bootstrap.
      draws: number of bootstrap samples.

    Raises:
      UserError: fewer than two people, or a value that is not finite.
    """
    runs, people = values.shape
    if people < 2 or not np.isfinite(values).all():
        raise UserError(f"interval of {people} people: two or more are needed, all finite")
    rng = np.random.default_rng(0)
    # The mean of a bootstrap sample is bilinear in the counts of drawn people and drawn seeds.
    people_weights = rng.multinomial(people, np.full(people, 1 / people), size=draws) / people
    run_weights = rng.multinomial(runs, np.full(runs, 1 / runs), size=draws) / runs
    means = np.einsum("dr,rp,dp->d", run_weights, values.astype(np.float64), people_weights)
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(float(values.mean()), float(low), float(high))
