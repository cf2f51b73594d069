"""Reference sets: from a caller or a command line to the arrays that the sampler takes."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from persona_jax.data import images, photo_decoding
from persona_jax.data.photo_decoding import Photo
from persona_jax.errors import UserError
from persona_jax.models.unet import UNetConfig
from persona_jax.pipelines import generation, scales
from persona_jax.pipelines.image_encoders import ImageEncoder
from persona_jax.pipelines.scales import ByBlock, Number
from persona_jax.runtime import settings
from persona_jax.runtime.settings import number


@dataclasses.dataclass(frozen=True)
class ReferenceSet:
    """Reference photos of one person, with weights and conditions.

    Attributes:
      photos, negative: of the person, and negative photos; paths, images or arrays
        (:func:`persona_jax.data.photo_decoding.open_photo`).
      weights: one for each photo: 0 leaves it out, 2 counts it twice; None: all 1.
      scale: λ, one number or numbers by block
        (:func:`persona_jax.pipelines.scales.parse_scale`), or either as JSON; None: the adapter's.
      mask: an image, white where the person is to be; None: everywhere.
      window: (start, end), shares of the steps between which the photos count; None: all steps.

    Raises:
      UserError: there are no photos, not one weight for each photo, or the window is invalid.
    """

    photos: Sequence[Photo]
    weights: Sequence[Number] | None = None
    scale: Number | str | ByBlock | None = None
    mask: Photo | None = None
    window: tuple[Number, Number] | None = None
    negative: Sequence[Photo] = ()

    def __post_init__(self) -> None:
        """Checks all that needs no pipeline."""
        for name in ("photos", "negative"):
            if isinstance(getattr(self, name), str | bytes | PurePath | Image.Image):
                raise UserError(f"{name}: one photo; give a list of them", argument=name)
        if len(self.photos) == 0:
            raise UserError("photos: none; give one or more", argument="photos")
        if self.weights is not None:
            if len(self.weights) != len(self.photos):
                raise UserError(
                    f"weights: {len(self.weights)} of them for {len(self.photos)} photos; one each",
                    argument="weights",
                )
            if not all(np.isfinite(w) and w >= 0 for w in self.weights):
                raise UserError("weights: each must be 0 (leave out) or more", argument="weights")
        if self.window is not None:
            start, end = self.window
            if not 0 <= start < end <= 1:
                raise UserError(
                    f"window {start:g} {end:g}: expected shares of the steps, 0 to 1, start first",
                    argument="window",
                )

    @property
    def counts(self) -> Float[np.ndarray, " N"]:
        """The weights as float32, 1 where none are given."""
        weights = [1.0] * len(self.photos) if self.weights is None else self.weights
        return np.asarray(weights, np.float32)


def read_reference_sets(arguments: argparse.Namespace) -> list[ReferenceSet]:
    """Reads one set for each ``--photos`` of a command line.

    Each of the other flags of :func:`add_flags` is given once for all sets, or once for each.

    Raises:
      UserError: a flag is given another number of times, or a value is invalid.
    """
    count = len(arguments.photos)
    masks = _spread("--mask", arguments.mask, count)
    windows = _spread("--window", arguments.window, count)
    parts = {
        "scale": _spread("--scale", arguments.scale, count),
        "mask": [None if mask == "-" else mask for mask in masks],
        "window": [window and tuple(window) for window in windows],
        "negative": [
            x or [] for x in _spread("--negative_photos", arguments.negative_photos, count)
        ],
    }
    weights = arguments.weights or [[1.0] * len(photos) for photos in arguments.photos]
    if len(weights) != count:
        raise UserError(f"--weights: {len(weights)} lists for {count} --photos; one each")
    return [
        ReferenceSet(
            arguments.photos[i], weights[i], **{name: values[i] for name, values in parts.items()}
        )
        for i in range(count)
    ]


def _spread(flag: str, values: Sequence | None, count: int) -> list:
    if values is None:
        return [None] * count
    if len(values) not in (1, count):
        raise UserError(f"{flag}: {len(values)} of them for {count} --photos; one for all or each")
    return list(values) * (count if len(values) == 1 else 1)


def references(
    encoder: ImageEncoder,
    config: UNetConfig,
    photo_set: ReferenceSet,
    *,
    default: Number,
    num: int,
    size: tuple[int, int],
    each: Callable[[Image.Image], None] = lambda photo: None,
) -> generation.References:
    """Encodes a set and repeats it for `num` images.

    Args:
      encoder: of the adapter.
      config: of the UNet.
      photo_set: the set.
      default: λ, used if the set has none.
      num: B, the number of images.
      size: height and width of the latents.
      each: is called with every decoded photo of the person, so that none is decoded twice.

    Raises:
      UserError: a photo or mask cannot be read, or λ does not fit the UNet.
    """
    scale = default if photo_set.scale is None else photo_set.scale
    by_layer = (
        scales.read_scale(scale, config)
        if isinstance(scale, str)
        else scales.parse_scale(scale, config)
    )
    coverage, negative = None, None
    if photo_set.mask is not None:
        coverage = scales.regions(photo_decoding.open_mask(photo_set.mask), config, size)
    embeddings, weights = _encode(encoder, photo_set.photos, "photo", each), photo_set.counts
    if len(photo_set.negative):
        negative_embeddings = _encode(encoder, photo_set.negative, "negative photo")
        slots = max(len(embeddings), len(negative_embeddings))
        ones = np.ones(len(negative_embeddings), np.float32)
        negative = (
            repeat(_filled(negative_embeddings, slots), num),
            repeat(_filled(ones, slots), num),
        )
        embeddings, weights = _filled(embeddings, slots), _filled(weights, slots)
    return generation.References(
        repeat(embeddings, num),
        repeat(weights, num),
        scales.combine(by_layer, coverage),
        negative,
        photo_set.window,
    )


def _encode(
    encoder: ImageEncoder,
    photos: Sequence[Photo],
    name: str,
    each: Callable[[Image.Image], None] = lambda photo: None,
) -> Float[np.ndarray, "N ..."]:
    def opened() -> Iterator[Image.Image]:
        for i, one in enumerate(photos):
            photo = photo_decoding.open_photo(one, f"{name} {i + 1}")
            each(photo)
            yield photo

    return encoder.encode(opened())


def _filled(x: np.ndarray, slots: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((slots - len(x), *x.shape[1:]), x.dtype)])


def repeat(x: np.ndarray, num: int) -> Float[Array, "{num} ..."]:
    """Repeats an array for each of `num` images."""
    return jnp.repeat(jnp.asarray(x, jnp.float32)[None], num, axis=0)


def square(photo: Image.Image, crop: float, size: int) -> Image.Image:
    """A photo as the image encoder gets it: its central `crop`, of `size` pixels."""
    return images.centre_crop(photo, crop).resize((size, size))


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Adds ``--photos`` and the flags that apply to a set."""
    flags.add_argument(
        "--photos",
        nargs="+",
        action="append",
        default=[],
        help="the person's photos; repeat it for another person or adapter",
    )
    flags.add_argument(
        "--weights",
        type=number(settings.NOT_NEGATIVE),
        nargs="+",
        action="append",
        help="how much each photo counts",
    )
    flags.add_argument(
        "--scale",
        nargs="+",
        action="extend",
        help='λ; 0 ignores the photos. By block: \'{"up": {"block_0": [0, 1, 0]}}\'',
    )
    flags.add_argument(
        "--mask",
        nargs="+",
        action="extend",
        help="images, white where the person is to be; - for everywhere",
    )
    flags.add_argument(
        "--window",
        type=number(settings.SHARE),
        nargs=2,
        action="append",
        metavar=("FROM", "TO"),
        help="the share of the steps in which the photos count, 0 to 1",
    )
    flags.add_argument(
        "--negative_photos", nargs="+", action="append", help="photos to move away from"
    )
