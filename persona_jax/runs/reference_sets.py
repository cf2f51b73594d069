"""Sets of photos that pictures are painted from: as the command line has them, and as sources."""

import argparse
import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from persona_jax.data import images, photo_files
from persona_jax.errors import UserError
from persona_jax.pipelines import generation, scales
from persona_jax.runs.finished_run import Run
from persona_jax.runtime import settings
from persona_jax.runtime.settings import number


@dataclasses.dataclass(frozen=True)
class ReferenceSet:
    """Photos of one person, and how they count.

    Attributes:
      photos, negative: files; of the person, and of what to move away from.
      weights: one a photo.
      scale: λ as it is written (:func:`persona_jax.pipelines.scales.read_scale`); None: the run's.
      mask: a picture, white where the person is to be; None: everywhere.
      window: from which share of the steps on, and up to which; None: in all.
    """

    photos: list[str]
    weights: list[float]
    scale: str | None = None
    mask: str | None = None
    window: tuple[float, float] | None = None
    negative: list[str] = dataclasses.field(default_factory=list)


def read_reference_sets(arguments: argparse.Namespace) -> list[ReferenceSet]:
    """One for each ``--photos``. Of the other flags (:func:`add_flags`) there is one for all or one
    for each.

    Raises:
      UserError: another number of them, or values that cannot be.
    """
    count = len(arguments.photos)
    masks = _spread("--mask", arguments.mask, count)
    windows = _spread("--window", arguments.window, count)
    parts = {
        "scale": _spread("--scale", arguments.scale, count),
        "mask": [None if mask == "-" else mask for mask in masks],
        "window": [window and _window(*window) for window in windows],
        "negative": [
            x or [] for x in _spread("--negative_photos", arguments.negative_photos, count)
        ],
    }
    weights = arguments.weights or [[1.0] * len(photos) for photos in arguments.photos]
    if len(weights) != count:
        raise UserError(f"--weights: {len(weights)} lists for {count} --photos; one each")
    for photos, own in zip(arguments.photos, weights, strict=True):
        if len(own) != len(photos):
            raise UserError(f"--weights: {len(own)} weights for {len(photos)} photos; one each")
        if not all(np.isfinite(w) and w >= 0 for w in own):
            raise UserError("--weights: each must be 0 (leave out) or more")
    return [
        ReferenceSet(
            arguments.photos[i], weights[i], **{name: found[i] for name, found in parts.items()}
        )
        for i in range(count)
    ]


def _spread(flag: str, values: Sequence | None, count: int) -> list:
    if values is None:
        return [None] * count
    if len(values) not in (1, count):
        raise UserError(f"{flag}: {len(values)} of them for {count} --photos; one for all or each")
    return list(values) * (count if len(values) == 1 else 1)


def _window(start: float, end: float) -> tuple[float, float]:
    if not 0 <= start < end <= 1:
        raise UserError(f"--window {start:g} {end:g}: shares of the steps, 0 to 1, in this order")
    return start, end


def references(
    run: Run, photo_set: ReferenceSet, default: float, num: int
) -> generation.References:
    """A set as `num` pictures are painted from it.

    Args:
      run: whose encoder looks.
      photo_set: the set.
      default: λ, where the set has none.
      num: B.

    Raises:
      UserError: a photo or mask that cannot be read, or a λ that does not fit the UNet.
    """
    config, side = run.pipeline.unet.module.config, run.pipeline.latent_shape[0]
    scale = default if photo_set.scale is None else scales.read_scale(photo_set.scale, config)
    places = None
    if photo_set.mask is not None:
        places = scales.regions(photo_files.load_mask(photo_set.mask), config, side)
    seen, own, negative = _encode(run, photo_set.photos), np.float32(photo_set.weights), None
    if photo_set.negative:
        away = _encode(run, photo_set.negative)
        slots = max(len(seen), len(away))
        negative = tuple(repeat(_filled(x, slots), num) for x in (away, np.ones(len(away))))
        seen, own = _filled(seen, slots), _filled(own, slots)
    return generation.References(
        repeat(seen, num),
        repeat(own, num),
        scales.combine(scale, places),
        negative,
        photo_set.window,
    )


def _encode(run: Run, files: Sequence[str]) -> Float[np.ndarray, "N ..."]:
    return run.encoder.encode(map(photo_files.load_photo, files))


def _filled(x: np.ndarray, slots: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((slots - len(x), *x.shape[1:]), x.dtype)])


def repeat(x: np.ndarray, num: int) -> Float[Array, "{num} ..."]:
    """The same for each of `num` pictures."""
    return jnp.repeat(jnp.asarray(x, jnp.float32)[None], num, axis=0)


def squares(run: Run, photo_set: ReferenceSet, size: int) -> list[Image.Image]:
    """The photos as the image encoder sees them, central parts, of `size` pixels."""
    crop, photos = run.config.data.crop, map(photo_files.load_photo, photo_set.photos)
    return [images.centre_crop(photo, crop).resize((size, size)) for photo in photos]


def add_flags(flags: argparse.ArgumentParser) -> None:
    """``--photos`` and what goes with each."""
    flags.add_argument(
        "--photos",
        nargs="+",
        action="append",
        default=[],
        help="the person's photos; once more for another person or adapter",
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
        help="pictures, white where the person is to be; - for everywhere",
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
