"""Captions of portraits: what a photo shows that may change, and what it shows of the person."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from persona_jax.data.portraits2.traits import (
    COLOURS,
    CUTS,
    EXPRESSIONS,
    IDENTITY,
    KINDS,
    PLAIN_SCENE,
    SCENE,
    as_dict,
    as_vector,
    hidden_traits,
)

_HAIR = {
    "bald": "a bald head",
    "cropped": "cropped {} hair",
    "side-parted": "side-parted {} hair",
    "quiff": "a {} quiff",
    "curly": "curly {} hair",
    "afro": "a {} afro",
    "bob": "a {} bob",
    "long straight": "long straight {} hair",
    "long wavy": "long wavy {} hair",
    "ponytail": "a {} ponytail",
    "bun": "a {} bun",
    "pigtails": "{} pigtails",
}
# Levels: low and high; in between they are not mentioned, but skin is.
_LEVELS = {
    "skin_tone": ("light skin", "tan skin", "dark skin"),
    "face_width": ("a narrow face", None, "a wide face"),
    "eye_size": ("small eyes", None, "big eyes"),
    "eye_spacing": ("close-set eyes", None, "wide-set eyes"),
}
_KINDS = {
    "face_shape": "a {} face",
    "brows": "{} brows",
    "eye_colour": "{} eyes",
    "eye_shape": "{}-shaped eyes",
    "nose": "a {} nose",
    "lips": "{} lips",
    "glasses": "{} glasses",
    "earrings": "{}",
}
_SAID_OTHERWISE = {
    ("beard", "none"): "no beard",
    ("beard", "moustache"): "a moustache",
    ("beard", "goatee"): "a goatee",
    ("beard", "short beard"): "a short beard",
    ("beard", "long beard"): "a long beard",
    ("glasses", "none"): "no glasses",
    ("earrings", "none"): "no earrings",
    ("earrings", "pearls"): "pearl earrings",
    ("earrings", "hoops"): "hoop earrings",
    ("mark", "none"): None,
    ("mark", "freckles"): "freckles",
    ("mark", "left mole"): "a mole on the left",
    ("mark", "right mole"): "a mole on the right",
    ("mark", "rosy cheeks"): "rosy cheeks",
}
_LIGHT = {"backlight": "against the light", "dark": "in the dark", "blur": "out of focus"}


def photo_caption(photo: Mapping[str, float], looks: str = "") -> str:
    """Only what may change from photo to photo, and, if given, what the person looks like.

    photo: traits.SCENE by name.
    """
    expression = tuple(EXPRESSIONS)[round(photo["expression"])]
    words = [f"a photo of a {expression} person"]
    if looks:
        words.append(f"with {looks}")
    if worn := _worn(photo):
        words.append(f"wearing {_list(worn)}")
    if photo["hand"] > 0.5:
        words.append("behind a hand")
    if photo["fringe"] > 0.5:
        words.append("behind blown hair")
    if photo["profile"] > 0.5:
        words.append(f"turned to the {'right' if photo['yaw'] > 0 else 'left'}")
    if photo["cut"] > 0.5:
        words.append(f"cut off at the {CUTS[round(photo['cut_side'])]}")
    words.append(_article(f"on a {_colour(photo, 'background')} background"))
    return " ".join([*words, *(text for name, text in _LIGHT.items() if photo[name] > 0.5)])


def full_caption(
    identity: Float[np.ndarray, " K"], scene: Float[np.ndarray, " J"], rng: np.random.Generator
) -> str:
    """The photo caption with some of the looks that the photo shows: four or more, drawn by
    `rng`."""
    seen = looks(identity, hidden_traits(scene[None])[0])
    count = int(rng.integers(min(4, len(seen)), len(seen) + 1))
    chosen = sorted(rng.permutation(len(seen))[:count])
    return photo_caption(as_dict(SCENE, scene), _list([seen[i] for i in chosen]))


def looks(identity: Float[np.ndarray, " K"], hidden: Float[np.ndarray, " K"]) -> list[str]:
    """A phrase for everything of a person that is not hidden.

    hidden: 1 where a trait cannot be told.
    """
    shown = {name for name, hides in zip(IDENTITY, hidden, strict=True) if hides < 0.5}
    who = as_dict(IDENTITY, identity)
    said = [
        _LEVELS[name][min(int(who[name] * 3), 2)] if name in _LEVELS else _kind(name, who[name])
        for name in IDENTITY
        if name in shown and name not in ("hair_style", "hair_colour")
    ]
    return [phrase for phrase in (*_hair(who, shown), *said) if phrase]


def plain_caption() -> str:
    """Of a calm face with nothing on it, so that every trait shows."""
    return photo_caption(as_dict(SCENE, as_vector(SCENE, PLAIN_SCENE)))


def _kind(name: str, index: float) -> str | None:
    kind = KINDS[name][round(index)]
    if (name, kind) in _SAID_OTHERWISE:
        return _SAID_OTHERWISE[name, kind]
    return _article(_KINDS[name].format(kind))


def _hair(who: Mapping[str, float], shown: set[str]) -> list[str]:
    style = KINDS["hair_style"][round(who["hair_style"])]
    colour = KINDS["hair_colour"][round(who["hair_colour"])]
    if "hair_style" not in shown:
        return [f"{colour} hair"] if "hair_colour" in shown else []
    phrase = _HAIR[style].format(colour if "hair_colour" in shown else "").replace("  ", " ")
    bald_but_brows = style == "bald" and "hair_colour" in shown
    return [_article(phrase), *([f"{colour} brow hair"] if bald_but_brows else [])]


def _worn(photo: Mapping[str, float]) -> list[str]:
    worn = {
        "hat": f"a {_colour(photo, 'hat_colour')} hat",
        "sunglasses": "sunglasses",
        "scarf": f"a {_colour(photo, 'scarf_colour')} scarf",
    }
    return [_article(text) for name, text in worn.items() if photo[name] > 0.5]


def _article(phrase: str) -> str:
    return phrase.replace("a orange", "an orange").replace("a oval", "an oval").replace("  ", " ")


def _colour(photo: Mapping[str, float], name: str) -> str:
    return tuple(COLOURS)[round(photo[name])]


def _list(things: list[str]) -> str:
    return " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)
