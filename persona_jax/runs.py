"""A finished run, opened to paint with: people and prompts in, pictures out, for every method."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from persona_jax import methods, paint, personal, tuning
from persona_jax.cli import read_config
from persona_jax.data.photos import Photos
from persona_jax.eyes import Eye, open_eye
from persona_jax.interop.aggregator_files import load_aggregator
from persona_jax.interop.checkpoints import load_params
from persona_jax.interop.ip_adapter import load_ip_adapter
from persona_jax.metrics.judging import Subjects
from persona_jax.models.aggregators import Aggregator, EveryPhoto
from persona_jax.models.unet import text_kernels
from persona_jax.pipeline import Pipeline, open_pipeline


@dataclasses.dataclass(frozen=True)
class Knobs:
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
      eye: what adapters look at photos with; None where weights belong to people.
      aggregator, params: an adapter; None where weights belong to people.
    """

    workdir: Path
    config: ConfigDict
    pipeline: Pipeline
    eye: Eye | None
    aggregator: Aggregator | None
    params: Mapping | None

    @property
    def personal(self) -> bool:
        """Whether the weights belong to people."""
        return self.params is None

    def knobs(self, **changes: float | int | None) -> Knobs:
        """The config's, but for those of `changes` that are not None."""
        sampling = self.config.sampling
        chosen = {
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "eta": sampling.eta,
            "scale": sampling.get("scale", 1.0),
        }
        given = {name: value for name, value in changes.items() if value is not None}
        return Knobs(**(chosen | given))

    def prompt(self, prompt: str) -> str:
        """The prompt as the method wants it: with the rare token, where it has one."""
        if not self.personal:
            return prompt
        return personal.call(prompt, self.config.token, self.config.noun)


def open_run(workdir: Path, crop: float | None = None, weights: str | None = None) -> Run:
    """Reads what `workdir` holds.

    Args:
      workdir: of a run of persona_jax.train.
      crop: central part of a photo that the eye looks at; None: as in training.
      weights: of an adapter, "ema" or "params"; None: the running average, where there is one.

    Raises:
      UserError: no run there, or files that do not fit.
    """
    config = read_config(workdir)
    if crop is not None:
        config.data.crop = crop
    pipeline = open_pipeline(config)
    if config.method in personal.METHODS:
        return Run(workdir, config, pipeline, None, None, None)
    which = weights or ("ema" if config.optimizer.ema_decay else "params")
    return Run(
        workdir,
        config,
        pipeline,
        eye=open_eye(config, pipeline),
        aggregator=methods.make_aggregator(config.aggregator),
        params=load_params(workdir / "checkpoints", which),
    )


def open_adapter(path: Path, base: str, image_encoder: str | None = None, crop: float = 1.0) -> Run:
    """An adapter from a file in IP-Adapter's plain layout, or from a folder that
    :mod:`persona_jax.export` wrote.

    A file has no aggregator: each photo makes tokens of its own, as stock diffusers has it.

    Args:
      path: the file or folder.
      base: what it is for, as in ``config.pipeline``.
      image_encoder: where the base has none.
      crop: central part of a photo that the eye looks at.

    Raises:
      UserError: files that are missing or do not fit.
    """
    config = ConfigDict(
        {
            "method": "adapter",
            "pipeline": base,
            "dtype": "auto",
            "image_encoder": {"kind": "clip", "path": image_encoder or ""},
            "data": {"crop": crop},
            "sampling": {"steps": 30, "guidance": 5.0, "eta": 0.0, "scale": 1.0},
        }
    )
    pipeline = open_pipeline(config)
    eye, unet = open_eye(config, pipeline), pipeline.unet
    kernels = text_kernels(unet.params, unet.module.config)
    aggregator, learnt, file = EveryPhoto(), {}, path
    if path.is_dir():
        aggregator, learnt = load_aggregator(path, eye.dim)
        file = path / "ip_adapter.safetensors"
    params = load_ip_adapter(file, unet.module.config, kernels, eye.dim)
    return Run(path, config, pipeline, eye, aggregator, params | {"aggregator": learnt})


def make_painter(
    run: Run,
    knobs: Knobs,
    batch_size: int = 32,
    painter: Callable[[Mapping, Mapping | None, paint.Request], Array] | None = None,
) -> Callable[..., Float[np.ndarray, "P H W 3"]]:
    """A function that paints people with a run; compiled once for all calls with as many reference
    slots.

    painter: :func:`persona_jax.paint.make_painter`'s, compiled for another run of the same kind, or
    with an aggregator in place of the run's own.
    """
    painter = painter or paint.make_painter(run.pipeline, run.aggregator, steps=knobs.steps)
    frozen = paint.frozen_params(run.pipeline)

    def paint_people(
        prompts: Sequence[str],
        keys: Key[Array, " P"],
        *,
        names: Sequence[str] | None = None,
        embeddings: Float[np.ndarray, "P N D"] | None = None,
        weights: Float[np.ndarray, "P N"] | None = None,
        negative_prompt: str = "",
    ) -> Float[np.ndarray, "P H W 3"]:
        """P pictures in [−1, 1]: of the people that reference embeddings tell of, or of people by
        name; of nobody in particular where neither is given.

        Args:
          prompts: one a picture, as :meth:`Run.prompt` gives them.
          keys: one a picture.
          names: whom, where weights belong to people.
          embeddings, weights: adapters' references.
          negative_prompt: for all.
        """
        ids, _ = run.pipeline.tokenize(list(prompts))
        negative, _ = run.pipeline.tokenize([negative_prompt])
        references = None
        if embeddings is not None:
            references = paint.References(
                jnp.asarray(embeddings), jnp.asarray(weights), knobs.scale
            )
        request = paint.Request(
            keys=keys,
            ids=jnp.asarray(ids),
            negative_ids=jnp.repeat(jnp.asarray(negative), len(ids), axis=0),
            references=references,
            guidance=knobs.guidance,
            eta=knobs.eta,
        )
        if names is None:
            return paint.in_batches(painter, frozen, run.params, request, batch_size)
        out: dict[int, np.ndarray] = {}
        for name in dict.fromkeys(names):
            rows = np.flatnonzero(np.asarray(names) == name)
            towers = tuning.load(run.workdir, name, run.pipeline, run.config)
            size = min(batch_size, len(rows))
            some = paint.some_of(request, rows)
            pictures = paint.in_batches(painter, frozen | towers, None, some, size)
            out |= dict(zip(rows.tolist(), pictures, strict=True))
        return np.stack([out[i] for i in range(len(names))])

    return paint_people


def look_at(run: Run, photos: Photos, whom: Subjects) -> Float[np.ndarray, "P N D"] | None:
    """What the run's eye sees in the references of each; None where weights belong to people."""
    if run.eye is None:
        return None
    sets = [[photos.image(row) for row in rows] for rows in whom.references.tolist()]
    return np.stack([run.eye.look(set_) for set_ in sets])


def paint_subjects(
    run: Run,
    painter: Callable[..., Float[np.ndarray, "Q H W 3"]],
    whom: Subjects,
    seen: Float[np.ndarray, "P N D"] | None = None,
    *,
    shown: int | None = None,
    named: bool = True,
    seed: int = 0,
) -> Float[np.ndarray, "Q H W 3"]:
    """The pictures that subjects ask for, from the same noise whatever the run.

    Args:
      run: where weights belong to people, it must know these.
      painter: :func:`make_painter`'s.
      whom: the people.
      seen: their references' embeddings, for adapters; None: text alone.
      shown: how many of the references count; None: all.
      named: where weights belong to people, call each by the rare token; else the prompts stay as
        they are, and ask for anybody.
      seed: of the noise.
    """
    who, prompts = map(list, zip(*whom.pictures, strict=True))
    keys = paint.picture_keys(seed, len(prompts))
    if run.personal:
        wanted = [run.prompt(prompt) for prompt in prompts] if named else prompts
        return painter(wanted, keys, names=[whom.names[i] for i in who])
    if seen is None:
        return painter(prompts, keys)
    counts = np.arange(seen.shape[1]) < (seen.shape[1] if shown is None else shown)
    weights = np.broadcast_to(counts.astype(np.float32), (len(who), len(counts)))
    return painter(prompts, keys, embeddings=seen[who], weights=weights)
