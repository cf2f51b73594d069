"""Decodes image files: photos to upright, opaque sRGB; masks to grey.

All image files are decoded here. The format is detected from the content, not from the name.
"""

import logging
import os
import pathlib
import stat
import warnings
from collections.abc import Callable
from io import BufferedReader, BytesIO

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from persona_jax.data import colour
from persona_jax.errors import UserError, shown
from persona_jax.runtime import buckets

log = logging.getLogger(__name__)

OpenFile = BufferedReader | BytesIO
"""A file's bytes, on the disk or in memory."""
Photo = str | os.PathLike[str] | Image.Image | np.ndarray
"""A photo as a caller may give it: a path, a picture, or an array (:func:`open_photo`)."""
READING = 2
"""Version of the decoding, part of cache keys: raise it when a file decodes to other pixels."""
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI"),
    *("SGI", "TIFF", "WEBP"),
)
"""Pillow's names of accepted formats, besides HEIF. None of them starts an external program."""
BACKGROUND = "white"
"""Colour behind transparent photos."""
MOST = 2**26
"""Largest number of pixels decoded; a JPEG with more is reduced while it is decoded."""
MOST_JPEG = 2**28
"""Largest number of pixels of a JPEG before that reduction."""
MOST_BYTES = 2**29
"""Largest size of a file, in bytes."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns a picture upright, by EXIF orientation."""
SIXTEEN = np.rint(np.arange(65536) / 257).astype(np.uint8)
"""Maps 16-bit levels to 8-bit levels."""
SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)


class Unreadable(ValueError):
    """A file is not a picture, is damaged or too large; the message is the reason in one line."""


def decode(file: OpenFile, name: str = "photo") -> Image.Image:
    """Decodes a photo to RGB: upright, in sRGB, transparency replaced by :data:`BACKGROUND`.

    16-bit grey becomes 8-bit by round(255 · v / 65535); of 16-bit colours, Pillow drops the lower
    byte. Floats are expected in [0, 1]. Of several pictures in a file, the first is read.

    Args:
      file: open for reading, at its start.
      name: of the file, for warnings.

    Raises:
      Unreadable: the file is not a picture, is damaged or too large.
    """
    return _guarded(lambda image: _photo(image, name), file)


def decode_mask(file: OpenFile) -> Image.Image:
    """Decodes a mask to mode L: the weight of each pixel, 0 to 255.

    The weight is the opacity if it varies over the picture, else the brightness. Values are used
    unchanged, whatever the colour profile.

    Raises:
      Unreadable: as :func:`decode`; also if both opacity and brightness vary, or all pixels are
        transparent.
    """
    return _guarded(_coverage, file)


def open_photo(photo: Photo, name: str = "photo") -> Image.Image:
    """Applies :func:`decode` to a photo in any form.

    Args:
      photo: a path; a Pillow image, with its EXIF, colour profile and transparency; or an array
        ``[h, w]``, ``[h, w, 3]`` or ``[h, w, 4]`` of bytes, or of floats from 0 to 1, in sRGB.
      name: of a photo that has no path, for the error.

    Raises:
      UserError: the photo cannot be read.
    """
    if isinstance(photo, str | os.PathLike):
        return load_photo(pathlib.Path(photo) if not isinstance(photo, str) else photo)
    return _in_memory(photo, name, lambda image: _photo(image, name))


def open_mask(mask: Photo) -> Image.Image:
    """:func:`decode_mask` of a mask in any form, as in :func:`open_photo`."""
    if isinstance(mask, str | os.PathLike):
        return load_mask(pathlib.Path(mask) if not isinstance(mask, str) else mask)
    return _in_memory(mask, "mask", _coverage)


def _in_memory(
    photo: Image.Image | np.ndarray, name: str, read: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    try:
        return read(photo if isinstance(photo, Image.Image) else _from_array(photo))
    except Exception as error:  # a lazily loaded image raises whatever its decoder raises
        reason = shown(" ".join(str(error).split())[:120]) or type(error).__name__
        raise UserError(f"{name}: not a readable picture ({reason})") from error


def _from_array(pixels: np.ndarray) -> Image.Image:
    pixels = np.asarray(pixels)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise Unreadable(f"an array of shape {pixels.shape}; expected [h, w], [h, w, 3 or 4]")
    if 0 in pixels.shape:
        raise Unreadable(f"an array of shape {pixels.shape}, without pixels")
    if pixels.dtype == bool:
        pixels = pixels.astype(np.float32)
    if np.issubdtype(pixels.dtype, np.floating):
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise Unreadable("floats beyond 0 to 1; scale them, or give bytes")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise Unreadable(f"an array of {pixels.dtype}; expected uint8, or floats from 0 to 1")
    return Image.fromarray(pixels)


def load_photo(path: str | pathlib.Path) -> Image.Image:
    """Applies :func:`decode` to a file given by its path.

    Raises:
      UserError: the file cannot be read.
    """
    return _load(path, "photo", lambda file: decode(file, str(path)))


def load_mask(path: str | pathlib.Path) -> Image.Image:
    """Applies :func:`decode_mask` to a file given by its path.

    Raises:
      UserError: the file cannot be read.
    """
    return _load(path, "mask", decode_mask)


def refusal(path: pathlib.Path) -> str | None:
    """Returns why a path cannot be a picture, from its kind, size and header; None if it may be.

    Pixels are not decoded.
    """
    try:
        about = path.stat()
        if stat.S_ISDIR(about.st_mode):
            return "a folder"
        if not stat.S_ISREG(about.st_mode):
            return "not a regular file"
        if about.st_size == 0:
            return "zero bytes"
        if about.st_size > MOST_BYTES:
            return f"{about.st_size / 2**20:.0f} MiB, at most {MOST_BYTES >> 20} are read"
        with path.open("rb") as file:
            _guarded(lambda image: image, file)
    except Unreadable as error:
        return str(error)
    except OSError as error:
        return error.strerror or type(error).__name__
    except ValueError:  # a NUL character in the name
        return "no such file"
    return None


def _load(
    path: str | pathlib.Path, kind: str, read: Callable[[OpenFile], Image.Image]
) -> Image.Image:
    where = buckets.local(path)
    reason = refusal(where)
    if reason is None:
        try:
            with where.open("rb") as file:
                return read(file)
        except Unreadable as error:
            reason = str(error)
        except OSError as error:
            reason = error.strerror
    raise UserError(f"{kind} {shown(path)}: not a readable picture ({reason})")


def _guarded(read: Callable[[Image.Image], Image.Image], file: OpenFile) -> Image.Image:
    """Applies `read` to the picture in a file; turns any decoder error into Unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(file) as image:
                return read(image)
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable("none of the known formats; convert it to JPEG or PNG") from error
    except Exception as error:  # a decoder's RuntimeError, struct.error, KeyError, …
        reason = shown(" ".join(str(error).split())[:120]) or type(error).__name__
        raise Unreadable(f"damaged: {reason}; replace it or leave it out") from error


def _open(file: OpenFile) -> Image.Image:
    """Opens a picture without decoding it. Raises Unreadable if it is too large."""
    head = file.read(16)
    file.seek(0)
    formats = [*FORMATS, "HEIF"] if head[4:8] == b"ftyp" and _reads_heif(head) else FORMATS
    try:
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        if head[:2] != b"\xff\xd8":
            raise _too_large(None) from error
        file.seek(0)
        image = JpegImagePlugin.JpegImageFile(file)
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO") and MOST < pixels <= MOST_JPEG:
        image.draft(image.mode, (image.width // 2, image.height // 2))
    if image.width * image.height > MOST:
        raise _too_large(pixels)
    return image


def _too_large(pixels: int | None) -> Unreadable:
    count = "too many" if pixels is None else f"{pixels / 1e6:.0f}"
    most = f"{MOST / 1e6:.0f}, of a JPEG {MOST_JPEG / 1e6:.0f},"
    return Unreadable(f"{count} megapixels; at most {most} are read: make it smaller")


def _reads_heif(head: bytes) -> bool:
    """Returns whether the file is HEIF; registers the HEIF decoder with Pillow if it is."""
    if head[8:12] in (b"avif", b"avis"):  # decoded by Pillow itself
        return False
    try:
        import pillow_heif
    except ImportError as error:
        raise Unreadable("HEIC needs a decoder: pip install pillow-heif") from error
    pillow_heif.register_heif_opener()
    return True


def _photo(image: Image.Image, name: str) -> Image.Image:
    """Returns the picture upright, in sRGB and opaque; drops metadata, which no longer applies."""
    profile = _profile(image)
    image, turn = _one_byte(image), _turn(image)
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if alpha is not None:
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if profile is not None:
        try:
            image = colour.to_srgb(image, profile)
        except ValueError as error:
            log.warning("%s: %s; taken as sRGB", shown(name), error)
    if image.mode == "LAB":
        image = colour.lab_to_srgb(image)
    image = image.convert("RGB")
    if alpha is not None:
        flat = Image.new("RGB", image.size, BACKGROUND)
        flat.paste(image, mask=alpha)
        image = flat
    image = image if turn is None else image.transpose(turn)
    image.info = {}
    return image


def _coverage(image: Image.Image) -> Image.Image:
    image, turn = _one_byte(image), _turn(image)
    if image.mode in ("LA", "RGBA"):
        image = _alpha_or_brightness(image)
    image = image.convert("L")
    return image if turn is None else image.transpose(turn)


def _alpha_or_brightness(image: Image.Image) -> Image.Image:
    alpha = image.getchannel("A")
    low, high = alpha.getextrema()
    if high == 0:
        raise Unreadable("transparent all over; make it white where its person is to be")
    if low == high:
        return image.convert("L" if image.mode == "LA" else "RGB")
    visible = np.asarray(image)[np.asarray(alpha) > 0][:, :-1].astype(np.int16)
    grey, levels = np.ptp(visible, axis=1).max() == 0, np.ptp(visible[:, 0])
    if grey and levels > 127:
        raise Unreadable("drawn both in black and white and in transparency; save it without one")
    return alpha


def _one_byte(image: Image.Image) -> Image.Image:
    """Decodes a picture to mode L, LA, RGB, RGBA, CMYK or LAB.

    More than 8 bits are scaled down; a palette or a transparent colour is expanded.
    """
    image.load()
    mode, clear = image.mode, image.info.get("transparency")
    if mode == "F" or mode.startswith("I"):
        levels = _levels(image)
        out = Image.fromarray(levels)
        if isinstance(clear, int):
            out.putalpha(Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype("u1")))
        return out
    if image.has_transparency_data and mode not in ("LA", "RGBA"):
        return image.convert("LA" if mode == "La" else "RGBA")
    if mode == "1":
        return image.convert("L")
    return image if mode in ("L", "LA", "RGB", "RGBA", "CMYK", "LAB") else image.convert("RGB")


def _levels(image: Image.Image) -> np.ndarray:
    """Returns levels 0 to 255 of a grey picture of floats or of integers of more than 8 bits."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            limits = f"from {values.min():g} to {values.max():g}"
            raise Unreadable(f"floats {limits}, expected 0 to 1; convert it to 8 or 16 bits")
        levels = np.rint(values * 255).astype(np.uint8)
    elif image.mode == "I" and image.format == "TIFF":
        if tags.get(339, (1,))[0] != 1:
            raise Unreadable("signed integers of unknown range; convert it to 8 or 16 bits")
        levels = SIXTEEN[values.view(np.uint32) >> 16]
    else:
        bits = tags.get(258, (16,))[0]
        if values.min() < 0 or values.max() >= 2**16:
            raise Unreadable("values beyond 16 bits; convert it to 8 or 16 bits")
        levels = SIXTEEN[values if bits == 16 else values.astype(int) * 65535 // (2**bits - 1)]
    return 255 - levels if tags.get(262) == 0 else levels  # TIFF's WhiteIsZero


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Returns the transposition that turns a picture upright; None if EXIF gives none."""
    try:
        return TURNS.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
    except Exception:  # damaged EXIF raises many kinds
        return None


def _profile(image: Image.Image) -> bytes | None:
    """Returns a file's ICC profile, or one made from its other colour metadata; None for sRGB.

    The other metadata are a PNG's gamma and primaries, and R03 in EXIF, by which cameras mark Adobe
    RGB (DCF 2.0).
    """
    info = image.info
    if icc := info.get("icc_profile"):
        return icc
    try:
        gamma, points = info.get("gamma"), info.get("chromaticity")
        if image.format == "PNG" and gamma and points and "srgb" not in info:
            return _png_profile(gamma, points)
        interoperability = image.getexif().get_ifd(ExifTags.IFD.Interop)
        if str(interoperability.get(1, "")).startswith("R03"):
            return colour.matrix_profile(colour.ADOBE_RGB)
    except Exception:  # damaged EXIF raises many kinds
        return None
    return None


def _png_profile(gamma: float, points: tuple[float, ...]) -> bytes | None:
    same = np.abs(np.subtract(points, SRGB_CHROMATICITY)).max() < 2e-3
    if same and abs(1 / gamma - 2.2) < 0.05:
        return None  # these are sRGB's values
    white, *primaries = zip(points[::2], points[1::2], strict=True)
    return colour.matrix_profile(primaries, white, 1 / gamma)
