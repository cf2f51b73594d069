"""A line plot as SVG text, for reports, without a plotting library."""

from collections.abc import Mapping
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 300, 56, 120, 34, 44
COLOURS = ("#1f5fbf", "#c2410c", "#2f855a", "#6b46c1", "#b7791f", "#4a5568")


def line_plot(
    lines: Mapping[str, Mapping[int | float, float]], *, title: str, x_label: str, top: int | float
) -> str:
    """Draws lines over a shared x axis, with y from 0 to `top`.

    Args:
      lines: name → {x: y}; every x becomes a tick; a y that is NaN is omitted.
      title, x_label: texts.
      top: the upper end of the y axis.

    Returns:
      An SVG document.
    """
    xs = sorted({x for line in lines.values() for x in line})
    low, high = xs[0], xs[-1] if xs[-1] > xs[0] else xs[0] + 1

    def across(x: int | float) -> float:
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def up(y: int | float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    def text(
        x: int | float, y: int | float, words: str, anchor: str = "middle", colour: str = "#333"
    ) -> str:
        attributes = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
        return f"<text {attributes}>{escape(words)}</text>"

    parts = [text(WIDTH / 2, 18, title), text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label)]
    for i in range(5):
        y = top * i / 4
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"'
        parts += [f'<line {ends} stroke="#ddd"/>', text(LEFT - 6, up(y) + 4, f"{y:.3g}", "end")]
    parts += [text(across(x), HEIGHT - BOTTOM + 16, f"{x:g}") for x in xs]
    for (name, line), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
        points = [(across(x), up(y)) for x, y in sorted(line.items()) if y == y]
        if not points:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(text(points[-1][0] + 8, points[-1][1] + 4, name, "start", colour))
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    style = 'font-family="sans-serif" font-size="12"'
    body = "\n".join(['<rect width="100%" height="100%" fill="white"/>', *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'
