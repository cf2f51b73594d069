"""Who is on a portrait and what the photo does to them: named numbers in flat vectors.

A person is :data:`IDENTITY`, 27 numbers in [0, 1]. A photo is :data:`SCENE`: everything an identity
must survive. Every trait of a person belongs to one of eight regions, and each region can be hidden
on a photo by one thing of its own (:data:`HIDERS`), independently of the others.
"""

import numpy as np
from jaxtyping import Array, Float

REGIONS = {
    "skin": ("skin_tone", "skin_warmth", "freckles", "mole_x", "mole_y"),
    "hair": (
        "hair_length",
        "hair_volume",
        "hair_parting",
        "hair_shade",
        "hair_redness",
        "hair_curl",
    ),
    "brows": ("brow_thickness", "brow_tilt", "brow_height"),
    "eyes": ("eye_size", "eye_spacing", "eye_tilt", "eye_colour"),
    "nose": ("nose_length", "nose_width"),
    "mouth": ("mouth_width", "lip_fullness", "moustache"),
    "jaw": ("jaw_width", "chin_length", "beard"),
    "ears": ("ear_size",),
}
"""Regions of a face and the traits that show there and nowhere else."""

IDENTITY = tuple(trait for traits in REGIONS.values() for trait in traits)

HIDERS = {
    "skin": "face paint",
    "hair": "hat",
    "brows": "headband",
    "eyes": "sunglasses",
    "nose": "clown nose",
    "mouth": "microphone",
    "jaw": "scarf",
    "ears": "headphones",
}
"""What hides each region. A mitten may take the microphone's place."""

COLOURS = {
    "red": (0.83, 0.22, 0.20),
    "orange": (0.93, 0.55, 0.20),
    "yellow": (0.95, 0.83, 0.35),
    "green": (0.30, 0.62, 0.36),
    "blue": (0.25, 0.45, 0.80),
    "purple": (0.52, 0.33, 0.68),
    "grey": (0.55, 0.56, 0.58),
    "white": (0.94, 0.94, 0.92),
}
"""What backgrounds, clothes and things may be coloured in."""

PAINTS = ("red", "yellow", "green", "blue", "purple")
"""Those of them that no skin has."""

# smile (−1..1), mouth open (0..1.5), brows raised (−1..1), eyes open (0..1)
EXPRESSIONS = {
    "calm": (0.0, 0.0, 0.0, 0.75),
    "smiling": (0.9, 0.3, 0.1, 0.65),
    "laughing": (0.65, 1.5, 0.4, 0.3),
    "sad": (-0.9, 0.0, -0.3, 0.6),
    "surprised": (0.0, 0.9, 0.9, 1.0),
}

SCENE = (
    *(f"hides_{region}" for region in REGIONS),
    "mitten",
    "glasses",
    "expression",
    "smile",
    "mouth_open",
    "brow_raise",
    "eyes_open",
    "yaw",
    "pitch",
    "roll",
    "light_x",
    "light_y",
    "warmth",
    "zoom",
    "shift_x",
    "shift_y",
    "blur",
    "background",
    "clothes",
    "hat_colour",
    "band_colour",
    "scarf_colour",
    "paint_colour",
)
"""Names of a photo's numbers; kinds and colours are indices into the tables above."""

PLAIN_SCENE = {
    "eyes_open": 0.75,
    "light_y": -0.5,
    "zoom": 1.0,
    "background": 4,
    "clothes": 6,
}
"""A calm face from the front with nothing on; what is not named is 0."""


def draw_identity(rng: np.random.Generator) -> Float[np.ndarray, " K"]:
    """A person ``[27]``: every trait uniform in [0, 1], independent of the others."""
    return rng.random(len(IDENTITY)).astype(np.float32)


def draw_hiding_rate(rng: np.random.Generator) -> float:
    """How often a person's regions are hidden, all through their set of photos: 0 to 0.6, and less
    than 0.15 for half of them. A base that seldom sees a bare face cannot paint one."""
    return float(0.6 * rng.random() ** 2)


def draw_scene(rng: np.random.Generator, hiding_rate: float) -> Float[np.ndarray, " J"]:
    """A photo ``[31]`` of somebody whose regions are each hidden at `hiding_rate`."""
    scene = {f"hides_{region}": rng.random() < hiding_rate for region in REGIONS}
    expression = int(rng.integers(len(EXPRESSIONS)))
    smile, mouth_open, brow_raise, eyes_open = tuple(EXPRESSIONS.values())[expression]
    scene |= {
        "mitten": rng.random() < 0.35,
        "glasses": not scene["hides_eyes"] and rng.random() < 0.25,
        "expression": expression,
        "smile": smile + rng.uniform(-0.12, 0.12),
        "mouth_open": max(0.0, mouth_open * rng.uniform(0.8, 1.1)),
        "brow_raise": brow_raise + rng.uniform(-0.15, 0.15),
        "eyes_open": eyes_open * rng.uniform(0.85, 1.1),
        "yaw": np.clip(rng.normal(0, 0.35), -1, 1),
        "pitch": np.clip(rng.normal(0, 0.3), -1, 1),
        "roll": np.clip(rng.normal(0, 0.3), -1, 1),
        "light_x": rng.uniform(-1, 1),
        "light_y": rng.uniform(-1, 0.2),
        "warmth": rng.uniform(-1, 1),
        "zoom": rng.uniform(0.93, 1.07),
        "shift_x": rng.uniform(-1, 1),
        "shift_y": rng.uniform(-1, 1),
        "blur": max(0.0, rng.normal(-0.4, 0.6)),
    }
    colours = ("background", "clothes", "hat_colour", "band_colour", "scarf_colour")
    scene |= {name: int(rng.integers(len(COLOURS))) for name in colours}
    scene["paint_colour"] = list(COLOURS).index(PAINTS[rng.integers(len(PAINTS))])
    return as_vector(SCENE, scene)


def hidden(scene: Float[np.ndarray, "P J"]) -> Float[np.ndarray, "P R"]:
    """1 where a region is hidden ``[P, 8]``."""
    return scene[:, [SCENE.index(f"hides_{region}") for region in REGIONS]]


def hidden_traits(scene: Float[np.ndarray, "P J"]) -> Float[np.ndarray, "P K"]:
    """1 where a trait cannot be seen ``[P, 27]``."""
    lengths = [len(traits) for traits in REGIONS.values()]
    return np.repeat(hidden(scene), lengths, axis=1)


def as_vector(names: tuple[str, ...], values: dict) -> Float[np.ndarray, " _"]:
    """Named numbers in the order of `names`; 0 for those not given."""
    return np.asarray([values.get(name, 0.0) for name in names], np.float32)


def as_dict(names: tuple[str, ...], vector: Float[Array | np.ndarray, "_ ..."]) -> dict:
    """The reverse of :func:`as_vector`, by its first axis: plain numbers, or JAX arrays."""
    values = vector.tolist() if isinstance(vector, np.ndarray) else vector
    return {name: values[i] for i, name in enumerate(names)}
