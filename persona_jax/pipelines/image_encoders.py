"""Γ_image: the frozen image encoder, from a photo to an embedding.

``clip`` is the pipeline's own image encoder; ``dlib`` and ``facenet`` are face recognition
networks, trained on face crops alone.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict
from PIL import Image

from persona_jax.data import assets, images
from persona_jax.errors import UserError
from persona_jax.interop import face_weights, network_weights
from persona_jax.models import aggregators, face_resnet, facenet
from persona_jax.models.clip import VisionOutput
from persona_jax.models.layers import normalise
from persona_jax.pipelines.pipeline import Pipeline
from persona_jax.runtime import buckets

KINDS = ("clip", "dlib", "facenet")


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """An image encoder with its preprocessing.

    Attributes:
      dim: D of its embeddings.
      preprocess: a photo → pixels, on the host.
      embed: (params, pixels [B, S, S, 3]) → embeddings [B, D], or patches [B, L, D].
      params: frozen parameters.
      hash: identifies weights and preprocessing in caches and checkpoints.
      blank: patches ``[L, D]`` of an all-zero input, for an encoder that returns patches: its
        unconditional embedding. Else None.
    """

    dim: int
    preprocess: Callable[[Image.Image], np.ndarray]
    embed: Callable[[Mapping, Array], Array]
    params: Mapping
    hash: str
    blank: Float[Array, "L D"] | None = None

    def encode(self, photos: Iterable[Image.Image]) -> Float[np.ndarray, "P ..."]:
        """Encodes photos in one batch, so their number must be small.

        Args:
          photos: may be a generator; only the preprocessed pixels are kept in memory.

        Returns:
          Embeddings, float32 ``[P, D]``, or patches ``[P, L, D]``.
        """
        pixels = np.stack([self.preprocess(photo) for photo in photos])
        return np.asarray(jax.jit(self.embed)(self.params, pixels), np.float32)


def open_image_encoder(config: ConfigDict, pipeline: Pipeline) -> ImageEncoder:
    """Opens the image encoder of a config's ``image_encoder`` section.

    For an IP-Adapter-Plus (``aggregator.kind=plus``) it returns each photo's patches, the hidden
    states of the tower's penultimate layer.

    Raises:
      UserError: the kind is unknown, or weights are missing or do not fit.
    """
    kind, crop = config.image_encoder.kind, config.data.crop
    reader = config.get("aggregator", {}).get("kind")
    patches = reader in aggregators.KINDS and aggregators.KINDS[reader].patches
    if kind == "clip":
        return _clip_encoder(pipeline, crop, patches)
    if patches:
        raise UserError(f"aggregator.kind={reader}: it reads CLIP's patches, and {kind} gives none")
    if kind == "dlib":
        return _dlib_encoder(config.image_encoder)
    if kind == "facenet":
        return _facenet_encoder(
            config.image_encoder, buckets.local(config.data.data_dir) / "weights"
        )
    raise UserError(f"image_encoder.kind={kind!r}; known: {', '.join(KINDS)}")


def _clip_encoder(pipeline: Pipeline, crop: float, patches: bool) -> ImageEncoder:
    tower = pipeline.image_encoder
    if tower is None:
        raise UserError(
            "the pipeline has no image_encoder; name an image_encoder "
            "(config.image_encoder.path=FOLDER_OR_HUB_ID)",
            argument="image_encoder",
        )
    side = tower.module.config.image_size
    # Without a preprocessor_config.json: transformers' defaults for CLIP, at the tower's size.
    settings = pipeline.feature_extractor or {"size": side, "crop_size": side}

    def preprocess(photo: Image.Image) -> np.ndarray:
        return _prepared(images.centre_crop(photo, crop), settings, side)

    def embed(params: Mapping, pixels: Array) -> Array:
        # apply returns a tuple where collections are mutable
        outputs = cast(VisionOutput, tower.module.apply({"params": params}, pixels))
        return (outputs.penultimate if patches else outputs.embedding).astype(jnp.float32)

    sizes, digest = tower.module.config, f"{tower.hash} crop {crop}"
    preprocess(Image.new("RGB", (side, side)))  # raises now if the settings do not fit
    if not patches:
        return ImageEncoder(sizes.projection_dim, preprocess, embed, tower.params, digest)
    nothing = jnp.zeros((1, sizes.image_size, sizes.image_size, 3))
    blank = jax.jit(embed)(tower.params, nothing)[0]
    digest += " patches"
    return ImageEncoder(sizes.hidden_size, preprocess, embed, tower.params, digest, blank)


def _prepared(photo: Image.Image, settings: Mapping, side: int) -> Float[np.ndarray, "S S 3"]:
    """Preprocesses a photo for CLIP.

    Raises:
      UserError: `settings` cannot be applied, or give another size than the encoder's `side`, whose
        position embeddings would be out of range and NaN.
    """
    file = "feature_extractor/preprocessor_config.json"
    try:
        pixels = images.clip_preprocess(photo, settings)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot prepare photos by it ({error!r:.200})") from error
    if pixels.shape != (side, side, 3) or not np.isfinite(pixels).all():
        raise UserError(
            f"{file}: makes pixels of {pixels.shape} of a photo, but the image encoder "
            f"expects {side}×{side}, all finite; set size and crop_size to {side}, or use the "
            "feature extractor that belongs to it"
        )
    return pixels


def _dlib_encoder(config: ConfigDict) -> ImageEncoder:
    centre, side = config.face_centre, config.face_side
    path = config.path or face_weights.installed_face_weights()
    if path is None:
        raise UserError(
            "image_encoder.kind=dlib: its weights are not installed; pip install "
            "face_recognition_models, or name the .dat file or face-api.js' "
            "face_recognition_model folder with config.image_encoder.path=PATH"
        )

    digest = face_weights.face_weights_hash(path)
    accepted = assets.manifest()["dlib_face_recognition"]["accepted"]
    if f"sha256:{digest}" not in accepted and digest != config.sha256:
        raise UserError(
            f"{path}: sha256 {digest} is none of the known weights; get them again, or if "
            f"you trust them, add config.image_encoder.sha256={digest}"
        )
    return ImageEncoder(
        dim=face_resnet.DIM,
        preprocess=lambda photo: face_weights.face_crop(photo, centre, side),
        embed=_embed_by(face_resnet.FaceResNet(), face_resnet.DIM),
        params=jax.tree.map(jnp.asarray, face_weights.load_face_weights(path)),
        hash=f"{digest} {centre} {side}",
    )


def _facenet_encoder(config: ConfigDict, folder: Path) -> ImageEncoder:
    asset, key = "facenet_vggface2", "config.image_encoder.sha256"
    if config.path:
        file = buckets.local(config.path)
        digest = assets.verify(asset, file, config.sha256, key)
    else:
        remedy = "or name it with config.image_encoder.path=FILE"
        file, digest = assets.find(asset, folder, config.sha256, key=key, remedy=remedy)
    centre, side, size = config.face_centre, config.face_side, facenet.SIDE

    def preprocess(photo: Image.Image) -> np.ndarray:
        return (face_weights.face_crop(photo, centre, side, size) - 127.5) / 128.0

    return ImageEncoder(
        dim=facenet.DIM,
        preprocess=preprocess,
        embed=_embed_by(facenet.FaceNet(), facenet.DIM),
        params=network_weights.load_facenet(file),
        hash=f"{digest} {centre} {side}",
    )


def _embed_by(network: nn.Module, dim: int) -> Callable[[Mapping, Array], Array]:
    """Embeddings of mean square 1, the scale of other encoders: only their direction is trained."""

    def embed(params: Mapping, pixels: Array) -> Array:
        # Eight at a time: with more, the features of early layers do not fit in a CPU's cache.
        whole = jax.lax.map(
            lambda one: network.apply({"params": params}, one[None])[0], pixels, batch_size=8
        )
        return normalise(whole) * dim**0.5

    return embed
