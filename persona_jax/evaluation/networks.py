"""The networks whose features and classes say how real pictures look: FID, KID and IS by them.

A network is a function from pictures in [−1, 1] to a :class:`NetworkOutput`; whoever reports a
figure names the network beside it.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from persona_jax.data import images, outside
from persona_jax.evaluation.trait_classifier import TraitClassifier
from persona_jax.interop import network_weights
from persona_jax.metrics.features import inception_pass
from persona_jax.runtime import buckets
from persona_jax.runtime.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class NetworkOutput:
    """What a network makes of P pictures.

    Attributes:
      features: for FID and KID ``[P, F]``.
      classes: logits, for the Inception Score ``[P, C]``; None where it knows no classes.
    """

    features: Float[np.ndarray, "P F"]
    classes: Float[np.ndarray, "P C"] | None


Network = Callable[[Float[np.ndarray, "P S S 3"]], NetworkOutput]


def from_trait_classifier(classifier: TraitClassifier) -> Network:
    """The reader's penultimate layer, and expression × background as classes."""

    def run(pictures: np.ndarray) -> NetworkOutput:
        found = classifier.read(pictures)
        return NetworkOutput(found.features, found.logits)

    return run


def from_face_encoder(embed: Callable[[np.ndarray], np.ndarray]) -> Network:
    """An embedding of faces, brought to unit variance or so, as KID's kernel expects; no classes.

    embed: pictures in [−1, 1] → unit embeddings ``[P, D]``.
    """

    def run(pictures: np.ndarray) -> NetworkOutput:
        faces = embed(pictures)
        return NetworkOutput(faces * faces.shape[1] ** 0.5, None)

    return run


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What :func:`inception_networks` asks of a command line; ``inception`` is None where
    it is not asked for."""
    parser.add_argument(
        "--inception",
        nargs="?",
        const="",
        help="FID, KID and IS by Inception v3 too: its weights, fetched if not named",
    )
    parser.add_argument("--inception_sha256", help="of weights to accept beside the known ones")


def inception_networks(file: str, sha256: str | None, folder: Path) -> dict[str, Network]:
    """Inception v3 of 2015 behind both ways of enlarging pictures, "Inception, clean" and
    "Inception, legacy" (see :func:`persona_jax.metrics.features.inception_pass`).

    Args:
      file: its weights, pytorch-fid's or torch-fidelity's; found or fetched if empty.
      sha256: of weights to accept beside those.
      folder: where they are looked for, and fetched to.

    Raises:
      UserError: not to be had, or not those weights.
    """
    asset, key, place = "inception_2015", "inception_sha256", buckets.local(file)
    if file:
        outside.verify(asset, place, sha256, key)
    else:
        remedy = "or name it as inception"
        place, _ = outside.find(asset, folder, sha256, key=key, remedy=remedy)
    params = network_weights.load_inception(place)
    mesh = make_mesh(data=-1, fsdp=1)

    def network(resize: str) -> Network:
        run = inception_pass(params, mesh, resize)
        return lambda pictures: NetworkOutput(*run(images.to_uint8(pictures)))

    return {f"Inception, {resize}": network(resize) for resize in ("clean", "legacy")}
