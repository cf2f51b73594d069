"""What pictures are held against: statistics of real photos, kept in a file and used again."""

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
    """What one network makes of real photos.

    Attributes:
      mean, covariance: of its features ``[F]``, ``[F, F]``, float64.
      count: photos; None where a file does not say.
      features: ``[R, F]``, for KID; None where a file has none.
    """

    mean: Float[np.ndarray, " F"]
    covariance: Float[np.ndarray, "F F"]
    count: int | None = None
    features: Float[np.ndarray, "R F"] | None = None


def of(features: Float[np.ndarray, "R F"]) -> ReferenceStatistics:
    """The statistics of photos' features.

    Raises:
      UserError: fewer than two photos, or features that are not finite.
    """
    found = distributions.moments(features)
    return ReferenceStatistics(found.mean, found.covariance, found.count, features)


def save(file: Path, references: Mapping[str, ReferenceStatistics]) -> None:
    """Writes an ``.npz`` of the references, by network; the name is the file's only when whole.

    Raises:
      UserError: it cannot be written.
    """
    arrays = {}
    for network, reference in references.items():
        arrays[f"{network}/mu"], arrays[f"{network}/sigma"] = reference.mean, reference.covariance
        arrays[f"{network}/features"] = reference.features
    with outputs.whole(file) as beside, beside.open("wb") as stream:
        np.savez(stream, **arrays)


def load(file: Path) -> dict[str, ReferenceStatistics]:
    """What :func:`save` wrote, by network; or a file of pytorch-fid's, ``mu`` and ``sigma`` alone.

    Raises:
      UserError: not readable, or neither.
    """
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(f"{file}: no statistics to be read ({error})") from error
    if {"mu", "sigma"} <= arrays.keys():
        arrays = {f"{LEGACY}/{name}": arrays[name] for name in ("mu", "sigma")}
    out = {}
    for network in dict.fromkeys(name.rpartition("/")[0] for name in arrays):
        mean, covariance, features = (
            arrays.get(f"{network}/{name}") for name in ("mu", "sigma", "features")
        )
        if mean is None or covariance is None or covariance.shape != 2 * mean.shape:
            raise UserError(f"{file}: no statistics of pictures; expected mu [F] and sigma [F, F]")
        count = None if features is None else len(features)
        out[network] = ReferenceStatistics(mean, covariance, count, features)
    if not out:
        raise UserError(f"{file}: no statistics of pictures in it")
    return out
