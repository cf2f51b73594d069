"""Judging pictures of real people, of whom nobody knows the truth in numbers."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from PIL import Image

from persona_jax.data import images
from persona_jax.data.photos import Photos
from persona_jax.errors import UserError
from persona_jax.eyes import Eye, open_eye
from persona_jax.interop import folders
from persona_jax.metrics.judging import Subjects, Verdict, apart, photos_as_pictures
from persona_jax.pipeline import embed_captions, open_pipeline

DETECTED_AT = 256
"""Pixels that pictures are enlarged to for the detector, which misses faces below 80."""
BATCH = 32
MANY = 256
"""Photos whose mean is taken."""

Look = Callable[[Float[np.ndarray, "P S S 3"]], Float[np.ndarray, "P D"]]
"""Pictures in [−1, 1] → unit embeddings."""


@dataclasses.dataclass(frozen=True)
class FaceJudge:
    """dlib's face recognition network says how near a picture's face is to the person's photos,
    dlib's detector whether there is a face at all, and the base's own CLIP pair how near the
    picture is to its prompt (see :class:`persona_jax.metrics.judging.Judge`).

    Pictures without a face keep their cosine: faces have their place in them, and are cut out there
    whatever is on them.

    Attributes:
      real: the photos.
      crop: central part of them that pictures show.
      face: the scoring eye. All its embeddings have much in common, whatever is on a picture: the
        cosine is taken of what is left without the mean of many photos.
      words: the picture tower of the pair.
      texts: captions → unit embeddings in the space of `words`.
      find: whether a face is found on a picture.
      name: of what judges.
      plain: the first prompt.
      among: any number of people will do.
      known: embeddings of photos' faces, by row.
    """

    real: Photos
    crop: float
    face: Look
    words: Look
    texts: Callable[[Sequence[str]], Float[np.ndarray, "P D"]]
    find: Callable[[Image.Image], bool]
    name: str = "dlib's face network and detector, and the base's CLIP pair"
    plain: str = "a photo of a person"
    among: int = 1
    known: dict[int, Float[np.ndarray, " D"]] = dataclasses.field(default_factory=dict)

    def pictures(self, whom: Subjects, pictures: Float[np.ndarray, "Q S S 3"]) -> Verdict:
        """Faces of the plain pictures, texts of the others."""
        plain, asked, again = whom.split(pictures)
        found = self._verdict(whom, plain, asked, whom.prompts[len(plain) :])
        return dataclasses.replace(found, diversity=apart(plain, again, self._features))

    def _features(self, pictures: Float[np.ndarray, "P S S 3"]) -> Float[np.ndarray, "P D"]:
        """Of unit variance or so, as the kernel of KID expects."""
        face = self.face(pictures)
        return face * face.shape[1] ** 0.5

    def photos(
        self, whom: Subjects, rows: Int[np.ndarray, " P"], photos: Float[np.ndarray, "P S S 3"]
    ) -> Verdict:
        """Of photos that are among the references, these are left out of them."""
        return self._verdict(whom, photos, photos, [self.real.captions[row] for row in rows], rows)

    def loss(self, found: Verdict) -> float:
        """How far from the person, and from the prompt."""
        face, _, text = found.scores.values()
        return float(2 - face.mean() - text.mean())

    def _verdict(self, whom, plain, asked, captions, left_out=None) -> Verdict:
        size, face = plain.shape[1], self.face(plain)
        new = np.setdiff1d(whom.references, list(self.known))
        seen = self.face(photos_as_pictures(self.real, new, size, self.crop)) if len(new) else ()
        self.known.update(zip(new.tolist(), seen, strict=True))
        cosines = np.empty(len(plain))
        for i, rows in enumerate(whom.references.tolist()):
            others = [row for row in rows if left_out is None or row != left_out[i]]
            cosines[i] = np.mean([self.known[row] @ face[i] for row in others])
        found = [self.find(Image.fromarray(picture)) for picture in images.to_uint8(plain)]
        return Verdict(
            {
                "face cosine to the references ↑": cosines,
                "a face is found ↑": np.asarray(found, np.float64),
                "text cosine ↑": (self.words(asked) * self.texts(captions)).sum(axis=1),
            },
            self._features(asked),
            None,
        )


def open_face_judge(config: ConfigDict, photos: Photos) -> FaceJudge:
    """The judge of a config's people and base.

    Raises:
      UserError: dlib or its weights are missing, or the base has no CLIP pair; says what to
        install.
    """
    pipeline = open_pipeline(config)
    eye = config.image_encoder
    if eye.kind == "dlib":
        raise UserError(
            "image_encoder.kind=dlib: pictures are judged by dlib's network; what it conditions it "
            "cannot judge"
        )
    settings = ConfigDict({"image_encoder": eye.to_dict(), "data": {"crop": 1.0}})
    # Pictures are the central part of photos: the face fills more of them.
    centre = [0.5 + (place - 0.5) / config.data.crop for place in eye.face_centre]
    settings.image_encoder.update(
        {"kind": "dlib", "path": "", "sha256": "", "face_side": eye.face_side / config.data.crop}
    )
    settings.image_encoder.face_centre = tuple(centre)
    face = _look(open_eye(settings, pipeline))
    many = np.linspace(0, len(photos) - 1, MANY).astype(np.int64)
    mean = face(photos_as_pictures(photos, many, pipeline.image_size, config.data.crop)).mean(0)
    settings.image_encoder.kind = "clip"
    folder = folders.find(config.pipeline)

    def texts(captions: Sequence[str]) -> np.ndarray:
        return _unit(embed_captions(folder, captions))

    return FaceJudge(
        photos,
        config.data.crop,
        face=lambda pictures: _unit(face(pictures) - mean),
        words=_look(open_eye(settings, pipeline)),
        texts=texts,
        find=_detector(),
    )


def _look(eye: Eye) -> Look:
    def look(pictures: Float[np.ndarray, "P S S 3"]) -> Float[np.ndarray, "P D"]:
        shown = [Image.fromarray(picture) for picture in images.to_uint8(pictures)]
        parts = [eye.look(shown[i : i + BATCH]) for i in range(0, len(shown), BATCH)]
        return _unit(np.concatenate(parts))

    return look


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
        large = picture.resize((DETECTED_AT, DETECTED_AT), Image.Resampling.BICUBIC)
        return len(detect(np.asarray(large))) > 0

    return find
