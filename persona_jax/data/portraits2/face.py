"""The face of a drawn person as SVG: head, eyes, nose, mouth, beard, glasses.

Coordinates: the picture is 200 wide and high, (0, 0) in its middle, y downwards. The head is about
100 wide and 120 high. Features that turn with the head are placed through :class:`Pose`.
"""

import dataclasses
from collections.abc import Mapping

from persona_jax.data.portraits2.svg import (
    Number,
    ellipse,
    fade,
    gradient,
    mix,
    path,
    shade,
    stroke,
)

INK = "#3a2a2a"
_SKIN = ("#ffe2c8", "#f2c6a0", "#d9a071", "#a9703f", "#74452b", "#4d2f21")
HAIR = {
    "black": "#2e2830",
    "brown": "#74462a",
    "ginger": "#cf6a2c",
    "blond": "#edcb74",
    "silver": "#c3c6ce",
    "pink": "#e07fa6",
}
_IRIS = {"brown": "#6b3e1f", "green": "#3f9a5a", "blue": "#3b8fdc", "amber": "#e09a1e"}
# half width of the jaw, height of the chin, and how square the corner between them is
_SHAPES = {
    "round": (43, 54, 0.62),
    "oval": (33, 62, 0.60),
    "square": (47, 57, 0.95),
    "pointed": (23, 65, 0.45),
}


@dataclasses.dataclass(frozen=True)
class Pose:
    """How far the head is turned: yaw in [−1, 1] (1 is a profile), pitch in [−1, 1]."""

    yaw: Number
    pitch: Number

    def x(self, x: Number, depth: Number = 1.0) -> Number:
        """Where something at `x` on an unturned face goes; `depth` 1 is the level of the eyes."""
        return x * (1 - 0.28 * abs(self.yaw)) + 22 * self.yaw * depth

    def y(self, y: Number) -> Number:
        """The same for heights."""
        return y + 3.5 * self.pitch

    def width(self, side: Number) -> Number:
        """How much narrower a feature on one side (−1, 1) looks: the far side is foreshortened."""
        return 1 - 0.45 * max(0.0, side * self.yaw) - 0.08 * abs(self.yaw)


def skin_colour(tone: Number) -> str:
    """From light to dark: `tone` 0 to 1."""
    place = tone * (len(_SKIN) - 1)
    low = min(int(place), len(_SKIN) - 2)
    return mix(_SKIN[low], _SKIN[low + 1], place - low)


def half_width(who: Mapping) -> Number:
    """Of the head, at the cheekbones."""
    return 41 + 13 * who["face_width"]


def outline(who: Mapping) -> str:
    """The head's outline as path data."""
    jaw, chin, corner = _SHAPES[who["face_shape"]]
    w = half_width(who)
    jaw *= w / 47
    low = -8 + corner * (chin + 8)
    return (
        f"M{-w},-10 C{-w},-74 {w},-74 {w},-10 C{w},{low:.1f} {jaw * 1.0:.1f},{chin} "
        f"{jaw * 0.42:.1f},{chin} L{-jaw * 0.42:.1f},{chin} "
        f"C{-jaw:.1f},{chin} {-w},{low:.1f} {-w},-10 Z"
    )


def chin(who: Mapping) -> Number:
    """Height of the chin."""
    return _SHAPES[who["face_shape"]][1]


def ears(who: Mapping, pose: Pose, skin: str) -> str:
    """Both ears; the far one hides behind a turned head."""
    out = []
    for side, x in _ear_places(who, pose):
        out.append(ellipse(x, 2, 9, 14, skin, stroke=shade(skin, 0.72), width=2))
        out.append(ellipse(x + side, 3, 4, 8, shade(skin, 0.82)))
    return "".join(out)


def earrings(who: Mapping, pose: Pose) -> str:
    """Below the ears, and over whatever hair hides those."""
    out = []
    for side, x in _ear_places(who, pose):
        if who["earrings"] == "pearls":
            out.append(ellipse(x + side, 18, 5.5, 5.5, "#ffffff", stroke="#b9b2bd", width=1.6))
        elif who["earrings"] == "hoops":
            out.append(ellipse(x + side, 25, 8.5, 10, "none", stroke="#e9b52e", width=3.6))
    return "".join(out)


def _ear_places(who: Mapping, pose: Pose) -> list[tuple[int, Number]]:
    """Side (−1, 1) and middle of each ear in sight."""
    sides = (side for side in (-1, 1) if side * pose.yaw <= 0.5)
    return [(side, side * (half_width(who) + 1) - 9 * pose.yaw) for side in sides]


def head(who: Mapping, pose: Pose, skin: str, light: Number) -> str:
    """The head, softly lit from `light` (−1: left, 1: right), with cheeks and marks."""
    shape = outline(who)
    out = [
        path(shape, skin, stroke=shade(skin, 0.66), width=2.4),
        gradient("lit", 45 * light, -30, 75, "#fff3dd", 0.38),
        path(shape, "url(#lit)"),
        gradient("dim", -60 * light, 60, 80, shade(skin, 0.5), 0.22),
        path(shape, "url(#dim)"),
    ]
    rosy = who["mark"] == "rosy cheeks"
    for side in (-1, 1):
        x, y = pose.x(30 * side, 0.8), pose.y(25)
        name = f"cheek{side + 1}"
        blush = "#f0566a" if rosy else mix(skin, "#e8705f", 0.55)
        out.append(gradient(name, x, y, 16 if rosy else 13, blush, 0.85 if rosy else 0.32))
        out.append(ellipse(x, y, 16 * pose.width(side), 13, f"url(#{name})"))
    if who["mark"] == "freckles":
        spots = ((20, 15), (27, 20), (34, 15), (24, 27), (33, 27), (14, 22), (39, 22), (29, 13))
        for side in (-1, 1):
            for x, y in spots:
                out.append(ellipse(pose.x(side * x, 0.8), pose.y(y), 2.1, 2.1, shade(skin, 0.58)))
    elif who["mark"].endswith("mole"):
        side = -1 if who["mark"] == "left mole" else 1
        out.append(ellipse(pose.x(side * 27, 0.8), pose.y(29), 3.6, 3.6, shade(skin, 0.32)))
    return "".join(out)


def eyes(who: Mapping, photo: Mapping, pose: Pose, skin: str) -> str:
    """Both eyes and brows."""
    size, apart = 0.90 + 0.45 * who["eye_size"], 19.5 + 6.5 * who["eye_spacing"]
    return "".join(
        _eye(who, photo, pose, skin, side, pose.x(side * apart), size) for side in (-1, 1)
    ) + "".join(_brow(who, photo, pose, side, pose.x(side * apart), size) for side in (-1, 1))


def _eye(who, photo, pose, skin, side, x, size) -> str:
    opened, y = photo["eyes_open"], pose.y(-2)
    rx = {"round": 11.5, "almond": 13.5, "sleepy": 12.5}[who["eye_shape"]] * size * pose.width(side)
    ry = {"round": 12.0, "almond": 8.5, "sleepy": 10.5}[who["eye_shape"]] * size * opened
    if opened < 0.5:  # laughing: closed, an arc
        arc = f"M{x - rx:.1f},{y + 3:.1f} Q{x:.1f},{y - 10 * size:.1f} {x + rx:.1f},{y + 3:.1f}"
        return stroke(arc, INK, 3.4)
    lift = {"round": 0.0, "almond": 3.0, "sleepy": -1.5}[who["eye_shape"]] * size
    inner, outer = (x - side * rx, y + lift), (x + side * rx, y - lift)
    almond = (
        f"M{inner[0]:.1f},{inner[1]:.1f} C{x - side * rx * 0.7:.1f},{y - ry * 1.3:.1f} "
        f"{x + side * rx * 0.6:.1f},{y - ry * 1.35:.1f} {outer[0]:.1f},{outer[1]:.1f} "
        f"C{x + side * rx * 0.7:.1f},{y + ry * 1.25:.1f} {x - side * rx * 0.6:.1f},"
        f"{y + ry * 1.3:.1f} {inner[0]:.1f},{inner[1]:.1f} Z"
    )
    clip = f"eye{side + 1}"
    iris, gaze = _IRIS[who["eye_colour"]], x + 1.5 * pose.yaw
    r = 7.4 * size
    out = [
        f'<clipPath id="{clip}"><path d="{almond}"/></clipPath>',
        path(almond, "#ffffff"),
        f'<g clip-path="url(#{clip})">',
        ellipse(gaze, y, r * pose.width(side), r, iris, stroke=shade(iris, 0.5), width=1.6),
        ellipse(gaze, y, 3.4 * size * pose.width(side), 3.4 * size, "#1d1720"),
        ellipse(gaze + 2.6, y - 3, 2.2 * size, 2.2 * size, "#ffffff"),
    ]
    if who["eye_shape"] == "sleepy":  # a heavy lid over the upper half
        lid = f"M{x - 20:.1f},{y - 22:.1f} h40 V{y - 2.5 * opened:.1f} h-40 Z"
        out.append(path(lid, shade(skin, 0.80)))
    out.append("</g>")
    upper = almond.split(" C")[0] + " C" + almond.split(" C")[1].split(" Z")[0]
    out.append(stroke(upper, INK, 3.0))
    if who["eye_shape"] == "sleepy":
        edge = f"M{x - rx * 0.9:.1f},{y - 2.5 * opened:.1f} H{x + rx * 0.9:.1f}"
        out.append(stroke(edge, INK, 2.6))
    return "".join(out)


def _brow(who, photo, pose, side, x, size) -> str:
    y = pose.y(-23) - 5 * photo["brow_raise"]
    half = 14 * pose.width(side)
    worried = 5 * max(0.0, -photo["smile"])  # inner ends rise
    inner, outer = x - side * half, x + side * half
    colour = shade(HAIR[who["hair_colour"]], 0.66)
    kind = who["brows"]
    if kind == "angled":
        line = (
            f"M{inner:.1f},{y + 3 - worried:.1f} L{x + side * half * 0.35:.1f},{y - 6:.1f} "
            f"L{outer:.1f},{y + 1:.1f}"
        )
        return stroke(line, colour, 4.2)
    rise = {"thin": 3, "thick": 2, "round": 13}[kind]
    width = {"thin": 2.2, "thick": 8.0, "round": 4.0}[kind]
    line = f"M{inner:.1f},{y + 1 - worried:.1f} Q{x:.1f},{y - rise:.1f} {outer:.1f},{y + 1:.1f}"
    return stroke(line, colour, width)


def nose(who: Mapping, pose: Pose, skin: str) -> str:
    """By kind, drawn with few lines."""
    x, dark = pose.x(0, 1.35), shade(skin, 0.58)
    y = pose.y(22)
    kind = who["nose"]
    if kind == "button":
        return ellipse(x, y - 4, 6, 5, mix(skin, "#e8705f", 0.45)) + stroke(
            f"M{x - 5:.1f},{y - 2:.1f} Q{x:.1f},{y + 3:.1f} {x + 5:.1f},{y - 2:.1f}", dark, 2.4
        )
    side = 1 if pose.yaw >= 0 else -1
    if kind == "long":
        line = f"M{x - side * 3:.1f},{y - 24:.1f} L{x + side * 6:.1f},{y + 4:.1f} h{-side * 10}"
        return stroke(line, dark, 2.6)
    if kind == "broad":
        fill = ellipse(x, y - 1, 13, 7.5, mix(skin, "#d8604f", 0.28), stroke=dark, width=2.0)
        holes = ellipse(x - 5.5, y + 1.5, 2.4, 1.8, dark) + ellipse(
            x + 5.5, y + 1.5, 2.4, 1.8, dark
        )
        return fill + holes
    hook = (
        f"M{x - side * 3:.1f},{y - 20:.1f} q{side * 13},6 {side * 11},20 "
        f"q{-side * 2},7 {-side * 11},3"
    )
    return path(hook, mix(skin, "#d8604f", 0.22), stroke=dark, width=2.6)


def mouth(who: Mapping, photo: Mapping, pose: Pose, skin: str) -> str:
    """Lips around an open or a closed mouth, along one curve."""
    x, y = pose.x(0, 1.1), pose.y(40)
    smile, opened = photo["smile"], photo["mouth_open"]
    happy = max(0.0, smile)
    half = (13 + 7 * happy) * (1 - 0.35 * opened * (1 - happy)) * (1 - 0.15 * abs(pose.yaw))
    bend = 9 * smile
    full = who["lips"] == "full"
    lip = mix(skin, "#c2304a", 0.72 if full else 0.45)
    left, right = f"{x - half:.1f},{y - bend * 0.55:.1f}", f"{x + half:.1f},{y - bend * 0.55:.1f}"
    width = 7.5 if full else 3.2
    if opened > 0.15:
        top, low = y + bend * 0.5 - 9 * opened * (1 - happy), y + bend * 0.6 + 24 * opened
        hole = f"M{left} Q{x:.1f},{top:.1f} {right} Q{x:.1f},{low:.1f} {left} Z"
        out = [path(hole, "#6d1f2a", stroke=lip, width=width * 0.8)]
        if happy > 0.3:
            teeth = f"M{left} Q{x:.1f},{top:.1f} {right} Q{x:.1f},{top + 15:.1f} {left} Z"
            out.append(path(teeth, "#ffffff"))
        else:
            out.append(ellipse(x, y + 8 * opened, half * 0.5, 4 * opened, "#d8606a"))
        return "".join(out)
    curve = f"M{left} Q{x:.1f},{y + bend * 1.1:.1f} {right}"
    out = [stroke(curve, lip, width)] if full else []
    out.append(stroke(curve, shade(lip, 0.55) if full else shade(skin, 0.38), 2.4))
    return "".join(out)


def beard(who: Mapping, pose: Pose) -> str:
    """What grows below the mouth; the moustache lies over it (:func:`moustache`)."""
    kind, colour = who["beard"], shade(HAIR[who["hair_colour"]], 0.86)
    if kind not in ("goatee", "short beard", "long beard"):
        return ""
    x, y, low = pose.x(0, 0.9), pose.y(40), chin(who)
    edge = shade(colour, 0.72)
    if kind == "goatee":
        shape = (
            f"M{x - 13:.1f},{y + 7:.1f} Q{x:.1f},{y + 13:.1f} {x + 13:.1f},{y + 7:.1f} "
            f"Q{x + 12:.1f},{low + 12:.1f} {x:.1f},{low + 14:.1f} "
            f"Q{x - 12:.1f},{low + 12:.1f} {x - 13:.1f},{y + 7:.1f} Z"
        )
        return path(shape, colour, stroke=edge, width=1.8)
    w, drop = half_width(who), 6 if kind == "short beard" else 26
    inner = pose.y(20)
    shape = (
        f"M{-w - 1},2 C{-w},{low * 0.75:.1f} {-w * 0.75:.1f},{low + drop} 0,{low + drop + 2} "
        f"C{w * 0.75:.1f},{low + drop} {w},{low * 0.75:.1f} {w + 1},2 "
        f"Q{w * 0.78:.1f},{inner:.1f} {x + 22:.1f},{inner + 8:.1f} "
        f"Q{x:.1f},{inner + 2:.1f} {x - 22:.1f},{inner + 8:.1f} "
        f"Q{-w * 0.78:.1f},{inner:.1f} {-w - 1},2 Z"
    )
    return path(shape, colour, stroke=edge, width=1.8)


def moustache(who: Mapping, pose: Pose) -> str:
    """Over the upper lip."""
    if who["beard"] in ("none", "goatee"):
        return ""
    x, y = pose.x(0, 1.15), pose.y(33)
    colour = shade(HAIR[who["hair_colour"]], 0.80)
    shape = (
        f"M{x:.1f},{y - 3:.1f} C{x + 8:.1f},{y - 7:.1f} {x + 18:.1f},{y - 2:.1f} {x + 24:.1f},"
        f"{y + 5:.1f} C{x + 15:.1f},{y + 6:.1f} {x + 6:.1f},{y + 6:.1f} {x:.1f},{y + 3:.1f} "
        f"C{x - 6:.1f},{y + 6:.1f} {x - 15:.1f},{y + 6:.1f} {x - 24:.1f},{y + 5:.1f} "
        f"C{x - 18:.1f},{y - 2:.1f} {x - 8:.1f},{y - 7:.1f} {x:.1f},{y - 3:.1f} Z"
    )
    return path(shape, colour, stroke=shade(colour, 0.7), width=1.4)


def glasses(who: Mapping, pose: Pose) -> str:
    """Glasses that somebody always wears."""
    kind = who["glasses"]
    if kind == "none":
        return ""
    apart, y, out = 19.5 + 6.5 * who["eye_spacing"], pose.y(-1), []
    frame = {"round": "#c8963c", "square": "#26222b", "half-moon": "#8e2f3f"}[kind]
    edges = []
    for side in (-1, 1):
        x, w = pose.x(side * apart), 19 * pose.width(side)
        edges.append((x - side * w, x + side * w))
        if kind == "round":
            lens = ellipse(x, y, w, 19, "#ffffff", stroke=frame, width=3, opacity=0.16)
        elif kind == "square":
            data = f"M{x - w:.1f},{y - 15:.1f} h{2 * w:.1f} v29 h{-2 * w:.1f} Z"
            lens = path(data, "#ffffff", stroke=frame, width=5, opacity=0.16)
        else:
            data = f"M{x - w:.1f},{y + 3:.1f} h{2 * w:.1f} a{w:.1f},15 0 0 1 {-2 * w:.1f},0 Z"
            lens = path(data, "#ffffff", stroke=frame, width=3.4, opacity=0.16)
        out.append(lens)
    top = y + 3 if kind == "half-moon" else y - 3
    bridge = (
        f"M{edges[0][0]:.1f},{top:.1f} Q{pose.x(0):.1f},{top - 6:.1f} {edges[1][0]:.1f},{top:.1f}"
    )
    out.append(stroke(bridge, frame, 3))
    w = half_width(who)
    for side, (_, x) in zip((-1, 1), edges, strict=True):
        if side * pose.yaw < 0.5:
            out.append(stroke(f"M{x:.1f},{top:.1f} L{side * w:.1f},{top - 2:.1f}", frame, 3))
    return "".join(out)


def neck(who: Mapping, skin: str) -> str:
    """The neck, shaded by the chin."""
    shape = "M-19,40 V74 Q-19,84 -30,88 H30 Q19,84 19,74 V40 Z"
    return path(shape, shade(skin, 0.86)) + fade(
        ellipse(0, chin(who) + 4, 26, 12, shade(skin, 0.6)), 0.5
    )
