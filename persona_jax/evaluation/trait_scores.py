"""How true painted portraits are: to the prompt, and to the person."""

import numpy as np
from jaxtyping import Float

from persona_jax.data.portraits import descriptions as words
from persona_jax.data.portraits import traits
from persona_jax.evaluation import trait_classifier as reading

AMONG = 32
"""How many people a picture's person is picked from."""


def draw_wishes(count: int, seed: int) -> Float[np.ndarray, "P J"]:
    """Scenes ``[P, 31]`` that ask for an expression and a background, half of them for a hat, half
    for glasses, independently; nothing else is on them."""
    rng = np.random.default_rng((seed, count))
    wishes = []
    for _ in range(count):
        asked = {
            "expression": int(rng.integers(len(traits.EXPRESSIONS))),
            "background": int(rng.integers(len(traits.COLOURS))),
            "hides_hair": rng.random() < 0.5,
            "hat_colour": int(rng.integers(len(traits.COLOURS))),
            "glasses": rng.random() < 0.5,
        }
        wishes.append(traits.as_vector(traits.SCENE, traits.PLAIN_SCENE | asked))
    return np.stack(wishes)


def prompt_of(scene: Float[np.ndarray, " J"]) -> str:
    """The photo caption of a scene."""
    return words.photo_caption(traits.as_dict(traits.SCENE, scene))


PLAIN = prompt_of(traits.as_vector(traits.SCENE, traits.PLAIN_SCENE))
"""A calm face with nothing on it, so that every trait shows."""


def prompt_fidelity(
    readings: reading.Readings, scene: Float[np.ndarray, "P J"]
) -> dict[str, float]:
    """Share of pictures that show what was asked for.

    "hat", "glasses" and "smile" count pictures asked for one; "no hat" and "no glasses" those
    asked for none; "hat_colour" those with a hat asked for; "background" and "expression" all.

    Args:
      readings: of pictures painted for the scenes' captions.
      scene: what was asked for, as :func:`draw_wishes` gives it.
    """
    hat = scene[:, traits.SCENE.index("hides_hair")] > 0.5
    glasses = scene[:, traits.SCENE.index("glasses")] > 0.5
    expression = reading.truth(scene, "expression")
    smiling = expression == list(traits.EXPRESSIONS).index("smiling")
    has_hat = readings.hides[:, list(traits.REGIONS).index("hair")] > 0.5
    has_glasses = readings.choices["glasses"] == 1
    right = {
        name: readings.choices[name] == reading.truth(scene, name)
        for name in ("expression", "background", "hat_colour")
    }
    return {
        "hat": _share(has_hat, hat),
        "no_hat": _share(~has_hat, ~hat),
        "hat_colour": _share(right["hat_colour"], hat),
        "glasses": _share(has_glasses, glasses),
        "no_glasses": _share(~has_glasses, ~glasses),
        "background": _share(right["background"]),
        "smile": _share(right["expression"], smiling),
        "expression": _share(right["expression"]),
    }


def scene_fidelity(
    readings: reading.Readings, scene: Float[np.ndarray, "P J"]
) -> Float[np.ndarray, " P"]:
    """Share of what a scene asks for that is there: expression, background, glasses, and whether
    each region is hidden."""
    questions = ("expression", "background", "glasses")
    right = [readings.choices[name] == reading.truth(scene, name) for name in questions]
    hides = (readings.hides > 0.5) == (traits.hidden(scene) > 0.5)
    return np.concatenate([np.stack(right, axis=1), hides], axis=1).mean(axis=1)


def error_by_trait(
    identity: Float[np.ndarray, "P K"], truth: Float[np.ndarray, "P K"]
) -> dict[str, float]:
    """Root mean square error of each trait (guessing the middle is 0.289)."""
    off = np.sqrt(((identity - truth) ** 2).mean(axis=0))
    return {name: round(float(e), 4) for name, e in zip(traits.IDENTITY, off, strict=True)}


def named(
    reader: reading.TraitClassifier,
    identity: Float[np.ndarray, "P K"],
    truth: Float[np.ndarray, "P K"],
    among: int = AMONG,
) -> Float[np.ndarray, " P"]:
    """1 for a picture whose person is picked from `among`, else 0; NaN for those of the last
    people, who are too few to be picked from.

    Args:
      identity: traits read off pictures.
      truth: traits of who should be there. People, several pictures of whom there may be, stand in
        groups with those next to them.
    """
    _, first, who = np.unique(truth, axis=0, return_index=True, return_inverse=True)
    who, people = np.argsort(np.argsort(first))[who], truth[np.sort(first)]
    out = np.full(len(truth), np.nan)
    for start in range(0, len(people) - among + 1, among):
        chosen = (who >= start) & (who < start + among)
        picked = reader.name(identity[chosen], people[start : start + among])
        out[chosen] = picked == who[chosen] - start
    return out


def error_by_hiding(
    identity: Float[np.ndarray, "P K"],
    truth: Float[np.ndarray, "P K"],
    hidden: Float[np.ndarray, "P K"],
) -> dict[int, float]:
    """Root mean square error of the traits, by how many of the references hide them.

    hidden: that number, for every picture and trait.
    """
    count = np.rint(hidden).astype(np.int64)
    return {
        int(n): round(float(np.sqrt(((identity - truth) ** 2)[count == n].mean())), 4)
        for n in np.unique(count)
    }


def _share(right: np.ndarray, among: np.ndarray | None = None) -> float:
    chosen = right if among is None else right[among]
    return round(float(chosen.mean()), 4) if len(chosen) else float("nan")
