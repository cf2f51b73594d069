"""The few pieces of SVG that portraits are made of, as strings."""

from collections.abc import Sequence

Number = float | int


def ellipse(
    cx: Number,
    cy: Number,
    rx: Number,
    ry: Number,
    fill: str,
    *,
    stroke: str = "none",
    width: Number = 0,
    opacity: Number = 1,
) -> str:
    """A filled ellipse; `opacity` is the filling's."""
    return (
        f'<ellipse cx="{cx:.1f}" cy="{cy:.1f}" rx="{max(rx, 0.1):.1f}" ry="{max(ry, 0.1):.1f}" '
        f'fill="{fill}" fill-opacity="{opacity}" stroke="{stroke}" stroke-width="{width}"/>'
    )


def path(
    data: str, fill: str, *, stroke: str = "none", width: Number = 0, opacity: Number = 1
) -> str:
    """A filled outline; `opacity` is the filling's."""
    return (
        f'<path d="{data}" fill="{fill}" fill-opacity="{opacity}" stroke="{stroke}" '
        f'stroke-width="{width}" stroke-linejoin="round"/>'
    )


def stroke(data: str, colour: str, width: Number) -> str:
    """A line with round ends."""
    return (
        f'<path d="{data}" fill="none" stroke="{colour}" stroke-width="{width}" '
        'stroke-linecap="round" stroke-linejoin="round"/>'
    )


def gradient(
    name: str, cx: Number, cy: Number, radius: Number, colour: str, opacity: Number
) -> str:
    """A radial gradient named `name`, from `opacity` in the middle to nothing at `radius`."""
    return (
        f'<radialGradient id="{name}" gradientUnits="userSpaceOnUse" cx="{cx:.1f}" cy="{cy:.1f}" '
        f'r="{radius:.1f}"><stop offset="0" stop-color="{colour}" stop-opacity="{opacity}"/>'
        f'<stop offset="1" stop-color="{colour}" stop-opacity="0"/></radialGradient>'
    )


def group(content: Sequence[str] | str, transform: str) -> str:
    """Pieces that are moved together."""
    return f'<g transform="{transform}">{"".join(content)}</g>'


def fade(content: str, opacity: Number) -> str:
    """Pieces that are seen through."""
    return f'<g opacity="{opacity:.3f}">{content}</g>'


def mix(one: str, other: str, share: Number) -> str:
    """A colour between two ("#rrggbb"): `share` of the other."""
    a, b = _numbers(one), _numbers(other)
    return _name([x + (y - x) * share for x, y in zip(a, b, strict=True)])


def shade(colour: str, factor: Number) -> str:
    """A darker colour, `factor` of its brightness."""
    return _name([x * factor for x in _numbers(colour)])


def _numbers(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _name(numbers: Sequence[float]) -> str:
    return "#" + "".join(f"{min(255, max(0, round(x))):02x}" for x in numbers)
