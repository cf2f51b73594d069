"""Colour profiles: converts pictures to sRGB with littleCMS."""

import functools
import io
import struct
from collections.abc import Sequence
from typing import cast

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageCms

Point = tuple[float, float]

D50 = (0.9642, 1.0, 0.8249)
"""XYZ of the white point that ICC profiles refer to."""
D65 = (0.3127, 0.3290)
"""Chromaticity x and y of sRGB's white point."""
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
"""Chromaticities x and y of red, green and blue."""
ADOBE_GAMMA = 563 / 256
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""Pillow's mode for each colour space of ICC profiles."""
SAME = 1
"""Levels by which a profile may differ from sRGB and still count as sRGB (littleCMS rounds)."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts a picture from its colour profile to sRGB.

    Same as :func:`PIL.ImageCms.profileToProfile` with perceptual intent. If the profile is sRGB,
    the values stay unchanged. A grey picture with an RGB profile is converted to RGB first.

    Args:
      image: mode L, RGB, CMYK or LAB.
      profile: an ICC profile.

    Raises:
      ValueError: the profile cannot be read, or is for another mode.
    """
    mode, transform = _transform(profile)
    if image.mode == "L" and mode == "RGB":
        image = image.convert("RGB")
    if image.mode != mode:
        raise ValueError(f"a colour profile for {mode}, in a picture that is {image.mode}")
    if transform is None:
        return image.convert("RGB")
    # Pillow's annotation allows for inPlace=True, which returns None.
    return cast(Image.Image, ImageCms.applyTransform(image, transform))


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Returns a profile's mode and its transform to sRGB; None in its place if it is sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = MODES[source.profile.xcolor_space.strip()]
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB")
        if mode != "RGB":
            return mode, transform
        probe = _probe()
        out = ImageCms.applyTransform(probe, transform)
    except Exception as error:  # damaged profiles raise many kinds
        raise ValueError("a colour profile that cannot be read") from error
    moved = np.abs(np.asarray(out, int) - np.asarray(probe, int)).max()
    return mode, None if moved <= SAME else transform


def _probe() -> Image.Image:
    """Returns a picture with 9 levels of each channel in all combinations."""
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3))


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """Converts a picture of mode LAB (white point D50) to sRGB."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    return cast(Image.Image, converted)  # None is for inPlace=True


def matrix_profile(
    primaries: Sequence[Point], white: Point = D65, gamma: float = ADOBE_GAMMA
) -> bytes:
    """Returns an ICC profile (version 2) for a colour space of given primaries and gamma.

    Args:
      primaries: chromaticities x and y of red, green and blue.
      white: chromaticity x and y of the white point.
      gamma: linear light is the value, 0 to 1, to this power.

    Raises:
      ValueError: the primaries span no colour space.
    """
    try:
        columns = _to_xyz(primaries, white).T.tolist()
        curve = b"curv" + struct.pack(">IIHH", 0, 1, round(gamma * 256), 0)
        tags = {b"desc": b"desc" + struct.pack(">II", 0, 1) + bytes(79), b"wtpt": _xyz(D50)}
        for name, xyz in zip((b"r", b"g", b"b"), columns, strict=True):
            tags |= {name + b"XYZ": _xyz(xyz), name + b"TRC": curve}
    except (ArithmeticError, ValueError, TypeError, struct.error, np.linalg.LinAlgError) as error:
        raise ValueError("primaries that are of no colour space") from error
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H4s", 2000, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _fixed(D50)
    return header.ljust(128, b"\0") + table + body


def _to_xyz(primaries: Sequence[Point], white: Point) -> Float[np.ndarray, "3 3"]:
    """Returns the matrix from linear RGB to XYZ, adapted to D50 by Bradford's method."""
    columns = np.array([_whole(point) for point in primaries]).T
    source = _whole(white)
    matrix = columns * np.linalg.solve(columns, source)
    adapt = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ source)) @ BRADFORD
    return adapt @ matrix


def _whole(point: Point) -> Float[np.ndarray, " 3"]:
    """Returns XYZ of a chromaticity at luminance 1."""
    x, y = point
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(values)


def _fixed(values: Sequence[float]) -> bytes:
    """Packs ICC's s15Fixed16 numbers."""
    return struct.pack(f">{len(values)}i", *(round(float(x) * 65536) for x in values))
