"""Results of a call: images with their inputs, and progress."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from persona_jax.data import images as image_files
from persona_jax.runs.attribution import Attribution
from persona_jax.runs.finished_run import SamplingSettings

MOST_COLUMNS = 16


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a call, after each step.

    Attributes:
      step, steps: of this batch's sampling trajectory, 1 to `steps`.
      first, last: indices of the batch's images, `last` excluded.
      num: number of images of the call.
      latents: of the batch after this step ``[last - first, h, w, C]``, for ``pipe.decode``.
    """

    step: int
    steps: int
    first: int
    last: int
    num: int
    latents: Float[np.ndarray, "B h w C"]

    @property
    def fraction(self) -> float:
        """Completed fraction of the call, 0 to 1."""
        done = self.first * self.steps + self.step * (self.last - self.first)
        return done / (self.num * self.steps)


class Images(list[Image.Image]):
    """A list of generated images with their inputs.

    Attributes:
      references: of each set, its photos as the image encoder got them.
      prompts: of each image, as the text encoder got it.
      settings: the sampling settings.
      seed: of the call.
    """

    def __init__(
        self,
        images: Sequence[Image.Image],
        *,
        references: Sequence[Sequence[Image.Image]],
        prompts: Sequence[str],
        settings: SamplingSettings,
        seed: int,
        attribute: Callable[[], Attribution],
    ):
        """Takes the attributes, and `attribute`, which computes :meth:`attribution`."""
        super().__init__(images)
        self.references = [list(photos) for photos in references]
        self.prompts = list(prompts)
        self.settings = settings
        self.seed = seed
        self._attribute = attribute
        self._attribution: Attribution | None = None

    def attribution(self) -> Attribution:
        """How much each photo contributed.

        The first call generates the images again without each of the photos.

        Raises:
          UserError: there is not exactly one set of photos, the adapter has no self-attention, or
            fewer than two photos have a weight.
        """
        if self._attribution is None:
            self._attribution = self._attribute()
        return self._attribution

    def grid(self) -> Image.Image:
        """One image with the photos of each set in rows of their own, and the images below."""
        return overview(list(self), self.references, self[0].size[0])

    def save(self, folder: str | Path) -> None:
        """Writes ``0000.png``, … into a folder. Raises UserError if it cannot be written."""
        for number, image in enumerate(self):
            image_files.save(image, Path(folder) / f"{number:04d}.png")


def overview(
    images: Sequence[Image.Image | np.ndarray],
    references: Sequence[Sequence[Image.Image]],
    size: int,
) -> Image.Image:
    """Draws each set of photos in rows of its own, the images below; cells have `size` pixels."""
    width = min(max([min(len(images), 8), *map(len, references)]), MOST_COLUMNS)
    photos = [[photo.resize((size, size)) for photo in own] for own in references]
    return image_files.grid(
        [row for own in [*photos, images] for row in _rows(own, width)], size=size
    )


def _rows(cells: Sequence, width: int) -> list[Sequence]:
    return [cells[i : i + width] for i in range(0, len(cells), width)]
