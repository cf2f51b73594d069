"""Opens who judges pictures of a config's people, painted on its base."""

import argparse
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from PIL import Image

from persona_jax.data import images
from persona_jax.data.photos import Photos
from persona_jax.errors import UserError
from persona_jax.evaluation import evaluators, faces, fidelity, networks, trait_classifier
from persona_jax.interop import folders
from persona_jax.pipelines.image_encoders import ImageEncoder, open_image_encoder
from persona_jax.pipelines.pipeline import embed_captions, open_pipeline
from persona_jax.runtime import buckets

BATCH = 32
MANY = 256
"""Photos whose mean is taken."""


def build_evaluator(
    config: ConfigDict, photos: Photos, people: int, arguments: argparse.Namespace
) -> evaluators.Evaluator:
    """By the truth where it is known, by faces elsewhere.

    Args:
      config: of people and base.
      photos: the people's.
      people: how many are to be judged; of fewer than readers pick from, they pick from these.
      arguments: :func:`persona_jax.evaluation.networks.add_flags`'.

    Raises:
      UserError: the base has no reader or no CLIP pair, or weights are missing; says what to do.
    """
    more, folder = {}, buckets.local(config.data.data_dir) / "weights"
    if arguments.inception is not None:
        more = networks.inception_networks(arguments.inception, arguments.inception_sha256, folder)
    if photos.has("identity"):
        classifier = trait_classifier.load_trait_classifier(
            folders.find(config.pipeline).parent / "reader"
        )
        seen_by = {"the reader": networks.from_trait_classifier(classifier)} | more
        among = min(people, fidelity.AMONG)
        truth = photos.truth("identity"), photos.truth("scene")
        return evaluators.TraitEvaluator(classifier, *truth, seen_by, among)
    return _face_evaluator(config, photos, more)


def _face_evaluator(
    config: ConfigDict, photos: Photos, more: dict[str, networks.Network]
) -> faces.FaceEvaluator:
    pipeline = open_pipeline(config)
    own = config.image_encoder
    if own.kind == "dlib":
        raise UserError(
            "image_encoder.kind=dlib: pictures are judged by dlib's network; what it conditions it "
            "cannot judge"
        )
    settings = ConfigDict({"image_encoder": own.to_dict(), "data": {"crop": 1.0}})
    # Pictures are the central part of photos: the face fills more of them.
    centre = [0.5 + (place - 0.5) / config.data.crop for place in own.face_centre]
    settings.image_encoder.update(
        {"kind": "dlib", "path": "", "sha256": "", "face_side": own.face_side / config.data.crop}
    )
    settings.image_encoder.face_centre = tuple(centre)
    raw = _embedding(open_image_encoder(settings, pipeline))
    many = np.linspace(0, len(photos) - 1, MANY).astype(np.int64)
    shown = evaluators.photos_as_pictures(photos, many, pipeline.image_size, config.data.crop)
    mean = raw(shown).mean(axis=0)
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
        shown = [Image.fromarray(p) for p in images.to_uint8(pictures)]
        parts = [encoder.encode(shown[i : i + BATCH]) for i in range(0, len(shown), BATCH)]
        return _unit(np.concatenate(parts))

    return embed


def _unit(x: Float[np.ndarray, "P D"]) -> Float[np.ndarray, "P D"]:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _detector() -> Callable[[Image.Image], bool]:
    try:
        import dlib
    except ImportError as error:
        raise UserError(
            "pictures of real people are judged with dlib, which is not installed; pip install "
            "-e '.[faces]'"
        ) from error
    detect = dlib.get_frontal_face_detector()

    def find(picture: Image.Image) -> bool:
        size = (faces.DETECTED_AT, faces.DETECTED_AT)
        large = picture.resize(size, Image.Resampling.BICUBIC)
        return len(detect(np.asarray(large))) > 0

    return find
