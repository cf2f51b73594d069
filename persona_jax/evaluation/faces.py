"""Judging pictures of real people, of whom nobody knows the truth in numbers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from persona_jax.data import images
from persona_jax.data.photos import Photos
from persona_jax.evaluation.evaluators import (
    EvaluationResult,
    Subjects,
    feature_distance,
    photos_as_pictures,
)
from persona_jax.evaluation.networks import Network

DETECTED_AT = 256
"""Pixels that pictures are enlarged to for the detector, which misses faces below 80."""

Embed = Callable[[Float[np.ndarray, "P S S 3"]], Float[np.ndarray, "P D"]]
"""Pictures in [−1, 1] → unit embeddings."""


@dataclasses.dataclass(frozen=True)
class FaceEvaluator:
    """dlib's face recognition network says how near a picture's face is to the person's photos,
    dlib's detector whether there is a face at all, and the base's own CLIP pair how near the
    picture is to its prompt (see :class:`persona_jax.evaluation.evaluators.Evaluator`).

    Pictures without a face keep their cosine: faces have their place in them, and are cut out there
    whatever is on them.

    Attributes:
      real: the photos.
      crop: central part of them that pictures show.
      face: the scoring encoder. All its embeddings have much in common, whatever is on a picture:
        the cosine is taken of what is left without the mean of many photos.
      words: the picture tower of the pair.
      texts: captions → unit embeddings in the space of `words`.
      find: whether a face is found on a picture.
      networks: its own and more.
      name: of what judges.
      plain: the first prompt.
      among: any number of people will do.
      likeness: title of the leading score.
      known: embeddings of photos' faces, by row.
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
        """Faces of the plain pictures, texts of the others."""
        plain, asked, again = subjects.split(pictures)
        found = self._evaluate(subjects, plain, asked, subjects.prompts[len(plain) :])
        own = next(iter(self.networks.values()))
        return dataclasses.replace(found, diversity=feature_distance(own, plain, again))

    def photos(
        self, subjects: Subjects, rows: Int[np.ndarray, " P"], photos: Float[np.ndarray, "P S S 3"]
    ) -> EvaluationResult:
        """Of photos that are among the references, these are left out of them."""
        return self._evaluate(
            subjects, photos, photos, [self.real.captions[row] for row in rows], rows
        )

    def loss(self, found: EvaluationResult) -> float:
        """How far from the person, and from the prompt."""
        face, _, text = found.scores.values()
        return float(2 - face.mean() - text.mean())

    def details(
        self, subjects: Subjects, pictures: Float[np.ndarray, "Q S S 3"], shown: int
    ) -> dict:
        """Nothing."""
        return {}

    def _evaluate(self, subjects, plain, asked, captions, left_out=None) -> EvaluationResult:
        size, face = plain.shape[1], self.face(plain)
        new = np.setdiff1d(subjects.references, list(self.known))
        seen = self.face(photos_as_pictures(self.real, new, size, self.crop)) if len(new) else ()
        self.known.update(zip(new.tolist(), seen, strict=True))
        cosines = np.empty(len(plain))
        for i, rows in enumerate(subjects.references.tolist()):
            others = [row for row in rows if left_out is None or row != left_out[i]]
            cosines[i] = np.mean([self.known[row] @ face[i] for row in others])
        found = [self.find(Image.fromarray(picture)) for picture in images.to_uint8(plain)]
        return EvaluationResult(
            {
                self.likeness: cosines,
                "a face is found ↑": np.asarray(found, np.float64),
                "text cosine ↑": (self.words(asked) * self.texts(captions)).sum(axis=1),
            },
            {name: network(asked) for name, network in self.networks.items()},
        )
