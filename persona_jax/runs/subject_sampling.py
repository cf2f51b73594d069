"""Sampling of subjects by a finished run, with the same requests for every method."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from persona_jax.data.photo_datasets import Photos
from persona_jax.evaluation.evaluators import Subjects
from persona_jax.methods import finetuning_loop
from persona_jax.models.adapter import Adapter
from persona_jax.pipelines import generation
from persona_jax.runs.finished_run import Run, SamplingSettings

AT_ONCE = 32
"""Pictures in a batch."""


def make_run_sampler(
    run: Run,
    settings: SamplingSettings,
    sampler: generation.Sampler | None = None,
    *,
    adapters: Sequence[Adapter] | None = None,
) -> Callable[..., Float[np.ndarray, "P H W 3"]]:
    """Makes a function that generates images of people with a run.

    It is compiled once for all calls with the same number of reference slots.

    Args:
      run: to sample from.
      settings: of sampling.
      sampler: of :func:`persona_jax.pipelines.generation.make_sampler`, shared by runs on the same
        base to compile once; None: a new one.
      adapters: replace the run's one.
    """
    sampler = sampler or generation.make_sampler(run.pipeline, steps=settings.steps)
    frozen = generation.sampler_params(run.pipeline)
    if adapters is None:
        adapters = [run.adapter] if run.adapter else []

    def sample_people(
        prompts: Sequence[str],
        keys: Key[Array, " P"],
        *,
        names: Sequence[str] | None = None,
        references: Sequence[generation.References] = (),
    ) -> Float[np.ndarray, "P H W 3"]:
        """Generates P images in [−1, 1]; from text alone without `names` and `references`.

        Args:
          prompts: one for each image, from :meth:`Run.prompt`.
          keys: one for each image.
          names: the person of each image, for per-person fine-tuning.
          references: one for each adapter.
        """
        ids, _ = run.pipeline.tokenize(list(prompts))
        negative, _ = run.pipeline.tokenize([""])
        request = generation.make_request(
            keys,
            ids,
            negative,
            references=references,
            guidance=settings.guidance,
            eta=settings.eta,
        )
        if names is None:
            active = adapters if references else ()
            return generation.in_batches(sampler, frozen, active, request, AT_ONCE)
        out: dict[int, np.ndarray] = {}
        for name in dict.fromkeys(names):
            rows = np.flatnonzero(np.asarray(names) == name)
            own = finetuning_loop.load_person(run.workdir, name, run.pipeline, run.config)
            size = min(AT_ONCE, len(rows))
            some = generation.some_of(request, rows)
            pictures = generation.in_batches(sampler, frozen | own, (), some, size)
            out |= dict(zip(rows.tolist(), pictures, strict=True))
        return np.stack([out[i] for i in range(len(names))])

    return sample_people


def encode_references(
    run: Run, photos: Photos, subjects: Subjects
) -> Float[np.ndarray, "P N *D"] | None:
    """Embeds the references of each subject; None for per-person fine-tuning."""
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
    """Generates the images of ``subjects.pictures``, from the same noise for every run.

    Args:
      run: for per-person fine-tuning, it must have finished these people.
      sampler: of :func:`make_run_sampler`.
      subjects: the people.
      seen: embeddings of their references, for adapters; None: text alone.
      scale: λ of an adapter.
      num_references: how many of the references are used; None: all.
      named: for per-person fine-tuning, insert the rare token into each prompt; otherwise the
        prompts are unchanged and describe any person.
      seed: of the noise.

    Returns:
      Images in [−1, 1] ``[Q, H, W, 3]``.
    """
    person_of_image, prompts = map(list, zip(*subjects.pictures, strict=True))
    keys = generation.picture_keys(seed, len(prompts))
    if run.personal:
        wanted = [run.prompt(prompt) for prompt in prompts] if named else prompts
        return sampler(wanted, keys, names=[subjects.names[i] for i in person_of_image])
    if seen is None:
        return sampler(prompts, keys)
    counts = np.arange(seen.shape[1]) < (
        seen.shape[1] if num_references is None else num_references
    )
    weights = np.broadcast_to(counts.astype(np.float32), (len(person_of_image), len(counts)))
    references = generation.References(
        jnp.asarray(seen[person_of_image]), jnp.asarray(weights), scale
    )
    return sampler(prompts, keys, references=[references])
