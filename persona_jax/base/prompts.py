"""Last stage: what the finished base makes of prompts, read back by the reader."""

from pathlib import Path

import jax.numpy as jnp
from ml_collections import ConfigDict

from persona_jax.data import images
from persona_jax.evaluation import trait_classifier as reading
from persona_jax.evaluation import trait_scores
from persona_jax.pipelines import generation as paint
from persona_jax.pipelines import pipeline


def score_prompts(workdir: Path, config: ConfigDict) -> dict:
    """Paints from text alone, with guidance, and counts what was asked for and is there.

    Leaves ``prompts.png`` in `workdir`: the first 32 pictures; their prompts are those of
    :func:`persona_jax.evaluation.trait_scores.draw_wishes`.
    """
    settings = config.unet
    parts = pipeline.load(str(workdir / "pipeline"), only=("unet", "vae", "text_encoder"))
    scene = trait_scores.draw_wishes(settings.scored, config.seed)
    ids, _ = parts.tokenize([trait_scores.prompt_of(wish) for wish in scene])
    empty, _ = parts.tokenize([""])
    request = paint.Request(
        keys=paint.picture_keys(config.seed, len(scene)),
        ids=jnp.asarray(ids),
        negative_ids=jnp.repeat(jnp.asarray(empty), len(scene), axis=0),
        guidance=settings.grid_guidance,
    )
    painter = paint.make_sampler(parts, steps=settings.grid_steps)
    pictures = paint.in_batches(painter, paint.sampler_params(parts), (), request)
    rows = images.to_uint8(pictures[:32])
    images.grid([list(rows[i : i + 8]) for i in range(0, len(rows), 8)]).save(
        workdir / "prompts.png"
    )
    readings = reading.load_trait_classifier(workdir / "reader").read(pictures)
    return {"pictures": len(scene), **trait_scores.prompt_fidelity(readings, scene)}
