"""Captions of portraits: what a photo shows that may change, and what it shows of the person."""

import re
from collections.abc import Mapping
from itertools import combinations

import numpy as np
from jaxtyping import Float, Int

from persona_jax.data.portraits.traits import (
    COLOURS,
    EXPRESSIONS,
    IDENTITY,
    REGIONS,
    SCENE,
    hidden_traits,
)

# How each trait is said when low and when high; in between, and where None, it is not said.
LOOKS = {
    "skin_tone": ("light skin", "dark skin"),
    "skin_warmth": ("rosy skin", "golden skin"),
    "freckles": (None, "freckles"),
    "mole_x": ("a mole on the left", "a mole on the right"),
    "mole_y": ("a mole high up", "a mole low down"),
    "hair_length": ("short hair", "long hair"),
    "hair_volume": ("flat hair", "big hair"),
    "hair_parting": ("hair parted on the left", "hair parted on the right"),
    "hair_shade": ("black hair", "blond hair"),
    "hair_redness": (None, "red hair"),
    "hair_curl": ("straight hair", "curly hair"),
    "brow_thickness": ("thin brows", "thick brows"),
    "brow_tilt": ("worried brows", "stern brows"),
    "brow_height": ("low brows", "high brows"),
    "eye_size": ("small eyes", "big eyes"),
    "eye_spacing": ("close-set eyes", "wide-set eyes"),
    "eye_tilt": ("drooping eyes", "slanted eyes"),
    "eye_colour": ("brown eyes", "blue eyes"),
    "nose_length": ("a short nose", "a long nose"),
    "nose_width": ("a narrow nose", "a wide nose"),
    "mouth_width": ("a small mouth", "a wide mouth"),
    "lip_fullness": ("thin lips", "full lips"),
    "moustache": (None, "a moustache"),
    "jaw_width": ("a narrow jaw", "a wide jaw"),
    "chin_length": ("a short chin", "a long chin"),
    "beard": (None, "a beard"),
    "ear_size": ("small ears", "big ears"),
}
WORN = {
    "hides_hair": "a {hat_colour} hat",
    "hides_brows": "a {band_colour} headband",
    "glasses": "glasses",
    "hides_eyes": "sunglasses",
    "hides_nose": "a clown nose",
    "hides_jaw": "a {scarf_colour} scarf",
    "hides_ears": "headphones",
    "hides_skin": "{paint_colour} face paint",
}
"""What may be worn, by its name in traits.SCENE."""
LOW, HIGH = 1 / 3, 2 / 3
SAID = 6
"""At most so many looks in a caption."""


def photo_caption(photo: Mapping[str, float]) -> str:
    """Only what may change from photo to photo; whatever hides a part of the face is named.

    photo: traits.SCENE by name.
    """
    return _sentence(photo, "")


def full_caption(
    who: Mapping[str, float], photo: Mapping[str, float], rng: np.random.Generator
) -> str:
    """The photo caption with a few of the looks that the photo shows, drawn by `rng`.

    who: traits.IDENTITY by name.
    """
    return _sentence(photo, _looks(who, photo, rng))


def opposites() -> list[tuple[str, str]]:
    """A sentence for a low and one for a high value of each of traits.IDENTITY, in its order; then
    one for each of two expressions, for every two of traits.EXPRESSIONS; then one that does not say
    and one that says what is worn, for each of :data:`WORN`.

    What is not told apart here, the text tower hardly tells apart at all: batches of captions
    differ in so much else.
    """
    looks = [
        (f"a person with {low}" if low else f"a person without {high}", f"a person with {high}")
        for low, high in (LOOKS[trait] for trait in IDENTITY)
    ]
    faces = [
        (f"a photo of a {one} person", f"a photo of a {other} person")
        for one, other in combinations(EXPRESSIONS, 2)
    ]
    worn = [
        ("a photo of a person", f"a photo of a person wearing {re.sub('{.*} ', '', thing)}")
        for thing in WORN.values()
    ]
    return looks + faces + worn


def which_opposite(
    identity: Float[np.ndarray, "P K"], scene: Float[np.ndarray, "P J"]
) -> Int[np.ndarray, "P N"]:
    """Which sentence of each of the N opposites is true of P photos: 0 or 1, or −1 where neither
    is or where the photo hides it."""
    hidden = hidden_traits(scene) > 0.5
    looks = np.select([hidden, identity < LOW, identity > HIGH], [-1, 0, 1], -1)
    no_mouth = scene[:, SCENE.index("hides_mouth"), None] > 0.5
    expression = np.rint(scene[:, SCENE.index("expression"), None])
    one, other = np.transpose(list(combinations(range(len(EXPRESSIONS)), 2)))
    faces = np.select([no_mouth, expression == one, expression == other], [-1, 0, 1], -1)
    worn = scene[:, [SCENE.index(name) for name in WORN]] > 0.5
    return np.concatenate([looks, faces, worn], axis=1).astype(np.int32)


def _looks(who: Mapping[str, float], photo: Mapping[str, float], rng: np.random.Generator) -> str:
    seen = [
        look
        for region, traits in REGIONS.items()
        if photo[f"hides_{region}"] < 0.5
        for look in (_look(trait, who[trait]) for trait in traits)
        if look
    ]
    chosen = sorted(rng.permutation(len(seen))[:SAID])
    return _list([seen[i] for i in chosen])


def _look(trait: str, value: float) -> str | None:
    low, high = LOOKS[trait]
    return low if value < LOW else high if value > HIGH else None


def _sentence(photo: Mapping[str, float], looks: str) -> str:
    expression = tuple(EXPRESSIONS)[round(photo["expression"])]
    words = [f"a photo of a {expression} person"]
    if looks:
        words.append(f"with {looks}")
    if worn := _list(_worn(photo)):
        words.append(f"wearing {worn}")
    if photo["hides_mouth"] > 0.5:
        words.append("behind a mitten" if photo["mitten"] > 0.5 else "behind a microphone")
    return " ".join([*words, f"on a {_colour(photo, 'background')} background"])


def _worn(photo: Mapping[str, float]) -> list[str]:
    colours = {name: _colour(photo, name) for name in photo if name.endswith("_colour")}
    return [
        text.format_map(colours).replace("a orange", "an orange")
        for name, text in WORN.items()
        if photo[name] > 0.5
    ]


def _colour(photo: Mapping[str, float], name: str) -> str:
    return tuple(COLOURS)[round(photo[name])]


def _list(things: list[str]) -> str:
    return " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)
