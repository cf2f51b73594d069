"""A checked request with encoded photos, which generates images in batches."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from persona_jax.api.adapters import LoadedAdapter
from persona_jax.api.bases import loaded
from persona_jax.api.results import Images, Progress
from persona_jax.data import images
from persona_jax.diffusion.ddim import picture_noise
from persona_jax.errors import UserError
from persona_jax.pipelines import generation
from persona_jax.pipelines.generation import References, Request
from persona_jax.pipelines.pipeline import Pipeline
from persona_jax.runs import attribution, reference_sets
from persona_jax.runs.attribution import Attribution
from persona_jax.runs.finished_run import SamplingSettings
from persona_jax.runs.reference_sets import ReferenceSet

Batch = UInt8[np.ndarray, "_ H W 3"]
LEAST_SIDE = 96
"""Minimal side in pixels of the reference photos that results keep."""


class GenerationJob:
    """A prepared call of :class:`persona_jax.PersonaPipeline`.

    Its memory does not grow with the number of images if they are read through :meth:`batches`.

    Attributes:
      num: number of images.
      prompts: of each image, as the text encoder gets it.
      settings: the sampling settings.
      references: of each set, its photos as the image encoder gets them.
      warnings: a line for each prompt that is too long for the text encoder.
    """

    def __init__(
        self,
        parts: Pipeline,
        *,
        program: Callable[[str, int], Callable],
        frozen: Mapping[str, Any],
        adapters: Sequence[LoadedAdapter],
        sets: Sequence[ReferenceSet],
        prompts: Sequence[str],
        negative_prompt: str,
        settings: SamplingSettings,
        seed: int,
        size: tuple[int, int],
        latents: Float[np.ndarray, "num h w C"] | None,
        batch_size: int,
        callback: Callable[[Progress], None] | None,
    ):
        """Made by :meth:`persona_jax.PersonaPipeline.prepare`.

        Args:
          parts: the base.
          program: (kind, steps) → compiled program.
          frozen: parameters of the towers.
          adapters: one for each set.
          sets: of photos.
          prompts: one for each image.
          negative_prompt: for all images.
          settings: of sampling.
          seed: of the noise.
          size: height and width of the latents.
          latents: initial noise; None: drawn from the seed.
          batch_size: images generated at once.
          callback: called after each step.

        Raises:
          UserError: an argument is invalid, or a photo cannot be read.
        """
        self.num = len(prompts)
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: at least one", argument="batch_size")
        if latents is not None and len(latents) != self.num:
            raise UserError(f"latents: {len(latents)} for {self.num} images", argument="latents")
        self.prompts, self.settings = list(prompts), settings
        self._program, self._frozen, self._adapters = program, frozen, adapters
        self._seed, self._noise, self._callback = seed, latents, callback
        self._batch, self._sets = min(batch_size, self.num), sets
        self._shape = (*size, parts.latent_shape[2])
        self._draws_noise = self._shape != parts.latent_shape or callback is not None
        distinct = list(dict.fromkeys([*prompts, negative_prompt]))
        ids, self.warnings = parts.tokenize(distinct)
        rows = [distinct.index(prompt) for prompt in prompts]
        self._ids, self._negative_ids = ids[rows], ids[distinct.index(negative_prompt)]
        side = max(size[1] * loaded(parts.vae).module.config.downscale, LEAST_SIDE)
        self.references: list[list[Image.Image]] = []
        self._references = []
        for one, owner in zip(sets, adapters, strict=True):
            squares: list[Image.Image] = []

            def keep(photo: Image.Image, into=squares, crop=owner.crop) -> None:
                into.append(reference_sets.square(photo, crop, side))

            made = reference_sets.references(
                owner.encoder,
                loaded(parts.unet).module.config,
                one,
                default=settings.scale,
                num=self._batch,
                size=size,
                each=keep,
            )
            self.references.append(squares)
            self._references.append(made)

    def batches(self) -> Iterator[Batch]:
        """Generates the images as uint8, a batch at a time; the last batch may be smaller."""
        return self._pixels(self._references)

    def latents(self) -> Iterator[Float[np.ndarray, "_ h w C"]]:
        """Generates the scaled latents z_0, a batch at a time."""
        return self._run("latents", self._references)

    def images(self) -> Images:
        """Generates all images."""
        for line in self.warnings:
            warnings.warn(line, stacklevel=3)
        generated = [Image.fromarray(x) for batch in self.batches() for x in batch]
        return Images(
            generated,
            references=self.references,
            prompts=self.prompts,
            settings=self.settings,
            seed=self._seed,
            attribute=lambda: self.attribution(self._in_batches(generated)),
        )

    def check_attribution(self) -> None:
        """Raises UserError if :meth:`attribution` is not possible for this request."""
        if len(self._sets) != 1:
            raise UserError("attribution: it is for one set of photos", argument="attribution")
        (owner,), (one,) = self._adapters, self._sets
        attribution.check(owner.model, one.counts, owner.path)

    def attribution(self, generated: Iterable[Batch]) -> Attribution:
        """Computes how much each photo contributed.

        Args:
          generated: the images of :meth:`batches`.

        Raises:
          UserError: see :meth:`check_attribution`.
        """
        self.check_attribution()
        (owner,), (references,) = self._adapters, self._references
        return attribution.attribute(
            owner.model, owner.encoder, references, generated, self._pixels
        )

    def _in_batches(self, images: Sequence[Image.Image]) -> Iterator[Batch]:
        for first in range(0, self.num, self._batch):
            yield np.stack([np.asarray(x) for x in images[first : first + self._batch]])

    def _pixels(self, references: Sequence[References]) -> Iterator[Batch]:
        for pixels in self._run("images", references):
            yield images.to_uint8(pixels)

    def _run(self, kind: str, references: Sequence[References]) -> Iterator[np.ndarray]:
        starts, models = range(0, self.num, self._batch), [one.model for one in self._adapters]
        if self._callback is None:
            requests = (self._request(first, references) for first in starts)
            program = self._program(kind, self.settings.steps)
            generated = generation.each_batch(program, self._frozen, models, requests, self._batch)
        else:
            generated = (self._step_by_step(kind, first, references) for first in starts)
        for first, batch in zip(starts, generated, strict=True):
            yield batch[: self.num - first]

    def _step_by_step(
        self, kind: str, first: int, references: Sequence[References]
    ) -> Float[np.ndarray, "B ..."]:
        steps, last = self.settings.steps, min(first + self._batch, self.num)
        program, request = self._program("latents", steps), self._request(first, references)
        models = [one.model for one in self._adapters]
        assert self._callback is not None
        z = request.noise
        for step, z in enumerate(
            generation.each_step(program, self._frozen, models, request, steps), 1
        ):
            kept = np.asarray(z)[: last - first]
            self._callback(Progress(step, steps, first, last, self.num, kept))
        if kind == "latents":
            return np.asarray(z)
        return np.asarray(self._program("decode", 0)(self._frozen["vae"], z))

    def _request(self, first: int, references: Sequence[References]) -> Request:
        rows = np.minimum(np.arange(first, first + self._batch), self.num - 1)
        keys = generation.picture_keys(self._seed, self._batch, first)
        noise: Array | np.ndarray | None = None
        if self._noise is not None:
            noise = self._noise[rows]
        elif self._draws_noise:
            noise = _draw_noise(keys, 0, self._shape)
        return generation.make_request(
            keys,
            self._ids[rows],
            self._negative_ids[None],
            references=references,
            guidance=self.settings.guidance,
            eta=self.settings.eta,
            noise=noise,
        )


_draw_noise = jax.jit(picture_noise, static_argnums=(1, 2))
