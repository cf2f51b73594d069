"""A pipeline folder, opened once; its image encoder when an adapter asks for it."""

import dataclasses

import jax
from jax.typing import DTypeLike

from persona_jax.interop.folders import Tower
from persona_jax.models.towers import TOWERS
from persona_jax.pipelines import pipeline
from persona_jax.pipelines.pipeline import Pipeline


def loaded(tower: Tower | None) -> Tower:
    """A tower that is known to have been loaded."""
    assert tower is not None
    return tower


class Base:
    """The frozen parts of a pipeline.

    Attributes:
      source: as it was named.
      parts: towers, schedule and tokenizer, without the image encoder.
    """

    def __init__(self, source: str, *, image_encoder: str | None = None, dtype: str = "auto"):
        """See :func:`persona_jax.load_pipeline`."""
        self.source = source
        self._image_encoder = image_encoder or ""
        self._dtype: DTypeLike = pipeline.dtype_on(dtype, jax.default_backend())
        self.parts = self._load([tower for tower in TOWERS if tower != "image_encoder"])
        self._with_encoder: dict[str, Pipeline] = {}

    @property
    def hash(self) -> str:
        """Of the UNet."""
        return loaded(self.parts.unet).hash

    @property
    def image_size(self) -> int:
        """Side of a generated image in pixels, where a call names none."""
        return self.parts.image_size

    def with_image_encoder(self, path: str = "") -> Pipeline:
        """The parts, with the image encoder too.

        Args:
          path: folder or hub id of the encoder; empty: what :func:`persona_jax.load_pipeline` was
            given, or the pipeline's own.

        Raises:
          UserError: there is none.
        """
        place = path or self._image_encoder
        if place not in self._with_encoder:
            found = self._load(["image_encoder"], place)
            self._with_encoder[place] = dataclasses.replace(
                self.parts,
                image_encoder=found.image_encoder,
                feature_extractor=found.feature_extractor,
            )
        return self._with_encoder[place]

    def _load(self, towers: list[str], image_encoder: str = "") -> Pipeline:
        return pipeline.load(
            self.source,
            only=towers,
            image_encoder=image_encoder or None,
            dtype=self._dtype,
            param_dtype=self._dtype,
        )
