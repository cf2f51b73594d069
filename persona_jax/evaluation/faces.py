"""The evaluator for images of real people, whose traits are not known as numbers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from persona_jax.data import images
from persona_jax.data.photo_datasets import Photos
from persona_jax.evaluation.evaluators import (
    EvaluationResult,
    Subjects,
    feature_distance,
    photos_as_pictures,
)
from persona_jax.evaluation.networks import Network

DETECTED_AT = 256
"""Side in pixels to which images are enlarged for the detector, which misses faces below 80."""

Embed = Callable[[Float[np.ndarray, "P S S 3"]], Float[np.ndarray, "P D"]]
"""Images in [−1, 1] → unit embeddings."""


@dataclasses.dataclass(frozen=True)
class FaceEvaluator:
    """Evaluates images of real people (see :class:`persona_jax.evaluation.evaluators.Evaluator`).

    Identity is the cosine of dlib's face embeddings of an image and of the person's photos; dlib's
    detector says whether there is a face; the base's CLIP pair gives the similarity of image and
    prompt.

    Images without a detected face are scored too: faces are cropped at a fixed position, without
    the detector.

    Attributes:
      real: the photos.
      crop: central part of the photos that images show.
      face: the face encoder. Its embeddings of all images have a large common component, so the
        mean over many photos is subtracted before the cosine.
      words: the image encoder of the CLIP pair.
      texts: captions → unit embeddings in the space of `words`.
      find: whether a face is detected in an image.
      networks: for FID, KID and IS; the first one also measures diversity.
      name: of the evaluator.
      plain: the first prompt.
      among: 1, because any number of people can be evaluated.
      likeness: title of the leading score.
      known: cache of face embeddings of photos, by row.
    """

    real: Photos
    crop: float
    face: Embed
    words: Embed
    texts: Callable[[Sequence[str]], Float[np.ndarray, "P D"]]
    find: Callable[[Image.Image], bool]
    networks: Mapping[str, Network]
    name: str = "dlib's face network and detector, and the base's CLIP pair"
    plain: str = "a photo of a person"
    among: int = 1
    likeness: str = "face cosine to the references ↑"
    known: dict[int, Float[np.ndarray, " D"]] = dataclasses.field(default_factory=dict)

    def pictures(
        self, subjects: Subjects, pictures: Float[np.ndarray, "Q S S 3"]
    ) -> EvaluationResult:
        """Scores faces on images of the plain prompt, and text similarity on the others."""
        plain, asked, again = subjects.split(pictures)
        result = self._evaluate(subjects, plain, asked, subjects.prompts[len(plain) :])
        own = next(iter(self.networks.values()))
        return dataclasses.replace(result, diversity=feature_distance(own, plain, again))

    def photos(
        self, subjects: Subjects, rows: Int[np.ndarray, " P"], photos: Float[np.ndarray, "P S S 3"]
    ) -> EvaluationResult:
        """Scores real photos. A photo is left out of its person's references."""
        return self._evaluate(
            subjects, photos, photos, [self.real.captions[row] for row in rows], rows
        )

    def loss(self, found: EvaluationResult) -> float:
        """The sum of the cosine distances to the person and to the prompt, each 0 to 2."""
        face, _, text, *_ = found.scores.values()  # others may follow
        return float(2 - face.mean() - text.mean())

    def details(
        self, subjects: Subjects, pictures: Float[np.ndarray, "Q S S 3"], shown: int
    ) -> dict:
        """There are no details for real people."""
        return {}

    def _evaluate(self, subjects, plain, asked, captions, left_out=None) -> EvaluationResult:
        size, face = plain.shape[1], self.face(plain)
        new = np.setdiff1d(subjects.references, list(self.known))
        embeddings = (
            self.face(photos_as_pictures(self.real, new, size, self.crop)) if len(new) else ()
        )
        self.known.update(zip(new.tolist(), embeddings, strict=True))
        cosines = np.empty(len(plain))
        for i, rows in enumerate(subjects.references.tolist()):
            others = [row for row in rows if left_out is None or row != left_out[i]]
            cosines[i] = np.mean([self.known[row] @ face[i] for row in others])
        detected = [self.find(Image.fromarray(picture)) for picture in images.to_uint8(plain)]
        return EvaluationResult(
            {
                self.likeness: cosines,
                "a face is found ↑": np.asarray(detected, np.float64),
                "text cosine ↑": (self.words(asked) * self.texts(captions)).sum(axis=1),
            },
            {name: network(asked) for name, network in self.networks.items()},
        )
