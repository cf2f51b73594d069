"""Builds the evaluator for a config's dataset and base model."""

import argparse
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from PIL import Image

from persona_jax.data import images
from persona_jax.data.photo_datasets import Photos
from persona_jax.errors import UserError
from persona_jax.evaluation import evaluators, faces, networks, trait_classifier, trait_scores
from persona_jax.interop import folders
from persona_jax.pipelines.image_encoders import ImageEncoder, open_image_encoder
from persona_jax.pipelines.pipeline import embed_captions, open_pipeline
from persona_jax.runtime import buckets

BATCH = 32
MANY = 256
"""Number of photos whose mean face embedding is subtracted."""


def build_evaluator(
    config: ConfigDict, photos: Photos, people: int, arguments: argparse.Namespace
) -> evaluators.Evaluator:
    """Builds a trait evaluator if the dataset has ground truth, else a face evaluator.

    Args:
      config: with the dataset and the base.
      photos: of the dataset.
      people: number of people to evaluate; retrieval picks among these if they are fewer than
        :data:`persona_jax.evaluation.trait_scores.AMONG`.
      arguments: with the flags of :func:`persona_jax.evaluation.networks.add_flags`.

    Raises:
      UserError: the base has no trait classifier or no CLIP pair, or weights are missing; it says
        what to do.
    """
    inception, folder = {}, buckets.local(config.data.data_dir) / "weights"
    if arguments.inception is not None:
        inception = networks.inception_networks(
            arguments.inception, arguments.inception_sha256, folder
        )
    if photos.has("identity"):
        classifier = trait_classifier.load_trait_classifier(
            folders.find(config.pipeline).parent / "reader"
        )
        all_networks = {"the reader": networks.from_trait_classifier(classifier)} | inception
        among = min(people, trait_scores.AMONG)
        ground_truth = photos.truth("identity"), photos.truth("scene")
        return evaluators.TraitEvaluator(classifier, *ground_truth, all_networks, among)
    return _face_evaluator(config, photos, inception)


def _face_evaluator(
    config: ConfigDict, photos: Photos, more: dict[str, networks.Network]
) -> faces.FaceEvaluator:
    pipeline = open_pipeline(config)
    encoder_config = config.image_encoder
    if encoder_config.kind == "dlib":
        raise UserError(
            "image_encoder.kind=dlib: the evaluator uses dlib's network, and a network used for "
            "conditioning cannot also be the evaluator; train with another image encoder"
        )
    settings = ConfigDict({"image_encoder": encoder_config.to_dict(), "data": {"crop": 1.0}})
    # Images show the central crop of photos, so the face fills a larger part of them.
    centre = [0.5 + (place - 0.5) / config.data.crop for place in encoder_config.face_centre]
    settings.image_encoder.update(
        {
            "kind": "dlib",
            "path": "",
            "sha256": "",
            "face_side": encoder_config.face_side / config.data.crop,
        }
    )
    settings.image_encoder.face_centre = tuple(centre)
    raw = _embedding(open_image_encoder(settings, pipeline))
    rows = np.linspace(0, len(photos) - 1, MANY).astype(np.int64)
    pictures_of_many = evaluators.photos_as_pictures(
        photos, rows, pipeline.image_size, config.data.crop
    )
    mean = raw(pictures_of_many).mean(axis=0)
    settings.image_encoder.kind = "clip"
    folder = folders.find(config.pipeline)

    def face(pictures: Float[np.ndarray, "P S S 3"]) -> Float[np.ndarray, "P D"]:
        return _unit(raw(pictures) - mean)

    return faces.FaceEvaluator(
        photos,
        config.data.crop,
        face=face,
        words=_embedding(open_image_encoder(settings, pipeline)),
        texts=lambda captions: _unit(embed_captions(folder, captions)),
        find=_detector(),
        networks={"dlib": networks.from_face_encoder(face)} | more,
    )


def _embedding(encoder: ImageEncoder) -> faces.Embed:
    def embed(pictures: Float[np.ndarray, "P S S 3"]) -> Float[np.ndarray, "P D"]:
        pil_images = [Image.fromarray(p) for p in images.to_uint8(pictures)]
        parts = [
            encoder.encode(pil_images[i : i + BATCH]) for i in range(0, len(pil_images), BATCH)
        ]
        return _unit(np.concatenate(parts))

    return embed


def _unit(x: Float[np.ndarray, "P D"]) -> Float[np.ndarray, "P D"]:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _detector() -> Callable[[Image.Image], bool]:
    try:
        import dlib
    except ImportError as error:
        raise UserError(
            "images of real people are evaluated with dlib, which is not installed; pip install "
            "-e '.[faces]'"
        ) from error
    detect = dlib.get_frontal_face_detector()

    def find(picture: Image.Image) -> bool:
        size = (faces.DETECTED_AT, faces.DETECTED_AT)
        large = picture.resize(size, Image.Resampling.BICUBIC)
        return len(detect(np.asarray(large))) > 0

    return find
