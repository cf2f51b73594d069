"""Loading of adapters, fine-tuned people and LoRA files for an open pipeline."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from persona_jax.api.bases import Base
from persona_jax.errors import UserError
from persona_jax.interop import folders
from persona_jax.interop.checkpoints import read_fingerprint
from persona_jax.interop.lora_files import load_lora
from persona_jax.methods import finetuning
from persona_jax.models import lora
from persona_jax.models.adapter import Adapter
from persona_jax.pipelines import generation
from persona_jax.pipelines.image_encoders import ImageEncoder
from persona_jax.pipelines.pipeline import require_trained_on
from persona_jax.runs import finished_run
from persona_jax.runs.finished_run import SamplingSettings
from persona_jax.runtime import buckets, finite
from persona_jax.runtime.run_folder import read_config

PathLike = str | Path
Lora = PathLike | tuple[PathLike, float | int]
"""A LoRA file, or the file and its factor."""


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
    """An adapter with its image encoder; from :func:`load_adapter`.

    Attributes:
      path: where it was loaded from.
      model: the aggregator and the adapter's parameters.
      encoder: photos → embeddings.
      crop: central part of a photo that the encoder gets, a fraction of its shorter side.
      settings: sampling settings of its run, the defaults of a call.
      base_hash: hash of the UNet it belongs to.
      step: of the checkpoint that was read; None for a file.
    """

    path: str
    model: Adapter
    encoder: ImageEncoder
    crop: float
    settings: SamplingSettings
    base_hash: str
    step: int | None = None

    @property
    def kind(self) -> str:
        """Kind of the aggregator: "self_attention", "avg", "max", "first", "every", "plus", …"""
        return self.model.aggregator.kind

    def __repr__(self) -> str:
        """Without the parameters."""
        return f"LoadedAdapter({self.path!r}, kind={self.kind!r}, crop={self.crop:g})"


@dataclasses.dataclass(frozen=True)
class LoadedPerson:
    """The weights of one person of a DreamBooth or LoRA run; from :func:`load_person`.

    Attributes:
      path: of the run.
      name: of the person.
      towers: parameters that replace the base's, ``{"unet", "text_encoder"}``.
      token, nouns: the rare token is inserted before the first of the nouns in a prompt.
      settings: as in :class:`LoadedAdapter`.
      base_hash: hash of the UNet they belong to.
    """

    path: str
    name: str
    towers: Mapping[str, Mapping[str, Any]]
    token: str
    nouns: tuple[str, ...]
    settings: SamplingSettings
    base_hash: str

    def prompt(self, prompt: str) -> str:
        """The prompt with the person's token. Raises UserError if it has none of the nouns."""
        return finetuning.insert_token(prompt, self.token, self.nouns)

    def __repr__(self) -> str:
        """Without the parameters."""
        return f"LoadedPerson({self.path!r}, {self.name!r})"


def load_adapter(
    path: PathLike,
    pipe: Base,
    *,
    crop: float | None = None,
    weights: Literal["ema", "params"] | None = None,
) -> LoadedAdapter:
    """Loads an adapter for a pipeline.

    Args:
      path: a run of ``persona-jax train``; an IP-Adapter or IP-Adapter-Plus file for Stable
        Diffusion 1.5 (``.safetensors`` or ``.bin``); a folder that ``persona-jax export`` wrote; or
        "tiny", the adapter that comes with the base of that name.
      pipe: from :func:`persona_jax.load_pipeline`.
      crop: central part of a photo that the image encoder gets, above 0 and at most 1; None: as
        in training, or 1.
      weights: of a run, the running average or the last step; None: the average, if there is one.

    Raises:
      UserError: the path does not exist, files do not fit, or the adapter was trained with another
        base or image encoder.
    """
    if crop is not None and not 0 < crop <= 1:
        raise UserError(f"crop {crop:g}: expected above 0 and at most 1", argument="crop")
    shipped = folders.SHIPPED.get(str(path))
    local = shipped / "ip_adapter.safetensors" if shipped else buckets.local(path)
    if not local.exists():
        raise UserError(
            f"{path}: no such adapter; expected a run, an IP-Adapter file or an exported folder"
        )
    if (local / "config.json").is_file():
        run = _open_run(local, pipe, crop, weights)
    else:
        run = finished_run.open_adapter(
            local, pipe.source, crop=crop or 1.0, pipeline=pipe.with_image_encoder()
        )
    assert run.adapter is not None
    assert run.encoder is not None
    return LoadedAdapter(
        path=str(path),
        model=run.adapter,
        encoder=run.encoder,
        crop=run.config.data.crop,
        settings=run.sampling_settings(),
        base_hash=pipe.hash,
        step=run.step,
    )


def _open_run(
    workdir: Path, pipe: Base, crop: float | None, weights: str | None
) -> finished_run.Run:
    config = read_config(workdir)
    method = config.get("method")
    if method in finetuning.METHODS:
        raise UserError(f"{workdir} is a run of {method}: open a person of it with load_person")
    if method is None:
        raise UserError(f"{workdir} is a run of pretrain; its pipeline is {workdir}/pipeline")
    trained = read_fingerprint(workdir / "checkpoints").get("unet")
    require_trained_on(workdir, pipe.source, pipe.hash, trained)
    parts = pipe.parts
    if config.image_encoder.kind == "clip":
        parts = pipe.with_image_encoder(config.image_encoder.path)
    return finished_run.open_run(workdir, crop, weights, parts)


def load_person(workdir: PathLike, name: str, pipe: Base) -> LoadedPerson:
    """Loads the weights of one person of a DreamBooth or LoRA run.

    Args:
      workdir: of the run.
      name: of a person it has finished.
      pipe: from :func:`persona_jax.load_pipeline`.

    Raises:
      UserError: the run is of another kind or base, has no such person, or files do not fit.
    """
    from persona_jax.methods import finetuning_loop  # imports the data sets

    local = buckets.local(workdir)
    config = read_config(local)
    if config.get("method") not in finetuning.METHODS:
        raise UserError(f"{workdir} is not a run of dreambooth or lora; open it with load_adapter")
    towers = finetuning_loop.load_person(local, name, pipe.parts, config)
    return LoadedPerson(
        path=str(workdir),
        name=name,
        towers=towers,
        token=config.token,
        nouns=tuple(config.nouns),
        settings=finished_run.Run(local, config, pipe.parts).sampling_settings(),
        base_hash=pipe.hash,
    )


def with_loras(towers: Mapping[str, Mapping[str, Any]], loras: Sequence[Lora]) -> dict[str, Any]:
    """Merges LoRA files into the base, in order.

    Args:
      towers: the base's parameters by name.
      loras: files, each alone (factor 1) or with its factor.

    Returns:
      Parameters of the towers that the files change, by name.

    Raises:
      UserError: a file does not exist or does not fit.
    """
    towers, changed = dict(towers), {}
    for one in loras:
        file, factor = one if isinstance(one, tuple) else (one, 1.0)
        updates = load_lora(buckets.local(file), towers)
        if huge := finite.beyond(updates, float(np.finfo(np.float16).max)):
            raise UserError(f"{file}: {huge}, which no LoRA has; fetch it again", argument="lora")
        for name, update in updates.items():
            changed[name] = towers[name] = lora.merge(towers[name], update, factor)
    return changed


def default_settings(base: str) -> SamplingSettings:
    """The default sampling settings of a base, without an adapter or a person."""
    sampling = finished_run.outside_settings(base).sampling
    return SamplingSettings(sampling.steps, sampling.guidance, sampling.eta, sampling.scale)


def frozen_params(base: Base, changed: Mapping[str, Any]) -> dict[str, Any]:
    """A sampler's frozen parameters: the base's, with the towers of `changed` replaced."""
    return generation.sampler_params(base.parts) | dict(changed)
