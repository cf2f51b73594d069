"""Networks whose features and classes FID, KID and IS are computed from.

A network is a function from images in [−1, 1] to a :class:`NetworkOutput`. Reports name the network
beside each metric.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from persona_jax.data import assets, images
from persona_jax.evaluation.trait_classifier import TraitClassifier
from persona_jax.interop import network_weights
from persona_jax.metrics.features import inception_pass
from persona_jax.runtime import buckets
from persona_jax.runtime.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class NetworkOutput:
    """The output of a network for P images.

    Attributes:
      features: for FID and KID ``[P, F]``.
      classes: logits for the Inception Score ``[P, C]``; None if the network has no classes.
    """

    features: Float[np.ndarray, "P F"]
    classes: Float[np.ndarray, "P C"] | None


Network = Callable[[Float[np.ndarray, "P S S 3"]], NetworkOutput]


def from_trait_classifier(classifier: TraitClassifier) -> Network:
    """The trait classifier's penultimate layer, with expression × background as classes."""

    def run(pictures: np.ndarray) -> NetworkOutput:
        output = classifier.read(pictures)
        return NetworkOutput(output.features, output.logits)

    return run


def from_face_encoder(embed: Callable[[np.ndarray], np.ndarray]) -> Network:
    """A face encoder as a network without classes.

    Embeddings are scaled to about unit variance, as KID's kernel expects.

    Args:
      embed: images in [−1, 1] → unit embeddings ``[P, D]``.
    """

    def run(pictures: np.ndarray) -> NetworkOutput:
        faces = embed(pictures)
        return NetworkOutput(faces * faces.shape[1] ** 0.5, None)

    return run


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of :func:`inception_networks`; ``inception`` is None if it is not given."""
    parser.add_argument(
        "--inception",
        nargs="?",
        const="",
        help="FID, KID and IS by Inception v3 too: its weights, downloaded if not named",
    )
    parser.add_argument("--inception_sha256", help="of weights to accept beside the known ones")


def inception_networks(file: str, sha256: str | None, folder: Path) -> dict[str, Network]:
    """Inception v3 of 2015 with both ways of resizing, "Inception, clean" and "Inception, legacy".

    See :func:`persona_jax.metrics.features.inception_pass`.

    Args:
      file: weights of pytorch-fid or torch-fidelity; empty: found in `folder` or downloaded.
      sha256: of weights to accept beside the known ones.
      folder: where weights are looked for, and downloaded to.

    Raises:
      UserError: the weights cannot be found or downloaded, or are not the known ones.
    """
    asset, key, path = "inception_2015", "inception_sha256", buckets.local(file)
    if file:
        assets.verify(asset, path, sha256, key)
    else:
        remedy = "or name it as inception"
        path, _ = assets.find(asset, folder, sha256, key=key, remedy=remedy)
    params = network_weights.load_inception(path)
    mesh = make_mesh(data=-1, fsdp=1)

    def network(resize: str) -> Network:
        run = inception_pass(params, mesh, resize)
        return lambda pictures: NetworkOutput(*run(images.to_uint8(pictures)))

    return {f"Inception, {resize}": network(resize) for resize in ("clean", "legacy")}
