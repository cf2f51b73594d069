"""A finished run, opened to paint with: people and prompts in, pictures out, for every method."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from persona_jax.data.photos import Photos
from persona_jax.evaluation.evaluators import Subjects
from persona_jax.interop import folders
from persona_jax.interop.aggregator_files import load_aggregator
from persona_jax.interop.checkpoints import load_newest
from persona_jax.interop.ip_adapter import load_ip_adapter, plus_dim
from persona_jax.methods import adapter_training, finetuning, finetuning_loop
from persona_jax.models.adapter import Adapter
from persona_jax.models.aggregators import EveryPhoto
from persona_jax.models.unet import text_kernels
from persona_jax.pipelines import generation
from persona_jax.pipelines.image_encoders import ImageEncoder, open_image_encoder
from persona_jax.pipelines.pipeline import Pipeline, open_pipeline
from persona_jax.runtime import checksums
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


def open_run(workdir: Path, crop: float | None = None, weights: str | None = None) -> Run:
    """Reads what `workdir` holds.

    Args:
      workdir: of a run of persona_jax.train.
      crop: central part of a photo that the image encoder looks at; None: as in training.
      weights: of an adapter, "ema" or "params"; None: the running average, where there is one.

    Raises:
      UserError: no run there, or files that do not fit.
    """
    config = read_run(workdir)
    if crop is not None:
        config.data.crop = crop
    pipeline = open_pipeline(config)
    if config.method in finetuning.METHODS:
        return Run(workdir, config, pipeline)
    which = weights or ("ema" if config.optimizer.ema_decay else "params")
    step, params = load_newest(workdir / "checkpoints", which)
    encoder = open_image_encoder(config, pipeline)
    learnt = Adapter(adapter_training.make_aggregator(config.aggregator), params, encoder.blank)
    return Run(workdir, config, pipeline, encoder, learnt, step)


def open_base(base: str) -> Run:
    """A base alone, to paint with from text; of :func:`open_adapter`'s settings."""
    config = _outside(base)
    config.image_encoder.kind = "none"
    return Run(Path(base), config, open_pipeline(config))


def _outside(base: str, image_encoder: str | None = None, crop: float = 1.0) -> ConfigDict:
    """Settings of what was not trained here."""
    return ConfigDict(
        {
            "method": "adapter",
            "pipeline": base,
            "dtype": "auto",
            "image_encoder": {"kind": "clip", "path": image_encoder or ""},
            "data": {"crop": crop},
            "sampling": {"steps": 30, "guidance": 5.0, "eta": 0.0, "scale": 1.0},
        }
    )


def open_adapter(path: Path, base: str, image_encoder: str | None = None, crop: float = 1.0) -> Run:
    """An adapter from a file in IP-Adapter's plain or Plus layout, or from a folder that
    :mod:`persona_jax.export` wrote.

    A file has no aggregator: each photo makes tokens of its own, as stock diffusers has it; unless
    it is a resampler of whole embeddings, which reads them as a set.

    Args:
      path: the file or folder.
      base: what it is for, as in ``config.pipeline``.
      image_encoder: where the base has none.
      crop: central part of a photo that the image encoder looks at.

    Raises:
      UserError: files that are missing or do not fit.
    """
    config = _outside(base, image_encoder, crop)
    pipeline = open_pipeline(config)
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


def make_run_sampler(
    run: Run,
    settings: SamplingSettings,
    batch_size: int = 32,
    sampler: generation.Sampler | None = None,
    *,
    adapters: Sequence[Adapter] | None = None,
    towers: Mapping | None = None,
) -> Callable[..., Float[np.ndarray, "P H W 3"]]:
    """A function that paints people with a run; compiled once for all calls with as many reference
    slots.

    Args:
      run: what to paint with.
      settings: how.
      batch_size: pictures at a time.
      sampler: :func:`persona_jax.pipelines.generation.make_sampler`'s, of another run on the same
        base, to compile less.
      adapters: in place of the run's one.
      towers: in place of the base's, by name.
    """
    sampler = sampler or generation.make_sampler(run.pipeline, steps=settings.steps)
    frozen = generation.sampler_params(run.pipeline) | dict(towers or {})
    if adapters is None:
        adapters = [run.adapter] if run.adapter else []

    def sample_people(
        prompts: Sequence[str],
        keys: Key[Array, " P"],
        *,
        names: Sequence[str] | None = None,
        references: Sequence[generation.References] = (),
        negative_prompt: str = "",
    ) -> Float[np.ndarray, "P H W 3"]:
        """P pictures in [−1, 1]: of the people that references tell of, or of people by name; of
        nobody in particular where neither is given.

        Args:
          prompts: one a picture, as :meth:`Run.prompt` gives them.
          keys: one a picture.
          names: whom, where weights belong to people.
          references: one for each adapter.
          negative_prompt: for all.
        """
        ids, _ = run.pipeline.tokenize(list(prompts))
        negative, _ = run.pipeline.tokenize([negative_prompt])
        request = generation.Request(
            keys=keys,
            ids=jnp.asarray(ids),
            negative_ids=jnp.repeat(jnp.asarray(negative), len(ids), axis=0),
            references=tuple(references),
            guidance=settings.guidance,
            eta=settings.eta,
        )
        if names is None:
            active = adapters if references else ()
            return generation.in_batches(sampler, frozen, active, request, batch_size)
        out: dict[int, np.ndarray] = {}
        for name in dict.fromkeys(names):
            rows = np.flatnonzero(np.asarray(names) == name)
            own = finetuning_loop.load_person(run.workdir, name, run.pipeline, run.config)
            size = min(batch_size, len(rows))
            some = generation.some_of(request, rows)
            pictures = generation.in_batches(sampler, frozen | own, (), some, size)
            out |= dict(zip(rows.tolist(), pictures, strict=True))
        return np.stack([out[i] for i in range(len(names))])

    return sample_people


def encode_references(
    run: Run, photos: Photos, subjects: Subjects
) -> Float[np.ndarray, "P N *D"] | None:
    """What the run's encoder sees in the references of each; None where weights belong to
    people."""
    if run.encoder is None:
        return None
    return np.stack(
        [run.encoder.encode(map(photos.image, rows)) for rows in subjects.references.tolist()]
    )


def sample_subjects(
    run: Run,
    sampler: Callable[..., Float[np.ndarray, "Q H W 3"]],
    subjects: Subjects,
    seen: Float[np.ndarray, "P N *D"] | None = None,
    *,
    scale: float = 1.0,
    num_references: int | None = None,
    named: bool = True,
    seed: int = 0,
) -> Float[np.ndarray, "Q H W 3"]:
    """The pictures that subjects ask for, from the same noise whatever the run.

    Args:
      run: where weights belong to people, it must know these.
      sampler: :func:`make_run_sampler`'s.
      subjects: the people.
      seen: their references' embeddings, for adapters; None: text alone.
      scale: λ of an adapter.
      num_references: how many of the references count; None: all.
      named: where weights belong to people, call each by the rare token; else the prompts stay as
        they are, and ask for anybody.
      seed: of the noise.
    """
    who, prompts = map(list, zip(*subjects.pictures, strict=True))
    keys = generation.picture_keys(seed, len(prompts))
    if run.personal:
        wanted = [run.prompt(prompt) for prompt in prompts] if named else prompts
        return sampler(wanted, keys, names=[subjects.names[i] for i in who])
    if seen is None:
        return sampler(prompts, keys)
    counts = np.arange(seen.shape[1]) < (
        seen.shape[1] if num_references is None else num_references
    )
    weights = np.broadcast_to(counts.astype(np.float32), (len(who), len(counts)))
    references = generation.References(jnp.asarray(seen[who]), jnp.asarray(weights), scale)
    return sampler(prompts, keys, references=[references])
