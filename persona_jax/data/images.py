"""PIL pictures to arrays and back: crops, what the VAE and CLIP read, grids to look at."""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from persona_jax.errors import UserError
from persona_jax.runtime import outputs

SHEET = "persona_jax sheet"
"""Name of the text in a PNG that shows several pictures."""


def centre_crop(image: Image.Image, fraction: float) -> Image.Image:
    """The central square whose side is `fraction` of the shorter side (0 < fraction <= 1)."""
    if not 0 < fraction <= 1:
        raise UserError(f"face crop {fraction}: expected a fraction above 0 and at most 1")
    side = max(1, round(fraction * min(image.size)))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def to_model(image: Image.Image, size: int) -> Float[np.ndarray, "{size} {size} 3"]:
    """The central square, antialiased to `size` pixels, in [-1, 1]: what the VAE encodes."""
    square = centre_crop(image.convert("RGB"), 1.0)
    resized = square.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.float32) / 127.5 - 1.0


def to_uint8(pixels: Float[np.ndarray, "*batch h w 3"]) -> UInt8[np.ndarray, "*batch h w 3"]:
    """[-1, 1] to 0..255, rounded, clipped: the inverse of :func:`to_model` up to rounding."""
    return np.clip(np.rint((pixels + 1.0) * 127.5), 0, 255).astype(np.uint8)


def clip_preprocess(image: Image.Image, config: dict) -> Float[np.ndarray, "height width 3"]:
    """What CLIP's image tower reads, as transformers' CLIPImageProcessor (PIL) prepares it.

    Args:
      image: any PIL picture.
      config: `preprocessor_config.json` of the feature extractor. `size` and `crop_size` may be
        a number or a dictionary; steps switched off by `do_*` are left out.

    Returns:
      channels last (transformers gives channels first).
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
    """Width and height after the resize: the shorter side set, the longer one rounded down."""
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
    """Central crop; where the picture is smaller, zeros around it (the odd one before)."""
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
    """Rows of pictures (say references, target, samples) on white, to be saved as one PNG.

    Args:
      rows: pictures from left to right; None leaves a cell empty, short rows end early.
      size: side of a cell in pixels; by default that of the first picture.
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
    """A PNG, whole or not at all. Raises UserError where it cannot be written."""
    with outputs.whole(file) as beside:
        image.save(beside, "PNG", pnginfo=note)


def save_sheet(image: Image.Image, file: pathlib.Path) -> None:
    """A PNG that shows several pictures, and says so (:func:`is_sheet`)."""
    note = PngInfo()
    note.add_text(SHEET, "several pictures")
    save(image, file, note)


def is_sheet(file: pathlib.Path) -> bool:
    """Whether a file is one of :func:`save_sheet`."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return SHEET in image.info
    except Exception:  # no PNG, or a damaged one
        return False
