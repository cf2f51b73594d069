"""Draws portraits: numbers in, pixels out, a pure function.

The face is painted in coordinates of its own, (fx, fy), found from the picture's by turning a
rounded mask back by yaw and pitch, so that features foreshorten and shift as on a head. Layers are
painted back to front, channels first while at it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from persona_jax.data.portraits.shapes import (
    Plane,
    arch,
    box,
    circle,
    cover,
    ellipse,
    over,
    segment,
    union,
)
from persona_jax.data.portraits.traits import COLOURS, IDENTITY, SCENE, as_dict

_COLOURS = np.asarray(list(COLOURS.values()), np.float32)
# Stops from one end of a trait to the other.
_SKIN = ((1.00, 0.86, 0.76), (0.90, 0.68, 0.52), (0.66, 0.44, 0.30), (0.36, 0.23, 0.16))
_HAIR = ((0.10, 0.08, 0.08), (0.33, 0.20, 0.12), (0.60, 0.41, 0.22), (0.93, 0.80, 0.50))
_IRIS = ((0.30, 0.17, 0.08), (0.52, 0.42, 0.18), (0.30, 0.55, 0.32), (0.30, 0.55, 0.85))
# Brows and beards are dark on everyone: hair hidden by a hat stays hidden.
_BROW, _BEARD = np.float32((0.20, 0.14, 0.11)), np.float32((0.24, 0.17, 0.13))
_DARK, _WHITE = np.float32((0.11, 0.11, 0.13)), np.float32((1.0, 1.0, 1.0))
# The same pattern on everyone, fainter or stronger: x and y within the cheeks, strength.
_FRECKLES = np.random.default_rng(7).uniform((-0.33, 0.06, 0.6), (0.33, 0.26, 1.0), (18, 3))


@functools.partial(jax.jit, static_argnames="size")
def render(
    identity: Float[Array | np.ndarray, "B K"],
    scene: Float[Array | np.ndarray, "B J"],
    size: int = 64,
) -> UInt8[Array, "B {size} {size} 3"]:
    """Portraits of people (traits.IDENTITY) on photos (traits.SCENE), `size` pixels square."""
    drawn = jax.vmap(lambda who, photo: _portrait(who, photo, size))(identity, scene)
    levels = jnp.rint(jnp.clip(drawn, 0.0, 1.0) * 255).astype(jnp.uint8)
    return levels.transpose(0, 2, 3, 1)


@dataclasses.dataclass(frozen=True)
class _View:
    """Where every pixel lies, and how light falls there.

    Attributes:
      x, y: in the head's frame, y downwards; the head is about 0.9 wide and 1.1 high.
      fx, fy: where on an unturned face.
      soft: width of an edge, a pixel or more.
      shine: cosine between light and a rounded surface, less its usual value.
    """

    x: Plane
    y: Plane
    fx: Plane
    fy: Plane
    soft: Array
    shine: Plane

    def cover(self, distance: Plane, widen: float = 1.0) -> Plane:
        return cover(distance, self.soft * widen)

    def lit(self, colour: Array, strength: float) -> Float[Array, "3 S S"]:
        return colour[:, None, None] * (1.0 + strength * self.shine)


def _view(photo: dict, size: int) -> _View:
    line = (jnp.arange(size) + 0.5) * (2.0 / size) - 1.0
    u, v = jnp.meshgrid(line, line)
    scale = 0.74 / photo["zoom"]
    u = (u - 0.06 * photo["shift_x"]) * scale
    v = (v - 0.06 * photo["shift_y"]) * scale - 0.02
    roll = 0.22 * photo["roll"]
    x, y = u * jnp.cos(roll) + v * jnp.sin(roll), v * jnp.cos(roll) - u * jnp.sin(roll)

    depth = 0.42 * jnp.maximum(1.0 - (x / 0.62) ** 2 - (y / 0.72) ** 2, 0.0)
    yaw, pitch = 0.42 * photo["yaw"], 0.30 * photo["pitch"]
    fx = x * jnp.cos(yaw) - depth * jnp.sin(yaw)
    fy = y * jnp.cos(pitch) - depth * jnp.sin(pitch)

    light = jnp.stack([photo["light_x"], photo["light_y"], 1.1])
    light = light / jnp.linalg.norm(light)
    nx, ny = jnp.clip(x / 0.55, -1, 1), jnp.clip(y / 0.65, -1, 1)
    nz = jnp.sqrt(jnp.maximum(1.0 - nx**2 - ny**2, 0.05))
    shine = nx * light[0] + ny * light[1] + nz * light[2] - 0.75
    soft = (1.4 + 1.2 * photo["blur"]) * (2.0 / size) * scale
    return _View(x, y, fx, fy, soft, shine)


def _portrait(identity: Array, scene: Array, size: int) -> Float[Array, "3 S S"]:
    who, photo = as_dict(IDENTITY, identity), as_dict(SCENE, scene)
    view, skin, hair = _view(photo, size), _skin(who, photo), _hair_colour(who)
    picture = _background(view, photo)
    picture = _body(picture, view, who, photo, skin, hair)
    picture = _head(picture, view, who, photo, skin)
    for side in (-1.0, 1.0):
        picture = _eye(picture, view, who, photo, skin, side)
    picture = _nose(picture, view, who, skin)
    picture = _mouth(picture, view, who, photo, skin)
    picture = _beard(picture, view, who)
    picture = _top_hair(picture, view, who, photo, hair)
    for hide in (_headband, _glasses, _clown_nose, _scarf, _held, _hat, _headphones):
        picture = hide(picture, view, photo)
    warm = jnp.stack([1 + 0.07 * photo["warmth"], 1.0, 1 - 0.07 * photo["warmth"]])
    return picture * warm[:, None, None]


# --- colours ---------------------------------------------------------------------------------


def _between(stops: tuple, share: Array) -> Float[Array, "3"]:
    table, place = jnp.asarray(stops), jnp.clip(share, 0.0, 1.0) * (len(stops) - 1)
    low = jnp.clip(place.astype(jnp.int32), 0, len(stops) - 2)
    return table[low] + (place - low) * (table[low + 1] - table[low])


def _named(index: Array) -> Float[Array, "3"]:
    return jnp.asarray(_COLOURS)[index.astype(jnp.int32)]


def _skin(who: dict, photo: dict) -> Float[Array, "3"]:
    warmth = who["skin_warmth"] - 0.5
    tint = jnp.stack([1 + 0.04 * warmth, 1 + 0.06 * warmth, 1 - 0.50 * warmth])
    own = _between(_SKIN, who["skin_tone"]) * tint
    return jnp.where(photo["hides_skin"] > 0, _named(photo["paint_colour"]), own)


def _hair_colour(who: dict) -> Float[Array, "3"]:
    own = _between(_HAIR, who["hair_shade"])
    red = jnp.asarray((0.72, 0.26, 0.10)) * (0.35 + 0.9 * own.mean())
    return own + 0.75 * who["hair_redness"] * (red - own)


# --- the person, back to front ---------------------------------------------------------------


def _background(view: _View, photo: dict) -> Float[Array, "3 S S"]:
    pastel = 0.62 * _named(photo["background"]) + 0.33
    x, y = view.x, view.y
    fade = 1.0 - 0.10 * (y + 0.4) - 0.06 * (x * x + y * y) + 0.06 * x * photo["light_x"]
    return pastel[:, None, None] * fade


def _body(picture, view, who, photo, skin, hair):
    """Clothes, the hair behind, neck, and ears (over long hair: only headphones hide them)."""
    x, y = view.x, view.y
    clothes = view.lit(0.85 * _named(photo["clothes"]), 0.3)
    picture = over(picture, clothes, view.cover(box(x, y, 0.0, 1.10, 0.80, 0.50, 0.34)))
    low, half = -0.05 + 0.95 * who["hair_length"], 0.47 + 0.14 * who["hair_volume"]
    behind = box(x, y, 0.0, 0.5 * (low - 0.45), half, 0.5 * (low + 0.45), 0.22)
    behind = view.cover(behind + _curls(view, who)) * (photo["hides_hair"] < 0.5)
    picture = over(picture, view.lit(hair, 0.3), behind)
    picture = over(picture, 0.86 * skin, view.cover(box(x, y, 0.0, 0.50, 0.17, 0.30, 0.12)))
    grown = who["ear_size"]
    for side in (-1.0, 1.0):
        middle = side * 0.425 - 0.03 * photo["yaw"]
        outer = ellipse(x, y, middle, 0.0, 0.035 + 0.100 * grown, 0.055 + 0.120 * grown)
        inner = ellipse(x, y, middle, 0.0, 0.015 + 0.060 * grown, 0.030 + 0.075 * grown)
        picture = over(picture, 0.93 * skin, view.cover(outer))
        picture = over(picture, 0.76 * skin, view.cover(inner))
    return picture


def _head_shape(x: Plane, y: Plane, who: dict) -> Plane:
    cranium = ellipse(x, y, 0.0, -0.12, 0.42, 0.46)
    jaw = ellipse(x, y, 0.0, 0.18, 0.19 + 0.24 * who["jaw_width"], 0.31 + 0.22 * who["chin_length"])
    return union(cranium, jaw, 0.12)


def _head(picture, view, who, photo, skin):
    fx, fy, bare = view.fx, view.fy, photo["hides_skin"] < 0.5
    shadow = view.cover(_head_shape(view.x, view.y - 0.05, who), 3.0)
    picture = over(picture, 0.72 * skin, 0.35 * shadow)
    picture = over(picture, view.lit(skin, 0.45), view.cover(_head_shape(view.x, view.y, who)))
    blush = jnp.exp(-(((jnp.abs(fx) - 0.23) / 0.10) ** 2) - ((fy - 0.16) / 0.08) ** 2)
    happy = jnp.maximum(photo["smile"], 0.0)
    rosy = skin * jnp.asarray((1.0, 0.78, 0.76)) + happy * jnp.asarray((0.12, -0.10, -0.06))
    picture = over(picture, rosy, (0.40 + 0.45 * happy) * blush * bare)
    spots = [s * view.cover(circle(fx, fy, px, py, 0.020)) for px, py, s in _FRECKLES]
    freckles = functools.reduce(jnp.maximum, spots) * who["freckles"]
    picture = over(picture, 0.55 * skin, freckles * bare)
    mole_x, mole_y = 0.68 * (who["mole_x"] - 0.5), 0.13 + 0.30 * (who["mole_y"] - 0.5)
    mole = view.cover(circle(fx, fy, mole_x, mole_y, 0.048))
    return over(picture, skin * jnp.asarray((0.35, 0.28, 0.26)), mole * bare)


def _eye(picture, view, who, photo, skin, side):
    half = 0.065 + 0.080 * who["eye_size"]
    middle, level = 0.145 + 0.085 * who["eye_spacing"], -0.02
    opened = half * 0.62 * jnp.clip(photo["eyes_open"], 0.1, 1.1)
    u = side * view.fx - middle
    v = view.fy - level + 0.9 * (who["eye_tilt"] - 0.5) * u
    almond = ellipse(u, v, 0.0, 0.0, half, opened)
    inside = view.cover(almond)
    picture = over(picture, 0.80 * skin, 0.5 * view.cover(almond - 0.022, 2.0))
    picture = over(picture, 0.96 * _WHITE, inside)
    gaze = 0.02 * side * photo["yaw"]
    iris = view.cover(circle(u, v, gaze, 0.0, 0.66 * half))
    picture = over(picture, _between(_IRIS, who["eye_colour"]), iris * inside)
    picture = over(picture, _DARK, view.cover(circle(u, v, gaze, 0.0, 0.28 * half)) * inside)
    glint = circle(view.fx, view.fy, side * middle - 0.02, level - 0.02, 0.014)
    picture = over(picture, _WHITE, view.cover(glint) * inside)
    picture = over(picture, _DARK, view.cover(arch(u, v, 0.0, 0.0, half * 1.05, opened, 0.014)))
    level = -0.205 - 0.13 * (who["brow_height"] - 0.5) - 0.050 * photo["brow_raise"]
    u = side * view.fx - 0.17
    tilt = 1.1 * (who["brow_tilt"] - 0.5) - 0.4 * jnp.maximum(-photo["smile"], 0.0)
    v = view.fy - level + tilt * u
    brow = arch(u, v, 0.0, 0.0, 0.125, 0.025, 0.010 + 0.045 * who["brow_thickness"])
    return over(picture, _BROW, view.cover(brow))


def _nose(picture, view, who, skin):
    fx, fy = view.fx, view.fy
    tip, wide = 0.075 + 0.135 * who["nose_length"], 0.035 + 0.095 * who["nose_width"]
    bridge = segment(fx, fy, (0.012, -0.02), (0.4 * wide, tip), 0.014)
    picture = over(picture, 0.74 * skin, 0.7 * view.cover(bridge, 2.0))
    under = ellipse(fx, fy, 0.0, tip + 0.018, wide * 1.05, 0.034)
    picture = over(picture, 0.58 * skin, 0.9 * view.cover(under))
    rosy = skin * jnp.asarray((1.06, 0.84, 0.80))
    picture = over(picture, rosy, view.cover(ellipse(fx, fy, 0.0, tip, wide, 0.045), 1.5))
    for side in (-0.5, 0.5):
        nostril = ellipse(fx, fy, side * wide, tip + 0.026, 0.016, 0.011)
        picture = over(picture, 0.35 * skin, view.cover(nostril))
    return picture


def _mouth(picture, view, who, photo, skin):
    """Two lips above and below a gap, all following one curve, and a moustache."""
    fx, fy, smile, opened = view.fx, view.fy, photo["smile"], photo["mouth_open"]
    happy = jnp.maximum(smile, 0.0)
    half = (0.075 + 0.130 * who["mouth_width"]) * (1 + 0.18 * happy - 0.3 * opened * (1 - happy))
    u = jnp.clip(fx / half, -1.0, 1.0)
    bow = jnp.sqrt(1.0 - u * u + 1e-6)
    off = jnp.maximum(jnp.abs(fx) - half, 0.0)
    bend = smile * (0.08 + 0.40 * half)
    below = fy - 0.350 - bend * (0.5 - u * u)
    steep = jnp.sqrt(1.0 + (2.0 * bend * u / half) ** 2)
    # A smile shows teeth alone, a laugh the mouth below them.
    wide = jnp.clip(2.0 * opened - 1.0, 0.0, 1.0)
    gap, full = 0.085 * opened * bow, (0.015 + 0.055 * who["lip_fullness"]) * bow

    def strip(centre: Plane, thickness: Plane) -> Plane:
        beyond = jnp.maximum(jnp.abs(below - centre) - thickness, 0.0) / steep
        return jnp.sqrt(beyond**2 + off**2 + 1e-12) - 0.012

    lip = 0.35 * skin * jnp.asarray((1.15, 0.75, 0.75)) + 0.6 * jnp.asarray((0.78, 0.22, 0.28))
    picture = over(picture, 0.86 * lip, view.cover(strip(-gap - 0.5 * full, 0.5 * full)))
    picture = over(picture, 1.06 * lip, view.cover(strip(gap + 0.7 * full, 0.7 * full)))
    inner = view.cover(strip(jnp.zeros_like(gap), gap))
    picture = over(picture, jnp.asarray((0.30, 0.09, 0.10)), inner)
    teeth = view.cover(strip(-0.5 * wide * gap, (1.0 - 0.6 * wide) * gap))
    teeth = teeth * jnp.minimum(5.0 * opened, 1.0) * (0.3 + 0.7 * happy)
    picture = over(picture, 0.97 * _WHITE, teeth * inner)
    grown = who["moustache"]
    hair = arch(fx, fy, 0.0, 0.285, 0.05 + 0.15 * grown, 0.03, 0.006 + 0.042 * grown)
    return over(picture, _BEARD, view.cover(hair) * jnp.minimum(8 * grown, 1.0))


def _jaw_line(view: _View) -> Plane:
    """The upper edge of beards and scarves, rising towards the ears; positive below it."""
    return view.fy - 0.43 + 1.1 * jnp.maximum(jnp.abs(view.fx) - 0.17, 0.0)


def _beard(picture, view, who):
    hair = view.cover(jnp.maximum(_head_shape(view.x, view.y, who), -_jaw_line(view)), 2.0)
    strands = 1.0 + 0.12 * jnp.sin(60 * view.fx + 9 * jnp.sin(17 * view.fy))
    return over(picture, _BEARD[:, None, None] * strands, 0.95 * who["beard"] * hair)


def _curls(view: _View, who: dict) -> Plane:
    angle = jnp.arctan2(view.x, -(view.y + 0.1))
    return 0.075 * who["hair_curl"] * jnp.sin(13 * angle) * jnp.cos(9 * (view.y + 0.3))


def _top_hair(picture, view, who, photo, hair):
    fx, fy, volume = view.fx, view.fy, who["hair_volume"]
    dome = ellipse(
        view.x, view.y, 0.0, -0.14 - 0.05 * volume, 0.435 + 0.12 * volume, 0.46 + 0.13 * volume
    )
    parting = 0.60 * (who["hair_parting"] - 0.5)
    notch = 0.20 * jnp.exp(-(((fx - parting) / 0.15) ** 2))
    line = -0.29 - notch + 0.55 * jnp.maximum(jnp.abs(fx) - 0.30, 0.0)
    front = view.cover(jnp.maximum(dome + _curls(view, who), fy - line))
    strands = 1.0 + 0.10 * jnp.sin(42 * (fx - parting) / (0.6 + jnp.abs(fy)))
    return over(picture, view.lit(hair, 0.5) * strands, front * (photo["hides_hair"] < 0.5))


# --- what hides a region ---------------------------------------------------------------------


def _headband(picture, view, photo):
    band, worn = _named(photo["band_colour"]), photo["hides_brows"]
    height = jnp.abs(view.fy + 0.225)
    around = jnp.maximum(ellipse(view.x, view.y, 0.0, -0.10, 0.45, 0.50), height - 0.145)
    picture = over(picture, view.lit(band, 0.4), worn * view.cover(around))
    stripe = jnp.maximum(around, jnp.abs(height - 0.105) - 0.010)
    return over(picture, 0.75 * band, worn * view.cover(stripe))


def _glasses(picture, view, photo):
    """Clear glasses, or sunglasses over the eyes."""
    fx, fy, clear, dark = view.fx, view.fy, photo["glasses"], photo["hides_eyes"]
    for side in (-1.0, 1.0):
        lens = box(fx, fy, side * 0.20, -0.02, 0.185, 0.120, 0.095)
        arm = segment(fx, fy, (side * 0.37, -0.05), (side * 0.47, -0.04), 0.014)
        glare = segment(fx, fy, (side * 0.20 - 0.06, 0.01), (side * 0.20, -0.07), 0.016)
        frame = view.cover(jnp.minimum(jnp.abs(lens) - 0.012, arm))
        picture = over(picture, _WHITE, 0.12 * clear * view.cover(lens))
        picture = over(picture, _DARK, jnp.maximum(clear * frame, dark * view.cover(lens)))
        picture = over(picture, _DARK, dark * view.cover(arm))
        picture = over(picture, jnp.asarray((0.45, 0.50, 0.58)), 0.8 * dark * view.cover(glare))
    bridge = arch(fx, fy, 0.0, -0.03, 0.05, 0.02, 0.016)
    return over(picture, _DARK, jnp.maximum(clear, dark) * view.cover(bridge))


def _clown_nose(picture, view, photo):
    worn = photo["hides_nose"]
    ball = view.lit(jnp.asarray((0.88, 0.12, 0.14)), 0.4)
    picture = over(picture, ball, worn * view.cover(circle(view.fx, view.fy, 0.0, 0.135, 0.150)))
    glint = ellipse(view.fx, view.fy, -0.050, 0.075, 0.034, 0.025)
    return over(picture, jnp.asarray((1.0, 0.75, 0.75)), worn * view.cover(glint))


def _scarf(picture, view, photo):
    wool, worn = view.lit(_named(photo["scarf_colour"]), 0.5), photo["hides_jaw"]
    below = _jaw_line(view) + 0.015 + 0.6 * jnp.maximum(jnp.abs(view.fx) - 0.17, 0.0)
    wrap = jnp.maximum(box(view.x, view.y, 0.0, 0.52, 0.465, 0.48, 0.16), -below)
    folds = jnp.maximum(wrap, jnp.abs(jnp.mod(below, 0.13) - 0.065) - 0.012)
    picture = over(picture, wool, worn * view.cover(wrap))
    return over(picture, 0.78 * wool, worn * view.cover(folds))


def _held(picture, view, photo):
    """A microphone or a mittened hand before the mouth."""
    fx, fy, mitten = view.fx, view.fy, photo["mitten"]
    held = photo["hides_mouth"] * (1 - mitten)
    stick = segment(fx, fy, (0.08, 0.40), (0.30, 1.2), 0.075)
    picture = over(picture, jnp.asarray((0.55, 0.56, 0.60)), held * view.cover(stick))
    foam = 0.29 * (1.0 + 0.15 * jnp.sin(70 * fx) * jnp.sin(70 * fy))
    ball = ellipse(fx, fy, 0.0, 0.350, 0.255, 0.145)
    picture = over(picture, foam * _WHITE[:, None, None], held * view.cover(ball))
    held, wool = photo["hides_mouth"] * mitten, view.lit(_named(photo["clothes"]), 0.5)
    arm = segment(fx, fy, (0.10, 0.40), (0.34, 1.2), 0.14)
    palm = union(box(fx, fy, 0.02, 0.350, 0.255, 0.135, 0.11), arm, 0.08)
    picture = over(picture, 0.70 * wool, held * view.cover(palm - 0.014))
    return over(picture, wool, held * view.cover(palm))


def _hat(picture, view, photo):
    wool, worn = view.lit(_named(photo["hat_colour"]), 0.5), photo["hides_hair"]
    x, y, fx, fy = view.x, view.y, view.fx, view.fy
    dome = jnp.maximum(ellipse(x, y, 0.0, -0.25, 0.50, 0.44), fy + 0.30)
    picture = over(picture, wool, worn * view.cover(dome))
    rim = jnp.maximum(ellipse(x, y, 0.0, -0.25, 0.52, 0.46), jnp.abs(fy + 0.365) - 0.062)
    ribs = 0.86 - 0.12 * (jnp.sin(55 * fx) > 0)
    picture = over(picture, wool * ribs, worn * view.cover(rim))
    return over(picture, 0.92 * wool, worn * view.cover(circle(x, y, 0.0, -0.69, 0.09)))


def _headphones(picture, view, photo):
    x, y, worn = view.x, view.y, photo["hides_ears"]
    strap = jnp.maximum(jnp.abs(ellipse(x, y, 0.0, -0.14, 0.53, 0.58)) - 0.028, y)
    picture = over(picture, _DARK, worn * view.cover(strap))
    for side in (-1.0, 1.0):
        middle = side * 0.47 - 0.03 * photo["yaw"]
        cup = box(x, y, middle, 0.0, 0.110, 0.195, 0.085)
        picture = over(picture, 1.8 * _DARK, worn * view.cover(cup))
        pad = ellipse(x, y, middle, 0.0, 0.05, 0.11)
        picture = over(picture, 3.2 * _DARK, worn * view.cover(pad))
    return picture
