"""What hides a face on a photo, and what somebody wears below it, as SVG."""

from collections.abc import Mapping

from persona_jax.data.portraits2.face import Pose, chin, half_width
from persona_jax.data.portraits2.svg import ellipse, path, shade, stroke


def shoulders(colour: str) -> str:
    """Clothes with a collar."""
    shape = "M-112,112 C-104,84 -62,78 -32,70 Q0,92 32,70 C62,78 104,84 112,112 Z"
    edge = shade(colour, 0.70)
    return path(shape, colour, stroke=edge, width=2.4) + stroke("M-32,71 Q0,97 32,71", edge, 4.5)


def hat(who: Mapping, pose: Pose, colour: str) -> str:
    """A woollen hat down to the brows' height."""
    w, x, edge = half_width(who) + 7, -3 * pose.yaw, shade(colour, 0.66)
    dome = f"M{x - w},-30 C{x - w},-108 {x + w},-108 {x + w},-30 Z"
    band = f"M{x - w - 4},-46 Q{x},-58 {x + w + 4},-46 V-27 Q{x},-38 {x - w - 4},-27 Z"
    ribs = "".join(
        stroke(f"M{x + d * w:.1f},{-50 - 3 * (1 - abs(d)):.1f} v18", edge, 1.8)
        for d in (-0.66, -0.33, 0, 0.33, 0.66)
    )
    ball = ellipse(x, -90, 10, 9, shade(colour, 0.92), stroke=edge, width=2.2)
    return (
        ball
        + path(dome, colour, stroke=edge, width=2.4)
        + path(band, shade(colour, 0.90), stroke=edge, width=2.2)
        + ribs
    )


def sunglasses(who: Mapping, pose: Pose) -> str:
    """Large and dark; the same on everybody."""
    y, out, w = pose.y(-1), [], half_width(who)
    for side in (-1, 1):
        x, wide = pose.x(23 * side), 21.5 * pose.width(side)
        lens = (
            f"M{x - wide:.1f},{y - 14:.1f} H{x + wide:.1f} Q{x + wide:.1f},{y + 20:.1f} "
            f"{x:.1f},{y + 20:.1f} Q{x - wide:.1f},{y + 20:.1f} {x - wide:.1f},{y - 14:.1f} Z"
        )
        out.append(path(lens, "#1b1a22", stroke="#1b1a22", width=4))
        out.append(stroke(f"M{x - wide * 0.6:.1f},{y + 5:.1f} l9,-13", "#6d7488", 3.4))
        if side * pose.yaw < 0.5:
            end = x + side * wide
            out.append(stroke(f"M{end:.1f},{y - 10:.1f} L{side * w:.1f},{y - 6:.1f}", "#1b1a22", 4))
    out.append(stroke(f"M{pose.x(-4):.1f},{y - 9:.1f} H{pose.x(4):.1f}", "#1b1a22", 6))
    return "".join(out)


def scarf(who: Mapping, colour: str) -> str:
    """Wound around the neck, up to the nose."""
    w, low, edge = half_width(who) + 9, chin(who) + 22, shade(colour, 0.66)
    top = f"M{-w},24 Q0,40 {w},24 C{w + 8},52 {w + 2},{low} {w - 8},{low + 8} "
    shape = top + f"Q0,{low + 22} {-w + 8},{low + 8} C{-w - 2},{low} {-w - 8},52 {-w},24 Z"
    folds = stroke(f"M{-w + 4},44 Q0,62 {w - 4},44", edge, 2.2)
    folds += stroke(f"M{-w + 6},64 Q0,84 {w - 6},64", edge, 2.2)
    return path(shape, colour, stroke=edge, width=2.4) + folds


def hand(pose: Pose, skin: str) -> str:
    """A raised hand over nose and mouth."""
    x, edge, out = pose.x(0, 0.8), shade(skin, 0.62), []
    palm = f"M{x - 22},36 Q{x - 30},76 {x - 16},112 H{x + 26} Q{x + 34},74 {x + 24},36 Z"
    out.append(path(palm, skin, stroke=edge, width=2.4))
    for dx, top in ((-19, 19), (-6.5, 12), (6.5, 11), (19, 18)):
        finger = f"M{x + dx - 6.5},62 V{top + 6} a6.5,6.5 0 0 1 13,0 V62"
        out.append(path(finger, skin, stroke=edge, width=2.2))
    out.append(path(f"M{x - 19},58 H{x + 22} V80 H{x - 19} Z", skin))
    return "".join(out)
