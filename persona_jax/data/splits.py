"""Who is trained on and who is not: groups of people with nobody in two of them."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from persona_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class People:
    """Four sorted lists of people.

    Attributes:
      train: everyone with at least two photos who is in neither of the next two.
      validation: where every choice is made (scale, guidance, learning rate, steps).
      test: looked at once.
      base: everyone but validation and test, singles included; `train` is part of it.
    """

    train: list[str]
    validation: list[str]
    test: list[str]
    base: list[str]


def split_people(
    people: Iterable[str],
    *,
    test: int = 100,
    validation: int | None = None,
    least: int = 10,
    seed: int = 0,
) -> People:
    """Divides people among train, validation and test.

    Who goes where depends on names, `seed` and the numbers asked for, through SHA-256 of
    `seed/name`: the same on every machine and Python.

    Args:
      people: the person of each photo.
      test: how many test people; the first drawn.
      validation: how many validation people; None for all that remain with `least` photos.
      least: photos a validation or test person must have (nine references and a target).

    Raises:
      UserError: more validation and test people asked for than have `least` photos, or nobody
        left to train on.
    """
    counts = Counter(people)
    known = sorted(person for person, count in counts.items() if count >= least)
    drawn = sorted(known, key=lambda person: hashlib.sha256(f"{seed}/{person}".encode()).digest())
    if validation is None:
        validation = max(0, len(known) - test)
    if min(test, validation) < 0 or test + validation > len(known):
        raise UserError(
            f"split: {test} test and {validation} validation people asked for, but {len(known)} "
            f"people have at least {least} photos; ask for fewer (0 is allowed)"
        )
    held_out = set(drawn[: test + validation])
    base = sorted(set(counts) - held_out)
    train = [person for person in base if counts[person] >= 2]
    if not train:
        raise UserError(
            "split: nobody with two photos is left to train on; "
            f"ask for fewer than {test} test and {validation} validation people"
        )
    return People(train, sorted(drawn[test : test + validation]), sorted(drawn[:test]), base)


def grouped_people(people: Iterable[str]) -> People:
    """The groups that portraits are drawn in, from their names: ``GROUP-NUMBER``.

    `unseen` serves the base as `validation` does adapters; nobody but `base` trains the base.
    """
    groups: dict[str, list[str]] = {}
    for person in sorted(set(people)):
        groups.setdefault(person.split("-")[0], []).append(person)
    validation = [*groups.get("unseen", []), *groups.get("validation", [])]
    return People(
        train=groups.get("train", []),
        validation=validation,
        test=groups.get("test", []),
        base=groups.get("base", []),
    )


def photos_of(people: Sequence[str], chosen: Iterable[str]) -> list[Int[np.ndarray, " _"]]:
    """Rows of each chosen person's photos, one array a person, in the order of `chosen`.

    Args:
      people: the person of each row.
    """
    rows: dict[str, list[int]] = {person: [] for person in chosen}
    for row, person in enumerate(people):
        if person in rows:
            rows[person].append(row)
    return [np.asarray(found, np.int64) for found in rows.values()]
