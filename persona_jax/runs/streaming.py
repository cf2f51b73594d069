"""Any number of pictures of one request, a batch at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from persona_jax.data import images
from persona_jax.methods import finetuning_loop
from persona_jax.models.adapter import Adapter
from persona_jax.pipelines import generation
from persona_jax.pipelines.generation import References
from persona_jax.runs.finished_run import Run, SamplingSettings

Stream = Callable[[Sequence[References]], Iterator[UInt8[np.ndarray, "_ H W 3"]]]
"""References of one batch, one for each adapter → batches of pictures, the last one shorter."""


def make_stream(
    run: Run,
    settings: SamplingSettings,
    *,
    prompts: tuple[str, str],
    seed: int,
    num: int,
    size: int,
    adapters: Sequence[Adapter] = (),
    towers: Mapping | None = None,
    person: str | None = None,
) -> Stream:
    """A function that paints `num` pictures, `size` at a time; compiled once. What it needs in
    memory does not depend on `num`, nor does a picture.

    Args:
      run: what to paint with.
      settings: how.
      prompts: the prompt, as :meth:`Run.prompt` gives it, and the negative prompt.
      seed: of all.
      num: pictures.
      size: pictures at a time.
      adapters: which to use with references.
      towers: in place of the base's, by name.
      person: whom, where weights belong to people.
    """
    sampler = generation.make_sampler(run.pipeline, steps=settings.steps)
    frozen = generation.sampler_params(run.pipeline) | dict(towers or {})
    if person is not None:
        frozen |= finetuning_loop.load_person(run.workdir, person, run.pipeline, run.config)
    ids, negative = jnp.repeat(jnp.asarray(run.pipeline.tokenize([*prompts])[0])[:, None], size, 1)

    def request(first: int, references: Sequence[References]) -> generation.Request:
        return generation.Request(
            keys=generation.picture_keys(seed, size, first),
            ids=ids,
            negative_ids=negative,
            references=tuple(references),
            guidance=settings.guidance,
            eta=settings.eta,
        )

    def stream(references: Sequence[References]) -> Iterator[np.ndarray]:
        starts = range(0, num, size)
        requests = (request(first, references) for first in starts)
        active = adapters if references else ()
        batches = generation.each_batch(sampler, frozen, active, requests, size)
        for first, batch in zip(starts, batches, strict=True):
            yield images.to_uint8(batch[: num - first])

    return stream
