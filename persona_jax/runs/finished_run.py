"""Opening of a finished run, of any method, an adapter file or a base for generation."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from persona_jax.interop import folders
from persona_jax.interop.aggregator_files import load_aggregator
from persona_jax.interop.checkpoints import load_newest, read_fingerprint
from persona_jax.interop.ip_adapter import load_ip_adapter, plus_dim
from persona_jax.methods import adapter_training, finetuning
from persona_jax.models.adapter import Adapter
from persona_jax.models.aggregators import EveryPhoto, known_kind
from persona_jax.models.unet import text_kernels
from persona_jax.pipelines.image_encoders import ImageEncoder, open_image_encoder
from persona_jax.pipelines.pipeline import Pipeline, open_pipeline, require_trained_on
from persona_jax.runtime import checksums, settings
from persona_jax.runtime.run_folder import read_run


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """Sampling settings.

    Attributes:
      steps: of DDIM.
      guidance: g of classifier-free guidance.
      eta: η of DDIM.
      scale: λ of an adapter; ignored by other methods.
    """

    steps: int
    guidance: float
    eta: float
    scale: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, or an adapter file or base opened like one.

    Attributes:
      workdir: of the run, or path of the file or base.
      config: of the run.
      pipeline: the frozen base.
      encoder: image encoder of the adapter; None without an adapter.
      adapter: None for per-person fine-tuning, and for a base.
      step: of the checkpoint that was read, the newest complete one; None without a checkpoint.
    """

    workdir: Path
    config: ConfigDict
    pipeline: Pipeline
    encoder: ImageEncoder | None = None
    adapter: Adapter | None = None
    step: int | None = None

    @property
    def personal(self) -> bool:
        """Whether the method is per-person fine-tuning."""
        return self.config.method in finetuning.METHODS

    def sampling_settings(self, **changes: float | int | None) -> SamplingSettings:
        """The config's sampling settings, replaced by those of `changes` that are not None."""
        sampling = self.config.sampling
        chosen = {
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "eta": sampling.eta,
            "scale": sampling.get("scale", 1.0),
        }
        given = {name: value for name, value in changes.items() if value is not None}
        return SamplingSettings(**(chosen | given))

    def prompt(self, prompt: str) -> str:
        """The prompt for the method: with the rare token for per-person fine-tuning."""
        if not self.personal:
            return prompt
        return finetuning.insert_token(prompt, self.config.token, self.config.nouns)


def open_run(
    workdir: Path,
    crop: float | None = None,
    weights: str | None = None,
    pipeline: Pipeline | None = None,
) -> Run:
    """Opens a finished run.

    Args:
      workdir: of a run of persona_jax.train.
      crop: central part of a photo that the image encoder gets; None: as in training.
      weights: of an adapter, "ema" or "params"; None: the running average, if there is one.
      pipeline: the run's base with the run's image encoder; None: it is opened.

    Raises:
      UserError: there is no run, files do not fit, or the base or image encoder is not the one that
        the run was trained with.
    """
    config = read_run(workdir)
    if crop is not None:
        config.data.crop = crop
    pipeline = pipeline or open_pipeline(config)
    if config.method in finetuning.METHODS:
        for file in sorted(workdir.glob("people/*/person.json")):
            finetuning.require_trained_on_base(file.parent, pipeline)
        return Run(workdir, config, pipeline)
    sizes = known_kind(config.aggregator.kind).sizes
    where = str(workdir / "config.json")
    settings.require(config, {f"aggregator.{name}": int for name in sizes}, where)
    which = weights or ("ema" if config.optimizer.ema_decay else "params")
    trained, base = read_fingerprint(workdir / "checkpoints"), pipeline.source
    require_trained_on(workdir, base, pipeline.tower("unet").hash, trained.get("unet"))
    encoder = open_image_encoder(config, pipeline)
    if crop is None:  # the encoder's hash includes the crop
        place = config.image_encoder.get("path") or base
        require_trained_on(
            workdir, place, encoder.hash, trained.get("image_encoder"), "image encoder"
        )
    step, params = load_newest(workdir / "checkpoints", which)
    adapter = Adapter(adapter_training.make_aggregator(config.aggregator), params, encoder.blank)
    return Run(workdir, config, pipeline, encoder, adapter, step)


def open_base(base: str) -> Run:
    """Opens a base alone, to generate from text, with :func:`outside_settings`."""
    config = outside_settings(base)
    config.image_encoder.kind = "none"
    return Run(Path(base), config, open_pipeline(config))


def outside_settings(base: str, crop: float = 1.0) -> ConfigDict:
    """The configuration of a base or an adapter that has none of its own."""
    return ConfigDict(
        {
            "method": "adapter",
            "pipeline": base,
            "dtype": "auto",
            "image_encoder": {"kind": "clip", "path": ""},
            "data": {"crop": crop},
            "sampling": {"steps": 30, "guidance": 5.0, "eta": 0.0, "scale": 1.0},
        }
    )


def open_adapter(
    path: Path,
    base: str,
    crop: float = 1.0,
    pipeline: Pipeline | None = None,
) -> Run:
    """Opens an adapter file in IP-Adapter's plain or Plus layout, or an exported folder.

    Exported folders are written by :mod:`persona_jax.export`. A file has no aggregator: each photo
    gives tokens of its own, as in diffusers, unless the file is a resampler of whole embeddings,
    which reads them as a set.

    Args:
      path: the file or folder.
      base: what it is for, as in ``config.pipeline``.
      crop: central part of a photo that the image encoder gets.
      pipeline: the base, where it is open already, with its image encoder.

    Raises:
      UserError: files that are missing or do not fit.
    """
    config = outside_settings(base, crop)
    pipeline = pipeline or open_pipeline(config)
    unet, tower = pipeline.tower("unet"), pipeline.image_encoder
    file = path / "ip_adapter.safetensors" if path.is_dir() else path
    if path.is_dir():
        checksums.verify(path, ["aggregator.json"], "export it again")
        kind = str(folders.read_json(path / "aggregator.json").get("kind"))
    else:
        # What it reads tells what it is; where both are as long, it is as published.
        patches = tower is not None and plus_dim(file) == tower.module.config.hidden_size
        kind = "plus" if patches else "every"
    config.aggregator = ConfigDict({"kind": kind})
    encoder = open_image_encoder(config, pipeline)
    aggregator, learnt = (
        load_aggregator(path, encoder.dim) if path.is_dir() else (EveryPhoto(kind), {})
    )
    kernels = text_kernels(unet.params, unet.module.config)
    params = load_ip_adapter(file, unet.module.config, kernels, encoder.dim) | {
        "aggregator": learnt
    }
    return Run(path, config, pipeline, encoder, Adapter(aggregator, params, encoder.blank))
