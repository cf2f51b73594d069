"""Judging pictures of drawn people: whom they show, what they show, and how real they are.

Every method paints the same people with the same prompts and noise. Each person is painted twice:
plainly, so that every trait can be read, and as on the photo of them that is held out.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from persona_jax.data import images
from persona_jax.data.photos import Photos
from persona_jax.data.portraits import traits
from persona_jax.data.splits import photos_of
from persona_jax.errors import UserError
from persona_jax.metrics import fidelity, reading


@dataclasses.dataclass(frozen=True)
class Subjects:
    """P people to paint.

    Attributes:
      names: theirs.
      references: rows of the photos a method may see ``[P, n]``.
      held_out: row of the photo none may see ``[P]``.
      prompts: 2 P of them: P plain ones, then the held-out photos' captions.
      identity: the truth about the people ``[P, 27]``.
      scene: the truth about the held-out photos ``[P, 31]``.
    """

    names: list[str]
    references: Int[np.ndarray, "P n"]
    held_out: Int[np.ndarray, " P"]
    prompts: list[str]
    identity: Float[np.ndarray, "P K"]
    scene: Float[np.ndarray, "P J"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the reader says of one picture set; the first three by person.

    Attributes:
      error: root mean square error of the traits, on the plain pictures ``[P]`` (0.289 is guessing
        the middle).
      named: 1 where a plain picture's person is picked from 32, else 0 ``[P]``.
      prompt: share of what the other prompt asks for that is there ``[P]``: expression, background,
        glasses, and whether each region is hidden.
      features: the reader's, of the pictures as on the held-out photos ``[P, F]``.
    """

    error: Float[np.ndarray, " P"]
    named: Float[np.ndarray, " P"]
    prompt: Float[np.ndarray, " P"]
    features: Float[np.ndarray, "P F"]


def subjects(photos: Photos, group: Sequence[str], count: int, config: ConfigDict) -> Subjects:
    """The first `count` people of a group, shown as many photos as ``config.references.n`` − 1.

    Raises:
      UserError: people whose truth nobody knows, too few of them, or too few photos of one.
    """
    if not photos.has("identity"):
        raise UserError(
            f"nobody knows the true traits of {config.data.dataset} people; only portraits can be "
            "read back"
        )
    if count > len(group) or count % fidelity.AMONG:
        raise UserError(
            f"{count} people: a multiple of {fidelity.AMONG}, at most {len(group)}, is needed"
        )
    names, n = list(group[:count]), config.references.n
    sets = photos_of(photos.people, names)
    if poor := [name for name, rows in zip(names, sets, strict=True) if len(rows) < n]:
        raise UserError(f"{poor[0]} has too few photos: {n} are needed (config.references.n)")
    rows = np.stack([found[:n] for found in sets])
    held_out = rows[:, -1]
    return Subjects(
        names=names,
        references=rows[:, :-1],
        held_out=held_out,
        prompts=[fidelity.PLAIN] * count + [photos.captions[row] for row in held_out],
        identity=photos.truth("identity")[held_out],
        scene=photos.truth("scene")[held_out],
    )


def judge(
    reader: reading.Reader, whom: Subjects, pictures: Float[np.ndarray, "Q S S 3"]
) -> Verdict:
    """The verdict on pictures of ``whom.prompts``, in [−1, 1]."""
    plain, asked = np.split(pictures, 2)
    read = reader.read(plain).identity
    return Verdict(
        error=np.sqrt(((read - whom.identity) ** 2).mean(axis=1)),
        named=fidelity.named(reader, read, whom.identity),
        **_asked(reader, whom, asked),
    )


def judge_photos(
    reader: reading.Reader, whom: Subjects, photos: Float[np.ndarray, "P S S 3"]
) -> Verdict:
    """The verdict on pictures of the held-out scenes alone: of traits, those that show count."""
    seen = 1 - traits.hidden_traits(whom.scene)
    read = reader.read(photos).identity
    squared = (read - whom.identity) ** 2 * seen
    return Verdict(
        error=np.sqrt(squared.sum(axis=1) / np.maximum(seen.sum(axis=1), 1)),
        named=fidelity.named(reader, read, whom.identity),
        **_asked(reader, whom, photos),
    )


def _asked(reader: reading.Reader, whom: Subjects, pictures: np.ndarray) -> dict[str, np.ndarray]:
    found = reader.read(pictures)
    questions = ("expression", "background", "glasses")
    right = [found.choices[name] == reading.truth(whom.scene, name) for name in questions]
    hides = (found.hides > 0.5) == (traits.hidden(whom.scene) > 0.5)
    return {
        "prompt": np.concatenate([np.stack(right, axis=1), hides], axis=1).mean(axis=1),
        "features": found.features,
    }


def photos_as_pictures(
    photos: Photos, rows: Int[np.ndarray, " P"], size: int
) -> Float[np.ndarray, "P S S 3"]:
    """Photos in [−1, 1]."""
    return np.stack([images.to_model(photos.image(int(row)), size) for row in rows])
