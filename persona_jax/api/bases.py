"""The base of a pipeline; its image encoder is loaded when an adapter needs it."""

import dataclasses

import jax
from jax.typing import DTypeLike

from persona_jax.interop.folders import Tower
from persona_jax.models.towers import TOWERS
from persona_jax.pipelines import pipeline
from persona_jax.pipelines.pipeline import Pipeline


def loaded(tower: Tower | None) -> Tower:
    """Returns a tower that has been loaded, for the type checker."""
    assert tower is not None
    return tower


class Base:
    """The frozen parts of a pipeline.

    Attributes:
      source: folder, hub id or name of a shipped base, as given.
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
        """Hash of the UNet's weights."""
        return loaded(self.parts.unet).hash

    @property
    def image_size(self) -> int:
        """Default side of a generated image in pixels."""
        return self.parts.image_size

    def with_image_encoder(self, path: str = "") -> Pipeline:
        """The parts with an image encoder, which is loaded once for each path.

        Args:
          path: folder or hub id of the encoder; empty: the argument of
            :func:`persona_jax.load_pipeline`, or the pipeline's own.

        Raises:
          UserError: there is no image encoder.
        """
        source = path or self._image_encoder
        if source not in self._with_encoder:
            encoder_parts = self._load(["image_encoder"], source)
            self._with_encoder[source] = dataclasses.replace(
                self.parts,
                image_encoder=encoder_parts.image_encoder,
                feature_extractor=encoder_parts.feature_extractor,
            )
        return self._with_encoder[source]

    def _load(self, towers: list[str], image_encoder: str = "") -> Pipeline:
        return pipeline.load(
            self.source,
            only=towers,
            image_encoder=image_encoder or None,
            dtype=self._dtype,
            param_dtype=self._dtype,
        )
