"""The pipeline of the Python API: a callable from a prompt and photos to images."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from persona_jax.api.adapters import (
    LoadedAdapter,
    LoadedPerson,
    Lora,
    default_settings,
    frozen_params,
    with_loras,
)
from persona_jax.api.bases import Base, loaded
from persona_jax.api.generation_job import GenerationJob
from persona_jax.api.results import Images, Progress
from persona_jax.data import images
from persona_jax.data.photo_decoding import Photo
from persona_jax.errors import UserError
from persona_jax.pipelines import generation
from persona_jax.pipelines.generation import Sampler
from persona_jax.pipelines.scales import ByBlock, Number
from persona_jax.runs.finished_run import SamplingSettings
from persona_jax.runs.reference_sets import ReferenceSet
from persona_jax.runtime.compilation import compiler_options

Latents = Float[np.ndarray, "num h w C"]
BATCH = 8
"""Default number of images generated at once."""


class Options(TypedDict, total=False):
    """Keyword arguments of a call; see :meth:`PersonaPipeline.prepare`."""

    adapter: LoadedAdapter | Sequence[LoadedAdapter] | None
    references: Sequence[ReferenceSet]
    weights: Sequence[Number] | None
    scale: Number | ByBlock | None
    mask: Photo | None
    window: tuple[Number, Number] | None
    negative_photos: Sequence[Photo]
    person: LoadedPerson | None
    loras: Sequence[Lora]
    negative_prompt: str
    num: int | None
    seed: int
    steps: int | None
    guidance: Number | None
    eta: Number | None
    height: int | None
    width: int | None
    latents: Latents | None
    batch_size: int
    callback: Callable[[Progress], None] | None


class PersonaPipeline(Base):
    """A pipeline for generation; from :func:`load_pipeline`.

    Compiled programs are kept. Other prompts, photos, seeds, scales, masks or guidance reuse them;
    another batch size, number of photos, number of steps or image size compiles a new one.
    """

    def __init__(self, source: str, *, image_encoder: str | None = None, dtype: str = "auto"):
        """See :func:`load_pipeline`."""
        super().__init__(source, image_encoder=image_encoder, dtype=dtype)
        self._programs: dict[tuple[str, int], Callable] = {}

    def __call__(
        self,
        prompt: str | Sequence[str] = "a photo of a person",
        photos: Sequence[Photo] | None = None,
        **options: Unpack[Options],
    ) -> Images:
        """Generates images; arguments and errors as in :meth:`prepare`."""
        return self.prepare(prompt, photos, **options).images()

    def prepare(
        self,
        prompt: str | Sequence[str] = "a photo of a person",
        photos: Sequence[Photo] | None = None,
        *,
        adapter: LoadedAdapter | Sequence[LoadedAdapter] | None = None,
        references: Sequence[ReferenceSet] = (),
        weights: Sequence[Number] | None = None,
        scale: Number | ByBlock | None = None,
        mask: Photo | None = None,
        window: tuple[Number, Number] | None = None,
        negative_photos: Sequence[Photo] = (),
        person: LoadedPerson | None = None,
        loras: Sequence[Lora] = (),
        negative_prompt: str = "",
        num: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: Number | None = None,
        eta: Number | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Latents | None = None,
        batch_size: int = BATCH,
        callback: Callable[[Progress], None] | None = None,
    ) -> GenerationJob:
        """Checks the arguments and encodes the photos, without generating.

        Args:
          prompt: one for all images, or one for each.
          photos: of one person: paths, Pillow images, or arrays of uint8 or of floats from 0 to 1.
          adapter: for the photos. With `references`: one for all sets, or one for each.
          references: sets of several people, instead of `photos` and the five arguments below.
          weights: one for each photo: 0 leaves it out, 2 counts it twice.
          scale: λ, the strength of the adapter; or numbers by block as in diffusers,
            ``{"down": 0, "up": {"block_0": [0, 1, 0]}}``; None: the adapter's default.
          mask: white where the person is to be.
          window: (start, end), shares of the steps between which the photos count.
          negative_photos: for the unconditional half of classifier-free guidance.
          person: fine-tuned weights of one person, instead of an adapter.
          loras: LoRA files, each alone or with a factor, ``("style.safetensors", 0.8)``.
          negative_prompt: for the unconditional half of classifier-free guidance.
          num: number of images; None: one, or one for each prompt.
          seed: of the noise. Image i of a seed does not depend on `num` or `batch_size`, up to
            rounding.
          steps: of DDIM. None here and below: the default of the first adapter or of the person.
          guidance: g of classifier-free guidance.
          eta: η of DDIM; 0 is deterministic, 1 ancestral.
          height, width: in pixels; None: as the UNet was trained.
          latents: z_T ``[num, h, w, C]``; None: noise drawn from the seed.
          batch_size: images generated at once.
          callback: called after every step. An exception that it raises ends the call. Each step
            then is a separate program run.

        Returns:
          A job that generates the images.

        Raises:
          UserError: an argument is invalid or a photo cannot be read; it is named.
        """
        sets = list(references)
        if photos is not None:
            if sets:
                raise UserError("give photos, or references, not both", argument="photos")
            single = ReferenceSet(photos, weights, scale, mask, window, negative_photos)
            sets = [single]
        elif weights or mask is not None or window or len(negative_photos):
            raise UserError(
                "weights, mask, window and negative_photos go with photos; in references, each set "
                "has its own",
                argument="photos",
            )
        adapters = _one_each(adapter, len(sets))
        if person is not None and (sets or loras):
            raise UserError(
                f"person: {person.path} cannot be combined with photos or LoRA files",
                argument="person",
            )
        opened: list[LoadedAdapter | LoadedPerson] = [*adapters, *([person] if person else [])]
        for one in opened:
            if one.base_hash != self.hash:
                raise UserError(f"{one.path}: it was opened for another base than {self.source}")
        defaults = opened[0].settings if opened else default_settings(self.source)
        settings = SamplingSettings(
            steps=defaults.steps if steps is None else steps,
            guidance=float(defaults.guidance if guidance is None else guidance),
            eta=float(defaults.eta if eta is None else eta),
            scale=float(scale if isinstance(scale, int | float) else defaults.scale),
        )
        if settings.steps < 1:
            raise UserError(f"steps {settings.steps}: at least one", argument="steps")
        prompts = _prompts(prompt, num)
        changed = person.towers if person else with_loras(frozen_params(self, {}), loras)
        return GenerationJob(
            self.parts,
            program=self._program,
            frozen=frozen_params(self, changed),
            adapters=adapters,
            sets=sets,
            prompts=[person.prompt(text) for text in prompts] if person else prompts,
            negative_prompt=negative_prompt,
            settings=settings,
            seed=seed,
            size=self._latent_size(height, width, latents),
            latents=latents,
            batch_size=batch_size,
            callback=callback,
        )

    def generate_latents(
        self,
        prompt: str | Sequence[str] = "a photo of a person",
        photos: Sequence[Photo] | None = None,
        **options: Unpack[Options],
    ) -> Latents:
        """Generates scaled latents z_0 ``[num, h, w, C]``; arguments as in :meth:`prepare`."""
        return np.concatenate(list(self.prepare(prompt, photos, **options).latents()))

    def decode(self, latents: Float[np.ndarray, "B h w C"]) -> list[Image.Image]:
        """Decodes scaled latents, of :meth:`generate_latents` or :class:`Progress`, to images."""
        pixels = self._program("decode", 0)(loaded(self.parts.vae).params, latents)
        return [Image.fromarray(x) for x in images.to_uint8(np.asarray(pixels))]

    def __repr__(self) -> str:
        """Without the parameters."""
        return f"PersonaPipeline({self.source!r}, image_size={self.image_size})"

    def _program(self, kind: str, steps: int) -> Callable:
        """The compiled program "images" or "latents" for a number of steps, or "decode"."""
        if (kind, steps) not in self._programs:
            self._programs[kind, steps] = self._make_program(kind, steps)
        return self._programs[kind, steps]

    def _make_program(self, kind: str, steps: int) -> Callable:
        if kind == "images":
            return generation.make_sampler(self.parts, steps=steps)
        if kind == "decode":
            return jax.jit(lambda params, latents: generation.decode(self.parts, params, latents))
        sampler: Sampler = generation.make_latent_sampler(self.parts, steps=steps)
        return jax.jit(generation.split_among_devices(sampler), compiler_options=compiler_options())

    def _latent_size(
        self, height: int | None, width: int | None, latents: np.ndarray | None
    ) -> tuple[int, int]:
        """Height and width of the latents.

        Raises:
          UserError: a side is not a multiple of the total downscaling, or not that of `latents`.
        """
        halvings = len(loaded(self.parts.unet).module.config.block_out_channels) - 1
        downscale = loaded(self.parts.vae).module.config.downscale
        least = downscale * 2**halvings
        if latents is not None:
            if np.ndim(latents) != 4 or latents.shape[3] != self.parts.latent_shape[2]:
                raise UserError(
                    f"latents: {np.shape(latents)}; expected [num, h, w, "
                    f"{self.parts.latent_shape[2]}]",
                    argument="latents",
                )
            defaults = tuple(side * downscale for side in latents.shape[1:3])
        else:
            defaults = (self.image_size, self.image_size)
        latent_sides = []
        for name, requested, default in zip(
            ("height", "width"), (height, width), defaults, strict=True
        ):
            if latents is not None and requested not in (None, default):
                raise UserError(f"{name} {requested}: the latents are of {default}", argument=name)
            pixels = default if requested is None else requested
            if pixels < least or pixels % least:
                raise UserError(f"{name} {pixels}: expected a multiple of {least}", argument=name)
            latent_sides.append(pixels // downscale)
        return latent_sides[0], latent_sides[1]


def load_pipeline(
    source: str, *, image_encoder: str | None = None, dtype: str = "auto"
) -> PersonaPipeline:
    """Opens a pipeline in diffusers' layout.

    Args:
      source: "tiny", the base that comes with the package; a folder; or a hub id, "owner/name".
      image_encoder: folder or hub id of the image encoder, for adapter files on a pipeline that has
        none of its own (Stable Diffusion 1.5: "h94/IP-Adapter/models/image_encoder").
      dtype: "float32", "bfloat16", or "auto": bfloat16 on accelerators, float32 on CPU.

    Raises:
      UserError: files are missing or do not fit; they are named.
    """
    return PersonaPipeline(str(source), image_encoder=image_encoder, dtype=dtype)


def _one_each(
    adapter: LoadedAdapter | Sequence[LoadedAdapter] | None, sets: int
) -> list[LoadedAdapter]:
    """Returns one adapter for each set of photos."""
    if adapter is None:
        given: list[LoadedAdapter] = []
    else:
        given = [adapter] if isinstance(adapter, LoadedAdapter) else list(adapter)
    if bool(given) != bool(sets):
        missing = "photos" if given else "adapter"
        raise UserError(
            f"{missing}: none; adapters go with photos, and photos with adapters", argument=missing
        )
    if len(given) not in (0, 1, sets):
        raise UserError(
            f"adapter: {len(given)} of them for {sets} sets of photos; one for all or one each",
            argument="adapter",
        )
    return given * sets if len(given) == 1 else given


def _prompts(prompt: str | Sequence[str], num: int | None) -> list[str]:
    """Returns one prompt for each image."""
    if num is not None and num < 1:
        raise UserError(f"num {num}: at least one image", argument="num")
    if isinstance(prompt, str):
        return [prompt] * (1 if num is None else num)
    if not prompt or num not in (None, len(prompt)):
        raise UserError(f"num: {num} images for {len(prompt)} prompts; one each", argument="num")
    return list(prompt)


def _document(method: Any) -> None:
    """Sets a method's signature, so that ``help()`` and notebooks list the options."""
    method.__signature__ = inspect.signature(PersonaPipeline.prepare).replace(
        return_annotation=inspect.signature(method).return_annotation
    )


_document(PersonaPipeline.__call__)
_document(PersonaPipeline.generate_latents)
