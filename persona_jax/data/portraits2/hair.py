"""Hair of a drawn person as SVG: what lies behind the head, and what lies over it.

Each style is a small function of the head's half width, the middle of the hair and its colour.
"""

import math
from collections.abc import Callable, Mapping

from persona_jax.data.portraits2.face import HAIR, Pose, half_width
from persona_jax.data.portraits2.svg import Number, ellipse, path, shade, stroke

Style = Callable[[Number, Number, str], str]

LONG = ("long straight", "long wavy", "bob", "pigtails", "ponytail")
"""Styles of which much shows below a hat."""


def behind(who: Mapping, pose: Pose) -> str:
    """Drawn before neck and head."""
    style = _BEHIND.get(who["hair_style"])
    return style(half_width(who), -10 * pose.yaw, HAIR[who["hair_colour"]]) if style else ""


def front(who: Mapping, pose: Pose) -> str:
    """Drawn over the forehead."""
    style = _FRONT[who["hair_style"]]
    return style(half_width(who), pose.x(0, 0.8), HAIR[who["hair_colour"]])


def blown(who: Mapping, pose: Pose) -> str:
    """Hair blown across the eyes, whatever the style."""
    colour, x = HAIR[who["hair_colour"]], pose.x(0)
    out = []
    for start, end, thick in ((-46, 22, 15), (-60, -4, 17), (-38, 36, 9)):
        lock = (
            f"M{x - 52},{start} C{x - 20},{start - 12} {x + 22},{end - 34} {x + 58},{end} "
            f"C{x + 20},{end - 34 + thick * 1.5} {x - 22},{start - 8 + thick * 2} "
            f"{x - 54},{start + thick * 1.6} Z"
        )
        out.append(path(lock, colour, stroke=_edge(colour), width=2.2))
    return "".join(out)


def _edge(colour: str) -> str:
    return shade(colour, 0.62)


def _outlined(data: str, colour: str, edge: str) -> str:
    return path(data, colour, stroke=edge, width=2.4)


# --- behind the head -------------------------------------------------------------------------


def _afro_behind(w: Number, x: Number, colour: str) -> str:
    rx, ry, count, bump = w + 24, 58, 15, 13.5
    points = [
        (x + rx * math.cos(2 * math.pi * i / count), ry * math.sin(2 * math.pi * i / count) - 24)
        for i in range(count)
    ]
    arcs = [f"A{bump},{bump} 0 0 1 {px:.1f},{py:.1f}" for px, py in (*points[1:], points[0])]
    cloud = f"M{points[0][0]:.1f},{points[0][1]:.1f} " + " ".join(arcs) + " Z"
    return _outlined(cloud, colour, _edge(colour))


def _bob_behind(w: Number, x: Number, colour: str) -> str:
    shape = (
        f"M{x - w - 13},-10 C{x - w - 13},-92 {x + w + 13},-92 {x + w + 13},-10 "
        f"L{x + w + 17},40 Q{x + w},56 {x + w - 14},50 H{x - w + 14} "
        f"Q{x - w},56 {x - w - 17},40 Z"
    )
    return _outlined(shape, shade(colour, 0.84), _edge(colour))


def _straight_behind(w: Number, x: Number, colour: str) -> str:
    shape = (
        f"M{x - w - 9},-10 C{x - w - 9},-90 {x + w + 9},-90 {x + w + 9},-10 "
        f"L{x + w + 13},112 H{x - w - 13} Z"
    )
    return _outlined(shape, shade(colour, 0.84), _edge(colour))


def _wavy_behind(w: Number, x: Number, colour: str) -> str:
    down = "q15,10 1,24 q-14,12 3,26 " * 2
    up = "q-14,-12 3,-26 q15,-10 1,-24 " * 2
    shape = (
        f"M{x - w - 8},-14 C{x - w - 14},-96 {x + w + 14},-96 {x + w + 8},-14 {down}"
        f"H{x - w - 16} {up} Z"
    )
    return _outlined(shape, shade(colour, 0.84), _edge(colour))


def _ponytail_behind(w: Number, x: Number, colour: str) -> str:
    side = x + w
    shape = (
        f"M{side - 14},-56 C{side + 18},-78 {side + 44},-50 {side + 36},-10 "
        f"C{side + 32},20 {side + 40},34 {side + 26},56 C{side + 14},40 {side + 12},10 "
        f"{side + 12},-12 C{side + 12},-30 {side + 4},-38 {side - 14},-38 Z"
    )
    return _outlined(shape, colour, _edge(colour)) + ellipse(side - 3, -50, 7, 9, "#d8504a")


def _pigtails_behind(w: Number, x: Number, colour: str) -> str:
    out = []
    for side in (-1, 1):
        at = x + side * (w + 4)
        shape = (
            f"M{at},-34 C{at + side * 34},-46 {at + side * 44},-6 {at + side * 30},30 "
            f"Q{at + side * 26},50 {at + side * 14},56 Q{at + side * 2},20 {at},-14 Z"
        )
        out += [_outlined(shape, colour, _edge(colour))]
        out += [ellipse(at + side * 4, -26, 7, 8, "#4f86c6")]
    return "".join(out)


def _bun_behind(w: Number, x: Number, colour: str) -> str:
    knot = ellipse(x, -76, 20, 18, colour, stroke=_edge(colour), width=2.4)
    return knot + stroke(f"M{x - 11},-80 Q{x},-70 {x + 11},-80", _edge(colour), 2)


_BEHIND: Mapping[str, Style] = {
    "afro": _afro_behind,
    "bob": _bob_behind,
    "long straight": _straight_behind,
    "long wavy": _wavy_behind,
    "ponytail": _ponytail_behind,
    "pigtails": _pigtails_behind,
    "bun": _bun_behind,
}


# --- over the head ---------------------------------------------------------------------------


def _cap(w: Number, wider: Number, top: Number, low: Number, hairline: str) -> str:
    """An outline over the top of the head, closed along `hairline` from right to left."""
    out, peak = w + wider, 1.1 * top
    return f"M{-out},{low} C{-out},{peak:.1f} {out},{peak:.1f} {out},{low} {hairline} Z"


def _bald(w: Number, x: Number, colour: str) -> str:
    return ellipse(x - 12, -46, 13, 6, "#ffffff", opacity=0.30)


def _cropped(w: Number, x: Number, colour: str) -> str:
    line = f"L{w - 3},-24 Q{w - 6},-38 {x + 20},-41 H{x - 20} Q{-w + 6},-38 {-w + 3},-24"
    return _outlined(_cap(w, 1.5, -66, -16, line), colour, _edge(colour))


def _side_parted(w: Number, x: Number, colour: str) -> str:
    line = (
        f"L{w - 4},-18 Q{w - 8},-34 {x + 8},-34 Q{x - 14},-36 {x - 20},-56 "
        f"Q{-w + 4},-44 {-w + 4},-18"
    )
    parting = stroke(f"M{x - 20},-56 Q{x - 18},-66 {x - 10},-72", _edge(colour), 2.2)
    return _outlined(_cap(w, 6, -84, -4, line), colour, _edge(colour)) + parting


def _quiff(w: Number, x: Number, colour: str) -> str:
    line = f"L{w - 3},-22 Q{w - 8},-40 {x},-40 Q{-w + 8},-40 {-w + 3},-22"
    swoosh = (
        f"M{x - 36},-42 C{x - 48},-86 {x - 6},-104 {x + 40},-90 C{x + 26},-86 {x + 46},-74 "
        f"{x + 40},-46 C{x + 20},-36 {x - 14},-36 {x - 36},-42 Z"
    )
    lines = stroke(f"M{x - 20},-46 C{x - 24},-72 {x},-82 {x + 22},-84", _edge(colour), 2.2)
    cap = _outlined(_cap(w, 2, -66, -10, line), shade(colour, 0.80), _edge(colour))
    return cap + _outlined(swoosh, colour, _edge(colour)) + lines


def _curly(w: Number, x: Number, colour: str) -> str:
    outer = [
        (-(w + 9) * math.cos(math.pi * i / 8), -8 - 64 * math.sin(math.pi * i / 8))
        for i in range(9)
    ]
    half = [(-w + 8, -12), (-w + 16, -34), (x - 10, -40)]
    inner = [(w - 8, -12), (w - 16, -34), (x + 10, -40), *reversed(half)]
    arcs = [f"A11,11 0 0 1 {px:.1f},{py:.1f}" for px, py in outer[1:]]
    arcs += [f"A10,10 0 0 1 {px:.1f},{py:.1f}" for px, py in inner]
    band = f"M{outer[0][0]:.1f},{outer[0][1]:.1f} " + " ".join(arcs) + " Z"
    places = ((-26, -56), (0, -64), (26, -56), (-12, -48), (14, -48))
    curls = [stroke(f"M{x + dx - 6},{y} q6,-9 12,0", _edge(colour), 2) for dx, y in places]
    return _outlined(band, colour, _edge(colour)) + "".join(curls)


def _afro(w: Number, x: Number, colour: str) -> str:
    line = f"L{w - 1},-20 Q{w - 6},-40 {x},-42 Q{-w + 6},-40 {-w + 1},-20"
    return path(_cap(w, 9, -84, -4, line), colour)


def _bob(w: Number, x: Number, colour: str) -> str:
    line = (
        f"L{w - 1},34 Q{w + 1},0 {w - 8},-24 H{x + 4} L{x},-30 L{x - 4},-24 H{-w + 8} "
        f"Q{-w - 1},0 {-w + 1},34"
    )
    strands = [
        stroke(f"M{x + d},-50 Q{x + 1.2 * d},-36 {x + 1.2 * d},-28", _edge(colour), 2)
        for d in (-24, 24)
    ]
    return _outlined(_cap(w, 11, -86, 42, line), colour, _edge(colour)) + "".join(strands)


def _long_straight(w: Number, x: Number, colour: str) -> str:
    line = f"L{w - 4},46 Q{w - 2},-10 {x + 22},-36 L{x},-58 L{x - 22},-36 Q{-w + 2},-10 {-w + 4},46"
    parting = stroke(f"M{x},-58 V-70", _edge(colour), 2.2)
    return _outlined(_cap(w, 8, -84, 60, line), colour, _edge(colour)) + parting


def _long_wavy(w: Number, x: Number, colour: str) -> str:
    line = (
        f"L{w},30 Q{w - 14},10 {w - 4},-8 Q{w - 16},-34 {x + 16},-52 Q{x - 10},-32 "
        f"{-w + 14},-24 Q{-w + 2},-8 {-w + 8},8 Q{-w + 6},20 {-w},30"
    )
    parting = stroke(f"M{x + 16},-52 Q{x + 18},-64 {x + 10},-72", _edge(colour), 2.2)
    return _outlined(_cap(w, 9, -88, 40, line), colour, _edge(colour)) + parting


def _combed_back(w: Number, x: Number, colour: str) -> str:
    line = f"L{w - 2},-16 Q{w - 6},-44 {x},-48 Q{-w + 6},-44 {-w + 2},-16"
    strands = [
        stroke(f"M{x + d},-47 Q{x + 0.7 * d},-56 {x + 0.35 * d},-66", _edge(colour), 1.8)
        for d in (-24, 0, 24)
    ]
    return _outlined(_cap(w, 3, -74, -8, line), colour, _edge(colour)) + "".join(strands)


def _pigtails(w: Number, x: Number, colour: str) -> str:
    line = (
        f"L{w - 3},-16 Q{w - 6},-34 {x + 18},-42 L{x},-58 L{x - 18},-42 Q{-w + 6},-34 {-w + 3},-16"
    )
    parting = stroke(f"M{x},-58 V-68", _edge(colour), 2.2)
    return _outlined(_cap(w, 4, -76, -6, line), colour, _edge(colour)) + parting


_FRONT: Mapping[str, Style] = {
    "bald": _bald,
    "cropped": _cropped,
    "side-parted": _side_parted,
    "quiff": _quiff,
    "curly": _curly,
    "afro": _afro,
    "bob": _bob,
    "long straight": _long_straight,
    "long wavy": _long_wavy,
    "ponytail": _combed_back,
    "bun": _combed_back,
    "pigtails": _pigtails,
}
