"""PIL pictures to arrays and back: crops, inputs of the VAE and CLIP, image grids, PNG files."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from persona_jax.errors import UserError
from persona_jax.runtime import outputs

SHEET = "persona_jax sheet"
"""Key of the text chunk that marks a PNG as a grid of several pictures."""


def centre_crop(image: Image.Image, fraction: float) -> Image.Image:
    """Crops the central square; its side is `fraction` (0 < fraction <= 1) of the shorter side."""
    if not 0 < fraction <= 1:
        raise UserError(f"face crop {fraction}: expected a fraction above 0 and at most 1")
    side = max(1, round(fraction * min(image.size)))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def to_model(image: Image.Image, size: int) -> Float[np.ndarray, "{size} {size} 3"]:
    """Returns the VAE's input: the central square, resized with antialiasing, in [-1, 1]."""
    square = centre_crop(image.convert("RGB"), 1.0)
    resized = square.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.float32) / 127.5 - 1.0


def to_uint8(pixels: Float[np.ndarray, "*batch h w 3"]) -> UInt8[np.ndarray, "*batch h w 3"]:
    """Maps [-1, 1] to 0..255, rounded and clipped: the inverse of :func:`to_model`."""
    return np.clip(np.rint((pixels + 1.0) * 127.5), 0, 255).astype(np.uint8)


def clip_preprocess(image: Image.Image, config: Mapping) -> Float[np.ndarray, "height width 3"]:
    """Returns the input of CLIP's image tower, equal to transformers' CLIPImageProcessor (PIL).

    Args:
      image: any PIL picture.
      config: `preprocessor_config.json` of the feature extractor. `size` and `crop_size` may be
        a number or a dictionary; steps whose `do_*` is false are left out.

    Returns:
      pixels, channels last (transformers: channels first).
    """
    image = image.convert("RGB")
    if config.get("do_resize", True):
        filter_ = Image.Resampling(config.get("resample", Image.Resampling.BICUBIC))
        image = image.resize(_resized(image.size, config.get("size", 224)), filter_)
    pixels = np.asarray(image)
    if config.get("do_center_crop", True):
        pixels = _centre(pixels, *_height_width(config.get("crop_size", 224)))
    pixels = pixels.astype(np.float32)
    if config.get("do_rescale", True):
        pixels = pixels * np.float32(config.get("rescale_factor", 1 / 255))
    if config.get("do_normalize", True):
        mean = config.get("image_mean", (0.48145466, 0.4578275, 0.40821073))
        std = config.get("image_std", (0.26862954, 0.26130258, 0.27577711))
        pixels = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return pixels


def _resized(width_height: tuple[int, int], size: int | dict) -> tuple[int, int]:
    """Returns width and height after resizing: the shorter side is set, the longer rounded down."""
    if isinstance(size, dict) and "shortest_edge" not in size:
        return size["width"], size["height"]
    short = size["shortest_edge"] if isinstance(size, dict) else size
    width, height = width_height
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _height_width(size: int | dict) -> tuple[int, int]:
    return (size["height"], size["width"]) if isinstance(size, dict) else (size, size)


def _centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crops the centre; pads a smaller picture with zeros (an odd one goes before)."""
    lack = [max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])]
    pixels = np.pad(pixels, [*((-(-n // 2), n // 2) for n in lack), (0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


Picture = Image.Image | UInt8[np.ndarray, "h w 3"] | None
GAP = 2
"""Pixels between the cells of a grid."""


def grid(
    rows: Sequence[Sequence[Picture]],
    *,
    size: int | None = None,
    titles: Sequence[str] | None = None,
) -> Image.Image:
    """Arranges pictures (for example references, target and samples) in rows on white.

    Args:
      rows: pictures from left to right; None leaves a cell empty, rows may differ in length.
      size: side of a cell in pixels; by default the width of the first picture.
      titles: a word above each column, where not empty.
    """
    cells = [[_to_image(cell) for cell in row] for row in rows]
    size = size or next(cell.width for row in cells for cell in row if cell is not None)
    top = 14 if titles else 0
    columns = max(map(len, cells))
    shape = (columns * (size + GAP) + GAP, len(cells) * (size + GAP) + GAP + top)
    canvas = Image.new("RGB", shape, "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles or ()):
        position = (GAP + column * (size + GAP), 1)
        draw.text(position, title, fill="black", font=ImageFont.load_default())
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            if cell is not None:
                fitted = cell.resize((size, size), Image.Resampling.LANCZOS)
                canvas.paste(fitted, (GAP + x * (size + GAP), top + GAP + y * (size + GAP)))
    return canvas


def _to_image(picture: Picture) -> Image.Image | None:
    return Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture


def save(image: Image.Image, file: pathlib.Path, note: PngInfo | None = None) -> None:
    """Writes a PNG atomically.

    Raises:
      UserError: it cannot be written.
    """
    with outputs.whole(file) as beside:
        image.save(beside, "PNG", pnginfo=note)


def save_sheet(image: Image.Image, file: pathlib.Path) -> None:
    """Writes a grid of several pictures as a PNG with a mark that :func:`is_sheet` detects."""
    note = PngInfo()
    note.add_text(SHEET, "several pictures")
    save(image, file, note)


def is_sheet(file: pathlib.Path) -> bool:
    """Returns whether :func:`save_sheet` wrote this file."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return SHEET in image.info
    except Exception:  # not a PNG, or damaged
        return False
