"""Photo files that Pillow does not write: 16 bits and floats, either endian; broken EXIF."""

import io
import struct
import zlib
from collections.abc import Mapping

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **settings)
    return data.getvalue()


def png(values: np.ndarray, colour_type: int, extra: bytes = b"") -> bytes:
    """Encodes ``[h, w]`` or ``[h, w, C]`` as PNG in 8 or 16 bits.

    Args:
      values: levels.
      colour_type: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA.
      extra: further chunks.
    """
    height, width = values.shape[:2]
    depth = 8 * values.dtype.itemsize
    rows = values.astype(values.dtype.newbyteorder(">"))
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(
    values: np.ndarray,
    order: str = "<",
    photometric: int = 1,
    tags: Mapping[int, int] | None = None,
) -> bytes:
    """Encodes ``[h, w]`` as grey TIFF, in the values' type. `photometric` 0: zero is white."""
    height, width = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits, kind = 8 * values.dtype.itemsize, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height}
    entries |= {279: len(data), 339: kind, **(tags or {})}
    entries[273] = 8 + 2 + 12 * (len(entries) + 1) + 4
    listed = b"".join(struct.pack(f"{order}HHII", k, 4, 1, v) for k, v in sorted(entries.items()))
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return start + struct.pack(f"{order}H", len(entries)) + listed + bytes(4) + data


def exif_with_broken_rational(orientation: int) -> bytes:
    """Returns EXIF, for ``save(exif=…)``, whose XResolution points beyond its end."""
    entries = struct.pack(">HHIHH", 0x112, 3, 1, orientation, 0)
    entries += struct.pack(">HHII", 0x11A, 5, 1, 0xFFFFFFF0)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4)
