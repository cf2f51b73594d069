"""A pipeline to call: a prompt and photos in, images out."""

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
from persona_jax.data import images as pictures
from persona_jax.data.photo_files import Photo
from persona_jax.errors import UserError
from persona_jax.pipelines import generation
from persona_jax.pipelines.generation import Sampler
from persona_jax.pipelines.scales import ByBlock, Number
from persona_jax.runs.finished_run import SamplingSettings
from persona_jax.runs.reference_sets import ReferenceSet
from persona_jax.runtime.compilation import compiler_options

Latents = Float[np.ndarray, "num h w C"]
BATCH = 8
"""Images generated at once, where nobody says."""


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
    """A pipeline folder, opened to generate with; from :func:`load_pipeline`.

    Its compiled programs are kept: other prompts, photos, seeds, scales, masks or guidance use
    them again; other numbers of images at once, photos, steps or another size compile new ones.
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
        """Reads the photos and checks everything; generates nothing yet.

        Args:
          prompt: one for all images, or one for each.
          photos: of one person: paths, Pillow images, or arrays of bytes or of floats from 0 to 1.
          adapter: what reads them. With `references`: one for all sets, or one for each.
          references: several people, in place of `photos` and the five arguments that follow.
          weights: how much each photo counts: 0 leaves it out, 2 counts it twice.
          scale: λ, how much the photos count; numbers by block as diffusers has them,
            ``{"down": 0, "up": {"block_0": [0, 1, 0]}}``; None: as the adapter was trained.
          mask: white where the person is to be.
          window: the photos count from this share of the steps on, and up to that one.
          negative_photos: to move away from.
          person: weights of one person, in place of an adapter.
          loras: LoRA files, each alone or with how much it counts, ``("style.safetensors", 0.8)``.
          negative_prompt: to move away from.
          num: images; None: one, or one for each prompt.
          seed: of the noise. Image i of a seed is the same whatever `num` and `batch_size` are, up
            to rounding.
          steps: of DDIM. None here and below: as the first adapter or the person was trained.
          guidance: g of classifier-free guidance.
          eta: η of DDIM; 0 is deterministic, 1 ancestral.
          height, width: in pixels; None: as the UNet was trained.
          latents: z_T ``[num, h, w, C]`` in place of the seed's noise.
          batch_size: images at once.
          callback: called after every step; an exception that it raises ends the call. Each step
            is then a program run of its own.

        Raises:
          UserError: an argument that cannot be, or a photo that cannot be read; names it.
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
        """Scaled latents z_0 in place of images; arguments and errors as in :meth:`prepare`."""
        return np.concatenate(list(self.prepare(prompt, photos, **options).latents()))

    def decode(self, latents: Float[np.ndarray, "B h w C"]) -> list[Image.Image]:
        """Images of latents, as :meth:`generate_latents` and :class:`Progress` have them."""
        pixels = self._program("decode", 0)(loaded(self.parts.vae).params, latents)
        return [Image.fromarray(x) for x in pictures.to_uint8(np.asarray(pixels))]

    def __repr__(self) -> str:
        """Without the parameters."""
        return f"PersonaPipeline({self.source!r}, image_size={self.image_size})"

    def _program(self, kind: str, steps: int) -> Callable:
        """A compiled program: "images" or "latents" of so many steps, or "decode"."""
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
          UserError: not a multiple of what VAE and UNet halve, or not the size of `latents`.
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
            whole = tuple(side * downscale for side in latents.shape[1:3])
        else:
            whole = (self.image_size, self.image_size)
        out = []
        for name, asked, there in zip(("height", "width"), (height, width), whole, strict=True):
            if latents is not None and asked not in (None, there):
                raise UserError(f"{name} {asked}: the latents are of {there}", argument=name)
            pixels = there if asked is None else asked
            if pixels < least or pixels % least:
                raise UserError(f"{name} {pixels}: expected a multiple of {least}", argument=name)
            out.append(pixels // downscale)
        return out[0], out[1]


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
      UserError: what is missing or does not fit, by name.
    """
    return PersonaPipeline(str(source), image_encoder=image_encoder, dtype=dtype)


def _one_each(
    adapter: LoadedAdapter | Sequence[LoadedAdapter] | None, sets: int
) -> list[LoadedAdapter]:
    """An adapter for each set of photos."""
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
    """One for each image."""
    if num is not None and num < 1:
        raise UserError(f"num {num}: at least one image", argument="num")
    if isinstance(prompt, str):
        return [prompt] * (1 if num is None else num)
    if not prompt or num not in (None, len(prompt)):
        raise UserError(f"num: {num} images for {len(prompt)} prompts; one each", argument="num")
    return list(prompt)


def _document(method: Any) -> None:
    """Shows a method's options by name in ``help()`` and in notebooks."""
    method.__signature__ = inspect.signature(PersonaPipeline.prepare).replace(
        return_annotation=inspect.signature(method).return_annotation
    )


_document(PersonaPipeline.__call__)
_document(PersonaPipeline.generate_latents)
