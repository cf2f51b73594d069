"""Draws portraits: numbers in, an SVG document or pixels out, a pure function."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyvips
from jaxtyping import Float, UInt8

from persona_jax.data.portraits2 import face, hair, worn
from persona_jax.data.portraits2.svg import ellipse, fade, gradient, group, mix
from persona_jax.data.portraits2.traits import (
    COLOURS,
    CUTS,
    IDENTITY,
    KINDS,
    SCENE,
    as_dict,
)

SIDE = 200
"""Of a document, in its own units."""
_COLOURS = tuple(COLOURS.values())
_BLUR = 3.2  # standard deviation, in units of the 200 that a picture is wide
_CUT = {"top": (0, -62), "bottom": (0, 66), "left": (-66, 0), "right": (66, 0)}


def render(
    identity: Float[np.ndarray, "B K"], scene: Float[np.ndarray, "B J"], size: int = 128
) -> UInt8[np.ndarray, "B {size} {size} 3"]:
    """Portraits of people (traits.IDENTITY) on photos (traits.SCENE), `size` pixels square.

    libvips draws without holding Python's lock: as many at a time as there are cores.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(lambda who, photo: draw(who, photo, size), identity, scene)))


def draw(
    identity: Float[np.ndarray, " K"], scene: Float[np.ndarray, " J"], size: int = 128
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """One portrait in RGB, `size` pixels square."""
    svg = document(identity, scene).encode()
    picture = pyvips.Image.svgload_buffer(svg, scale=size / SIDE)
    if scene[SCENE.index("blur")] > 0.5:
        picture = picture.gaussblur(_BLUR * size / SIDE)
    return np.ascontiguousarray(picture.numpy()[..., :3])


def document(identity: Float[np.ndarray, " K"], scene: Float[np.ndarray, " J"]) -> str:
    """The SVG document of a portrait; all but its blur."""
    who, photo = person(identity), as_dict(SCENE, scene)
    pose = face.Pose(0.85 * photo["yaw"], photo["pitch"])
    skin = face.skin_colour(who["skin_tone"])
    bald = who | {"hair_style": "bald"} if photo["hat"] > 0.5 else who
    pieces = [
        "" if photo["hat"] > 0.5 and who["hair_style"] not in hair.LONG else hair.behind(who, pose),
        face.neck(who, skin),
        worn.shoulders(_named(photo["clothes"])),
        face.ears(who, pose, skin),
        face.head(who, pose, skin, photo["light"]),
        face.mouth(who, photo, pose, skin),
        face.beard(who, pose),
        face.mouth(who, photo, pose, skin) if who["beard"] in ("short beard", "long beard") else "",
        face.nose(who, pose, skin),
        face.moustache(who, pose),
        face.eyes(who, photo, pose, skin),
        face.glasses(who, pose) if photo["sunglasses"] < 0.5 else "",
        hair.front(bald, pose),
        face.earrings(who, pose),
    ]
    obstacles = {
        "sunglasses": lambda: worn.sunglasses(who, pose),
        "scarf": lambda: worn.scarf(who, _named(photo["scarf_colour"])),
        "fringe": lambda: hair.blown(who, pose),
        "hat": lambda: worn.hat(who, pose, _named(photo["hat_colour"])),
        "hand": lambda: worn.hand(pose, skin),
    }
    pieces += [draw() for name, draw in obstacles.items() if photo[name] > 0.5]
    x, y = _CUT[CUTS[int(photo["cut_side"])]] if photo["cut"] > 0.5 else (0, 0)
    x, y, zoom = x + 5 * photo["shift_x"], y + 9 + 3 * photo["shift_y"], 1.06 * photo["zoom"]
    placed = f"translate({x:.1f} {y:.1f}) rotate({6 * photo['roll']:.1f}) scale({zoom:.3f})"
    content = [_background(photo), group(pieces, placed), _light(photo)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIDE}" height="{SIDE}" '
        'viewBox="-100 -100 200 200">' + "".join(content) + "</svg>"
    )


def person(identity: Float[np.ndarray, " K"]) -> dict:
    """Traits by name: levels as numbers, kinds by their names."""
    return {
        name: KINDS[name][round(value)] if name in KINDS else value
        for name, value in as_dict(IDENTITY, identity).items()
    }


def _named(index: float) -> str:
    return _COLOURS[round(index)]


def _background(photo: Mapping) -> str:
    """Pastel, lighter behind the head."""
    colour = mix(_named(photo["background"]), "#ffffff", 0.30)
    light = mix(colour, "#ffffff", 0.45)
    return (
        f'<rect x="-100" y="-100" width="200" height="200" fill="{colour}"/>'
        + gradient("halo", 60 * photo["light"], -60, 150, light, 1)
        + '<rect x="-100" y="-100" width="200" height="200" fill="url(#halo)"/>'
    )


def _light(photo: Mapping) -> str:
    """Darkness over everything, or a bright sky behind somebody who stands in the shade."""
    if photo["dark"] > 0.5:
        return fade('<rect x="-100" y="-100" width="200" height="200" fill="#0b1030"/>', 0.78)
    if photo["backlight"] > 0.5:
        shadow = gradient("shade", 0, 15, 95, "#2a2038", 0.88)
        glow = gradient("sky", 90 * (1 if photo["light"] > 0 else -1), -90, 120, "#fff4d0", 0.95)
        both = shadow + ellipse(0, 15, 95, 95, "url(#shade)") + glow
        return both + '<rect x="-100" y="-100" width="200" height="200" fill="url(#sky)"/>'
    return ""
