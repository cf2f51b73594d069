"""Reference statistics of real photos for FID and KID, which can be saved and loaded."""

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from persona_jax.errors import UserError
from persona_jax.metrics import distributions
from persona_jax.runtime import outputs

LEGACY = "Inception, legacy"
"""The network whose statistics pytorch-fid's files hold."""


@dataclasses.dataclass(frozen=True)
class ReferenceStatistics:
    """Statistics of one network's features of real photos.

    Attributes:
      mean, covariance: of the features ``[F]``, ``[F, F]``, float64.
      count: number of photos; None if a file does not contain it.
      features: ``[R, F]``, for KID; None if a file does not contain them.
    """

    mean: Float[np.ndarray, " F"]
    covariance: Float[np.ndarray, "F F"]
    count: int | None = None
    features: Float[np.ndarray, "R F"] | None = None


def of(features: Float[np.ndarray, "R F"]) -> ReferenceStatistics:
    """Computes the statistics of photos' features.

    Raises:
      UserError: there are fewer than two photos, or features are not finite.
    """
    moments = distributions.moments(features)
    return ReferenceStatistics(moments.mean, moments.covariance, moments.count, features)


def save(file: Path, references: Mapping[str, ReferenceStatistics]) -> None:
    """Writes the statistics of each network to an ``.npz`` file, atomically.

    Raises:
      UserError: the file cannot be written.
    """
    arrays = {}
    for network, reference in references.items():
        arrays[f"{network}/mu"], arrays[f"{network}/sigma"] = reference.mean, reference.covariance
        if reference.features is not None:
            arrays[f"{network}/features"] = reference.features
    with outputs.whole(file) as beside, beside.open("wb") as stream:
        # mypy takes any name for allow_pickle; these have a slash.
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def load(file: Path) -> dict[str, ReferenceStatistics]:
    """Loads a file of :func:`save`, or of pytorch-fid (``mu`` and ``sigma`` alone), by network.

    Raises:
      UserError: the file cannot be read, or is neither.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(f"{file}: statistics cannot be read ({error})") from error
    if {"mu", "sigma"} <= arrays.keys():
        arrays = {f"{LEGACY}/{name}": arrays[name] for name in ("mu", "sigma")}
    by_network = {}
    for network in dict.fromkeys(name.rpartition("/")[0] for name in arrays):
        mean, covariance, features = (
            arrays.get(f"{network}/{name}") for name in ("mu", "sigma", "features")
        )
        if mean is None or covariance is None or covariance.shape != 2 * mean.shape:
            raise UserError(f"{file}: no statistics of pictures; expected mu [F] and sigma [F, F]")
        count = None if features is None else len(features)
        by_network[network] = ReferenceStatistics(mean, covariance, count, features)
    if not by_network:
        raise UserError(f"{file}: no statistics of pictures in it")
    return by_network
