"""Who is on a portrait and what the photo does to them: named numbers in flat vectors.

A person is :data:`IDENTITY`: *levels* in [0, 1] and *kinds*, indices into a table of names. A photo
is :data:`SCENE`: expression, pose, clothes, background, and at most two *obstacles*
(:data:`OBSTACLES`), each of which hides or ruins some of the traits (:data:`HIDDEN_BY`).
"""

from itertools import accumulate

import numpy as np
from jaxtyping import Array, Float, Int

LEVELS = ("skin_tone", "face_width", "eye_size", "eye_spacing")
"""Traits that are a number: dark to light skin is 1 to 0, everything else small to large."""

KINDS = {
    "face_shape": ("round", "oval", "square", "pointed"),
    "hair_style": (
        "bald",
        "cropped",
        "side-parted",
        "quiff",
        "curly",
        "afro",
        "bob",
        "long straight",
        "long wavy",
        "ponytail",
        "bun",
        "pigtails",
    ),
    "hair_colour": ("black", "brown", "ginger", "blond", "silver", "pink"),
    "brows": ("thin", "thick", "angled", "round"),
    "eye_colour": ("brown", "green", "blue", "amber"),
    "eye_shape": ("round", "almond", "sleepy"),
    "nose": ("button", "long", "broad", "hooked"),
    "lips": ("thin", "full"),
    "beard": ("none", "moustache", "goatee", "short beard", "long beard"),
    "glasses": ("none", "round", "square", "half-moon"),
    "earrings": ("none", "pearls", "hoops"),
    "mark": ("none", "freckles", "left mole", "right mole", "rosy cheeks"),
}
"""Traits that are one of a few kinds."""

IDENTITY = (*LEVELS, *KINDS)

COLOURS = {
    "red": "#d8504a",
    "orange": "#ee9a4d",
    "yellow": "#f2cf63",
    "green": "#5fa777",
    "blue": "#4f86c6",
    "purple": "#8a63b0",
    "grey": "#8f949b",
    "white": "#f4f1ea",
}
"""What backgrounds, clothes and hats may be coloured in."""

# smile (−1..1), mouth open (0..1), brows raised (−1..1), eyes open (0..1)
EXPRESSIONS = {
    "calm": (0.25, 0.0, 0.0, 0.9),
    "smiling": (1.0, 0.0, 0.15, 0.85),
    "laughing": (1.0, 0.8, 0.35, 0.35),
    "sad": (-0.9, 0.0, -0.6, 0.75),
    "surprised": (0.0, 1.0, 1.0, 1.15),
}

OBSTACLES = (
    "sunglasses",
    "hat",
    "fringe",  # hair blown across the eyes
    "hand",
    "scarf",
    "backlight",
    "dark",
    "blur",
    "profile",
    "cut",  # a part of the face lies outside the frame
)
"""What keeps a photo from showing who is on it."""

CUTS = ("top", "bottom", "left", "right")
"""Where the frame cuts a face off."""

_EYES = ("eye_size", "eye_spacing", "eye_colour", "eye_shape", "glasses")
_LOWER = ("face_width", "face_shape", "lips", "beard")
_COLOURS = ("skin_tone", "hair_colour", "eye_colour", "mark")
HIDDEN_BY = {
    "sunglasses": _EYES,
    "hat": ("hair_style",),
    "fringe": (*_EYES, "brows"),
    "hand": ("lips", "beard", "nose", "mark"),
    "scarf": (*_LOWER, "earrings"),
    "backlight": _COLOURS,
    "dark": _COLOURS,
    "blur": ("eye_colour", "eye_shape", "eye_size", "brows", "nose", "lips", "earrings", "mark"),
    "profile": ("face_width", "face_shape", "eye_spacing", "nose", "mark", "earrings"),
}
"""Traits that cannot be told where there is an obstacle."""
CUT_OFF = {
    "top": ("hair_style", "brows"),
    "bottom": _LOWER,
    "left": ("face_width", "face_shape", "eye_spacing", "mark", "hair_style"),
    "right": ("face_width", "face_shape", "eye_spacing", "mark", "hair_style"),
}
"""Traits that cannot be told where the frame cuts a side off."""

SCENE = (
    *OBSTACLES,
    "cut_side",
    "expression",
    "smile",
    "mouth_open",
    "brow_raise",
    "eyes_open",
    "yaw",
    "pitch",
    "roll",
    "light",
    "zoom",
    "shift_x",
    "shift_y",
    "background",
    "clothes",
    "hat_colour",
    "scarf_colour",
)
"""Names of a photo's numbers; kinds and colours are indices into the tables above."""

PLAIN_SCENE = {"smile": 0.25, "eyes_open": 0.9, "zoom": 1.0, "background": 4, "clothes": 6}
"""A calm face from the front with nothing on; what is not named is 0."""


def draw_identity(rng: np.random.Generator) -> Float[np.ndarray, " K"]:
    """A person ``[K]``: traits independent of each other, kinds as in :func:`kind_odds`."""
    levels = [rng.random() for _ in LEVELS]
    kinds = [rng.choice(len(names), p=kind_odds(names)) for names in KINDS.values()]
    return np.asarray([*levels, *kinds], np.float32)


def kind_odds(names: tuple[str, ...]) -> Float[np.ndarray, " C"]:
    """How often each kind is drawn: all alike, but "none" on two people of five."""
    if names[0] != "none":
        return np.full(len(names), 1 / len(names))
    return np.asarray([0.4] + [0.6 / (len(names) - 1)] * (len(names) - 1))


def draw_scene(rng: np.random.Generator, ruined: float = 0.5) -> Float[np.ndarray, " J"]:
    """A photo ``[J]``; with probability `ruined` it has one obstacle, or two (every third)."""
    count = 0 if rng.random() >= ruined else 2 if rng.random() < 1 / 3 else 1
    return scene_with(rng, [OBSTACLES[i] for i in rng.permutation(len(OBSTACLES))[:count]])


def scene_with(rng: np.random.Generator, obstacles: list[str]) -> Float[np.ndarray, " J"]:
    """A photo ``[J]`` with just these obstacles, everything else drawn."""
    expression = int(rng.integers(len(EXPRESSIONS)))
    smile, mouth_open, brow_raise, eyes_open = tuple(EXPRESSIONS.values())[expression]
    scene = dict.fromkeys(obstacles, 1.0) | {
        "cut_side": int(rng.integers(len(CUTS))) if "cut" in obstacles else 0,
        "expression": expression,
        "smile": smile,
        "mouth_open": mouth_open * rng.uniform(0.8, 1.0),
        "brow_raise": brow_raise,
        "eyes_open": eyes_open,
        "yaw": rng.uniform(-0.35, 0.35),
        "pitch": rng.uniform(-1, 1),
        "roll": rng.uniform(-1, 1),
        "light": rng.uniform(-1, 1),
        "zoom": rng.uniform(0.95, 1.05),
        "shift_x": rng.uniform(-1, 1),
        "shift_y": rng.uniform(-1, 1),
    }
    if "profile" in obstacles:
        scene["yaw"] = rng.choice([-1.0, 1.0])
    colours = ("background", "clothes", "hat_colour", "scarf_colour")
    scene |= {name: int(rng.integers(len(COLOURS))) for name in colours}
    return as_vector(SCENE, scene)


def hidden_traits(scene: Float[np.ndarray, "P J"]) -> Float[np.ndarray, "P K"]:
    """1 where a trait cannot be told from a photo."""
    out = np.zeros((len(scene), len(IDENTITY)), np.float32)
    for name, traits in HIDDEN_BY.items():
        out[np.ix_(column(scene, name) > 0.5, [IDENTITY.index(trait) for trait in traits])] = 1
    cut, side = column(scene, "cut") > 0.5, column(scene, "cut_side").astype(int)
    for number, place in enumerate(CUTS):
        columns = [IDENTITY.index(trait) for trait in CUT_OFF[place]]
        out[np.ix_(cut & (side == number), columns)] = 1
    return out


def obstructed(scene: Float[np.ndarray, "P J"]) -> Float[np.ndarray, " P"]:
    """1 for a photo with an obstacle."""
    return (scene[:, : len(OBSTACLES)] > 0.5).any(axis=1).astype(np.float32)


def column(scene: Float[np.ndarray, "P J"], name: str) -> Float[np.ndarray, " P"]:
    """One of a scene's numbers, for every photo."""
    return scene[:, SCENE.index(name)]


def kind_indices(identity: Float[np.ndarray, "P K"]) -> Int[np.ndarray, "P C"]:
    """The kinds of P people, by number."""
    return np.rint(identity[:, len(LEVELS) :]).astype(np.int64)


_LENGTHS = (*(1 for _ in LEVELS), *(len(kinds) for kinds in KINDS.values()))
CODE = {
    name: slice(end - length, end)
    for name, length, end in zip(IDENTITY, _LENGTHS, accumulate(_LENGTHS), strict=True)
}
"""Where each trait stands in a code (:func:`encode`)."""


def encode(identity: Float[np.ndarray, "P K"]) -> Float[np.ndarray, "P E"]:
    """People as codes ``[P, E]``: levels as they are, kinds as one of several numbers being 1."""
    one_hot = [
        np.eye(len(kinds), dtype=np.float32)[index]
        for kinds, index in zip(KINDS.values(), kind_indices(identity).T, strict=True)
    ]
    return np.concatenate([identity[:, : len(LEVELS)].astype(np.float32), *one_hot], axis=1)


def squared_errors(
    code: Float[np.ndarray, "P E"], identity: Float[np.ndarray, "P K"]
) -> Float[np.ndarray, "P K"]:
    """How far codes, certain or not, are from people, by trait: the square of a level's error; of
    kinds, half the squared distance between probabilities and truth (half the Brier score), so
    that a confident mistake is 1, a level's whole range."""
    off = (code - encode(identity)) ** 2
    share = {name: 1.0 if name in LEVELS else 0.5 for name in IDENTITY}
    return np.stack([share[name] * off[:, CODE[name]].sum(axis=1) for name in IDENTITY], axis=1)


def guess() -> Float[np.ndarray, " E"]:
    """The code that knows nothing of a person: the mean of all."""
    odds = [kind_odds(kinds) for kinds in KINDS.values()]
    return np.concatenate([np.full(len(LEVELS), 0.5), *odds]).astype(np.float32)


def guessing_error() -> float:
    """Root mean square error of :func:`guess` over people and traits."""
    levels = [1 / 12] * len(LEVELS)
    kinds = [0.5 * (1 - (kind_odds(names) ** 2).sum()) for names in KINDS.values()]
    return float(np.sqrt(np.mean([*levels, *kinds])))


def as_vector(names: tuple[str, ...], values: dict) -> Float[np.ndarray, " _"]:
    """Named numbers in the order of `names`; 0 for those not given."""
    return np.asarray([values.get(name, 0.0) for name in names], np.float32)


def as_dict(names: tuple[str, ...], vector: Float[Array | np.ndarray, "_ ..."]) -> dict:
    """The reverse of :func:`as_vector`, by its first axis: plain numbers, or JAX arrays."""
    values = vector.tolist() if isinstance(vector, np.ndarray) else vector
    return {name: values[i] for i, name in enumerate(names)}
