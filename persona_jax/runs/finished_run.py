"""A finished run, opened to paint with: people and prompts in, pictures out, for every method."""

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
    """How to sample.

    Attributes:
      steps: of DDIM.
      guidance: g of classifier-free guidance.
      eta: η of DDIM.
      scale: λ of an adapter; of no account elsewhere.
    """

    steps: int
    guidance: float
    eta: float
    scale: float


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds.

    Attributes:
      workdir: of the run.
      config: as it was run.
      pipeline: the frozen base.
      encoder: what the adapter looks at photos with; None where there is none.
      adapter: None where weights belong to people.
      step: of the checkpoint that was read, the newest whole one; None where none was.
    """

    workdir: Path
    config: ConfigDict
    pipeline: Pipeline
    encoder: ImageEncoder | None = None
    adapter: Adapter | None = None
    step: int | None = None

    @property
    def personal(self) -> bool:
        """Whether the weights belong to people."""
        return self.config.method in finetuning.METHODS

    def sampling_settings(self, **changes: float | int | None) -> SamplingSettings:
        """The config's, but for those of `changes` that are not None."""
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
        """The prompt as the method wants it: with the rare token, where it has one."""
        if not self.personal:
            return prompt
        return finetuning.insert_token(prompt, self.config.token, self.config.nouns)


def open_run(
    workdir: Path,
    crop: float | None = None,
    weights: str | None = None,
    pipeline: Pipeline | None = None,
) -> Run:
    """Reads what `workdir` holds.

    Args:
      workdir: of a run of persona_jax.train.
      crop: central part of a photo that the image encoder looks at; None: as in training.
      weights: of an adapter, "ema" or "params"; None: the running average, where there is one.
      pipeline: the run's base, where it is open already, with the run's image encoder.

    Raises:
      UserError: no run there, files that do not fit, or another base or image encoder than the run
        was trained with.
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
    require_trained_on(workdir, base, pipeline.unet.hash, trained.get("unet"))
    encoder = open_image_encoder(config, pipeline)
    if crop is None:  # which the encoder's hash counts in
        place = config.image_encoder.get("path") or base
        require_trained_on(workdir, place, encoder.hash, trained.get("eye"), "image encoder")
    step, params = load_newest(workdir / "checkpoints", which)
    learnt = Adapter(adapter_training.make_aggregator(config.aggregator), params, encoder.blank)
    return Run(workdir, config, pipeline, encoder, learnt, step)


def open_base(base: str) -> Run:
    """A base alone, to generate from text; of :func:`open_adapter`'s settings."""
    config = outside_settings(base)
    config.image_encoder.kind = "none"
    return Run(Path(base), config, open_pipeline(config))


def outside_settings(base: str, crop: float = 1.0) -> ConfigDict:
    """Settings of what was not trained here."""
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
    """An adapter from a file in IP-Adapter's plain or Plus layout, or from a folder that
    :mod:`persona_jax.export` wrote.

    A file has no aggregator: each photo makes tokens of its own, as stock diffusers has it; unless
    it is a resampler of whole embeddings, which reads them as a set.

    Args:
      path: the file or folder.
      base: what it is for, as in ``config.pipeline``.
      crop: central part of a photo that the image encoder looks at.
      pipeline: the base, where it is open already, with its image encoder.

    Raises:
      UserError: files that are missing or do not fit.
    """
    config = outside_settings(base, crop)
    pipeline = pipeline or open_pipeline(config)
    unet, tower = pipeline.unet, pipeline.image_encoder
    file = path / "ip_adapter.safetensors" if path.is_dir() else path
    if path.is_dir():
        checksums.verify(path, ["aggregator.json"], "export it again")
        kind = folders.read_json(path / "aggregator.json").get("kind")
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
