"""Judging pictures of people: whom they show, what they show, and how real they are.

Every method paints the same people with the same prompts and noise. Each person is painted twice:
plainly, and as on the photo of them that is held out. The first few are painted plainly once more,
from other noise, to see how much that changes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from persona_jax.data import images
from persona_jax.data.photo_datasets import Photos
from persona_jax.data.portraits import traits
from persona_jax.data.splits import photos_of
from persona_jax.errors import UserError
from persona_jax.evaluation import trait_classifier, trait_scores
from persona_jax.evaluation.networks import Network, NetworkOutput

AGAIN = 32
"""How many people are painted plainly once more."""
MOST = 128
"""People, where nobody says how many."""


@dataclasses.dataclass(frozen=True)
class Subjects:
    """P people to paint.

    Attributes:
      names: theirs.
      references: rows of the photos a method may see ``[P, n]``.
      held_out: row of the photo none may see ``[P]``.
      prompts: 2 P of them: P plain ones, then the held-out photos' captions.
      again: how many of the first people are painted plainly once more.
    """

    names: list[str]
    references: Int[np.ndarray, "P n"]
    held_out: Int[np.ndarray, " P"]
    prompts: list[str]
    again: int = 0

    def some(self, count: int) -> "Subjects":
        """The first few, each painted twice."""
        total = len(self.names)
        return Subjects(
            self.names[:count],
            self.references[:count],
            self.held_out[:count],
            self.prompts[:count] + self.prompts[total : total + count],
        )

    @property
    def pictures(self) -> list[tuple[int, str]]:
        """Who is on each picture, by number, and its prompt."""
        count = len(self.names)
        who = [*range(count), *range(count), *range(self.again)]
        return list(zip(who, self.prompts + self.prompts[: self.again], strict=True))

    def split(self, pictures: Float[np.ndarray, "Q S S 3"]) -> list[Float[np.ndarray, "_ S S 3"]]:
        """Those painted plainly, as on the held-out photos, and plainly again."""
        count = len(self.names)
        return np.split(pictures, [count, 2 * count])


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What a judge says of one picture set.

    Attributes:
      scores: by the column's title, for each person ``[P]``; the first one leads. An arrow says
        which way is better.
      outputs: what each of the judge's networks makes of the pictures as on the held-out photos.
      diversity: mean distance between the features of two plain pictures of a person, by the first
        network; None where there is one of each.
    """

    scores: dict[str, Float[np.ndarray, " P"]]
    outputs: dict[str, NetworkOutput]
    diversity: float | None = None


def feature_distance(
    network: Network, pictures: Float[np.ndarray, "P S S 3"], again: Float[np.ndarray, "A S S 3"]
) -> float | None:
    """Mean distance between the features of the first A pictures and of others of the same."""
    if not len(again):
        return None
    one, other = network(pictures[: len(again)]).features, network(again).features
    return float(np.linalg.norm(one - other, axis=1).mean())


@runtime_checkable
class Evaluator(Protocol):
    """Who gives verdicts."""

    @property
    def name(self) -> str:
        """What it looks with, for captions of tables."""

    @property
    def plain(self) -> str:
        """The first prompt."""

    @property
    def among(self) -> int:
        """Numbers of people must be a multiple of it."""

    @property
    def networks(self) -> Mapping[str, Network]:
        """The networks that FID, KID, IS and diversity go by, its own first."""

    @property
    def likeness(self) -> str:
        """Title of the score that tells whether it is the person, 1 at best."""

    def pictures(
        self, subjects: Subjects, pictures: Float[np.ndarray, "Q S S 3"]
    ) -> EvaluationResult:
        """The verdict on what ``subjects.pictures`` asks for, in [−1, 1]."""

    def photos(
        self, subjects: Subjects, rows: Int[np.ndarray, " P"], photos: Float[np.ndarray, "P S S 3"]
    ) -> EvaluationResult:
        """The verdict on a photo of each person.

        rows: which photos they are, or are pictures of.
        """

    def loss(self, found: EvaluationResult) -> float:
        """What choices minimise."""

    def details(
        self, subjects: Subjects, pictures: Float[np.ndarray, "Q S S 3"], shown: int
    ) -> dict:
        """What else there is to say of pictures painted from the first `shown` references."""


@dataclasses.dataclass(frozen=True)
class TraitEvaluator:
    """Reads drawn people's traits and scenes, whose truth is known (see :class:`Evaluator`).

    Attributes:
      classifier: what reads them.
      identity, scene: the truth about all photos, by row ``[N, 27]`` and ``[N, 31]``.
      networks: its own and more.
      among: people are named in groups of so many.
      name: of what judges.
      plain: the first prompt.
    """

    classifier: trait_classifier.TraitClassifier
    identity: Float[np.ndarray, "N K"]
    scene: Float[np.ndarray, "N J"]
    networks: Mapping[str, Network]
    among: int = trait_scores.AMONG
    name: str = "the reader of the base"
    plain: str = trait_scores.PLAIN

    @property
    def likeness(self) -> str:
        """Naming the right one."""
        return f"named, of {self.among} ↑"

    def pictures(
        self, subjects: Subjects, pictures: Float[np.ndarray, "Q S S 3"]
    ) -> EvaluationResult:
        """Traits of the plain pictures, where all of them show; the prompt's share of the rest."""
        plain, asked, again = subjects.split(pictures)
        seen = np.ones((len(plain), len(traits.IDENTITY)))
        found = self._evaluate(plain, seen, asked, subjects.held_out)
        own = next(iter(self.networks.values()))
        return dataclasses.replace(found, diversity=feature_distance(own, plain, again))

    def photos(
        self, subjects: Subjects, rows: Int[np.ndarray, " P"], photos: Float[np.ndarray, "P S S 3"]
    ) -> EvaluationResult:
        """Of traits, those that show count."""
        seen = 1 - traits.hidden_traits(self.scene[rows])
        return self._evaluate(photos, seen, photos, rows)

    def loss(self, found: EvaluationResult) -> float:
        """The error of the person, guessing being 1, and of the prompt."""
        error, _, prompt, *_ = found.scores.values()  # others may follow
        return float(error.mean() / 12**-0.5 + 1 - prompt.mean())

    def details(
        self, subjects: Subjects, pictures: Float[np.ndarray, "Q S S 3"], shown: int
    ) -> dict:
        """Errors of the plain pictures by trait, and by how many references hide the trait."""
        plain, _, _ = subjects.split(pictures)
        read, truth = self.classifier.read(plain).identity, self.identity[subjects.held_out]
        hidden = traits.hidden_traits(self.scene)[subjects.references[:, :shown]].sum(axis=1)
        return {
            "by_trait": trait_scores.error_by_trait(read, truth),
            "by_hiding": trait_scores.error_by_hiding(read, truth, hidden),
        }

    def _evaluate(self, plain, seen, asked, rows) -> EvaluationResult:
        read = self.classifier.read(plain).identity
        identity = self.identity[rows]
        squared = ((read - identity) ** 2 * seen).sum(axis=1)
        return EvaluationResult(
            {
                "error of the traits ↓": np.sqrt(squared / np.maximum(seen.sum(axis=1), 1)),
                self.likeness: trait_scores.named(self.classifier, read, identity, self.among),
                "prompt ↑": trait_scores.scene_fidelity(
                    self.classifier.read(asked), self.scene[rows]
                ),
            },
            {name: network(asked) for name, network in self.networks.items()},
        )


def how_many(wanted: int | None, group: Sequence[str]) -> int:
    """As many people of a group as are wanted; without a wish all of them, :data:`MOST` at most, in
    whole groups of those that readers pick from."""
    if wanted is not None:
        return wanted
    count = min(MOST, len(group))
    return count - count % trait_scores.AMONG if count > trait_scores.AMONG else count


def choose_subjects(
    evaluator: Evaluator,
    photos: Photos,
    group: Sequence[str],
    count: int,
    config: ConfigDict,
    again: int = 0,
) -> Subjects:
    """The first `count` people of a group, shown as many photos as ``config.references.n`` − 1.

    Raises:
      UserError: too few of them, or too few photos of one.
    """
    if not 1 < count <= len(group) or count % evaluator.among:
        raise UserError(
            f"{count} people: a multiple of {evaluator.among}, 2 to {len(group)}, is needed"
        )
    names, n = list(group[:count]), config.references.n
    sets = photos_of(photos.people, names)
    if poor := [name for name, rows in zip(names, sets, strict=True) if len(rows) < n]:
        raise UserError(f"{poor[0]} has too few photos: {n} are needed (config.references.n)")
    rows = np.stack([found[:n] for found in sets])
    return Subjects(
        names=names,
        references=rows[:, :-1],
        held_out=rows[:, -1],
        prompts=[evaluator.plain] * count + [photos.captions[row] for row in rows[:, -1]],
        again=min(again, count),
    )


def photos_as_pictures(
    photos: Photos, rows: Int[np.ndarray, " P"], size: int, crop: float = 1.0
) -> Float[np.ndarray, "P S S 3"]:
    """Central parts of photos, in [−1, 1]."""
    squares = (images.centre_crop(photos.image(int(row)), crop) for row in rows)
    return np.stack([images.to_model(square, size) for square in squares])


def real_photos(
    evaluator: Evaluator, photos: Photos, subjects: Subjects, size: int, crop: float
) -> tuple[EvaluationResult, dict[str, Float[np.ndarray, "P F"]]]:
    """The verdict on each person's first photo, and every network's features of the held-out ones,
    which all pictures are held against."""
    first, held_out = (
        photos_as_pictures(photos, rows, size, crop)
        for rows in (subjects.references[:, 0], subjects.held_out)
    )
    against = {name: network(held_out).features for name, network in evaluator.networks.items()}
    return evaluator.photos(subjects, subjects.references[:, 0], first), against
