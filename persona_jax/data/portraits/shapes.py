"""Shapes as signed distances (negative inside), and their layering. All take arrays of points.

Distances are in units of the picture's half side and exact or nearly so around zero, which is
where they count: coverage rises from 0 to 1 across one pixel (Quilez, "2D distance functions").
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Plane = Float[Array, "S S"]
Scalar = Float[Array, ""] | float | int | np.floating


def _length(u: Plane, v: Plane) -> Plane:
    return jnp.sqrt(u * u + v * v + 1e-12)


def ellipse(x: Plane, y: Plane, cx: Scalar, cy: Scalar, rx: Scalar, ry: Scalar) -> Plane:
    """An ellipse about (cx, cy); exact to first order in the distance from its edge."""
    u, v = (x - cx) / rx, (y - cy) / ry
    radius = jnp.sqrt(u * u + v * v + 1e-9)
    slope = jnp.sqrt((u / rx) ** 2 + (v / ry) ** 2 + 1e-9)
    return radius * (radius - 1.0) / slope


def box(
    x: Plane, y: Plane, cx: Scalar, cy: Scalar, hw: Scalar, hh: Scalar, round_: Scalar
) -> Plane:
    """A box of half width hw and half height hh, corners rounded by `round_`."""
    u, v = jnp.abs(x - cx) - hw + round_, jnp.abs(y - cy) - hh + round_
    outside = _length(jnp.maximum(u, 0.0), jnp.maximum(v, 0.0))
    return outside + jnp.minimum(jnp.maximum(u, v), 0.0) - round_


def segment(x: Plane, y: Plane, start: tuple, end: tuple, radius: Scalar) -> Plane:
    """A stroke of the given radius from `start` to `end`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    share = ((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy + 1e-9)
    share = jnp.clip(share, 0.0, 1.0)
    return _length(x - start[0] - share * dx, y - start[1] - share * dy) - radius


def arch(
    x: Plane, y: Plane, cx: Scalar, cy: Scalar, half: Scalar, rise: Scalar, radius: Scalar
) -> Plane:
    """A stroke along the parabola y = cy − rise (1 − u²), u = (x − cx) / half in [−1, 1], thinner
    towards both ends."""
    u = jnp.clip((x - cx) / half, -1.0, 1.0)
    across = (y - cy + rise * (1 - u * u)) / jnp.sqrt(1 + (2 * rise * u / half) ** 2)
    along = jnp.maximum(jnp.abs(x - cx) - half, 0.0)
    return _length(across, along) - radius * (1 - 0.6 * u * u)


def union(a: Plane, b: Plane, blend: float) -> Plane:
    """Both shapes, the crease between them filled over the width `blend`."""
    near = jnp.clip(0.5 + 0.5 * (b - a) / blend, 0.0, 1.0)
    return b + (a - b) * near - blend * near * (1 - near)


def cover(distance: Plane, soft: Scalar) -> Plane:
    """How much of a pixel lies inside, 0 to 1; `soft` is the width of the edge."""
    t = jnp.clip(0.5 - distance / soft, 0.0, 1.0)
    return t * t * (3 - 2 * t)


def circle(x: Plane, y: Plane, cx: Scalar, cy: Scalar, radius: Scalar) -> Plane:
    """A disc about (cx, cy)."""
    return _length(x - cx, y - cy) - radius


def over(
    picture: Float[Array, "3 S S"], colour: Float[Array | np.ndarray, "3 ..."], alpha: Plane
) -> Float[Array, "3 S S"]:
    """`colour` (one [3], or one per pixel [3, S, S]) laid over the picture."""
    colour = colour[:, None, None] if colour.ndim == 1 else colour
    return picture + alpha * (colour - picture)
