"""Identity-disjoint splits: training, validation and test people."""

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
      train: people with at least two photos who are in neither of the next two lists.
      validation: people on whom every choice is made (scale, guidance, learning rate, steps).
      test: people for the final evaluation only.
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

    The order is that of SHA-256 of `seed/name`, so the split is the same on every machine and
    Python version.

    Args:
      people: the person of each photo.
      test: number of test people, drawn first.
      validation: number of validation people; None for all others with `least` photos.
      least: photos a validation or test person must have (nine references and a target).
      seed: of the order.

    Raises:
      UserError: fewer people have `least` photos than validation and test need, or nobody is left
        to train on.
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
    """Groups drawn people by their names, ``GROUP-NUMBER``.

    Only the group `base` trains the base. The group `unseen` validates the base and counts as
    validation, as the group `validation` does, which validates adapters.
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
    """Returns the rows of each chosen person's photos, one array per person.

    Args:
      people: the person of each row.
      chosen: people, in the order of the output.
    """
    rows: dict[str, list[int]] = {person: [] for person in chosen}
    for row, person in enumerate(people):
        if person in rows:
            rows[person].append(row)
    return [np.asarray(own, np.int64) for own in rows.values()]
