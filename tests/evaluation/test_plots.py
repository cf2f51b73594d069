"""Positions of points in plots."""

import xml.etree.ElementTree as ElementTree

from persona_jax.evaluation import plots


def test_points_are_in_proportion():
    lines = {"named <b>": {1: 0.0, 3: 0.25, 9: 0.5}, "chance": {1: 0.03, 9: 0.03}}
    root = ElementTree.fromstring(plots.line_plot(lines, title="t", x_label="photos", top=0.5))
    space = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{space}circle")
    assert len(circles) == 5
    (x1, y1), (x3, y3), (x9, y9) = [(float(c.get("cx")), float(c.get("cy"))) for c in circles[:3]]
    assert abs((x3 - x1) / (x9 - x1) - 2 / 8) < 1e-3
    assert (y1, y9) == (plots.HEIGHT - plots.BOTTOM, plots.TOP)
    assert abs(y3 - (y1 + y9) / 2) < 0.1
    words = [t.text for t in root.findall(f"{space}text")]
    assert {"named <b>", "chance", "1", "3", "9", "photos", "t"} <= set(words)
