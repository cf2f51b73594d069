"""Trains an adapter (on sets of photos, leaving one out as the target) or fine-tunes per person.

python -m persona_jax.train --config configs/sa.py:lfw --workdir runs/sa

Run the same command again to resume. Writes into WORKDIR: checkpoints/, metrics.jsonl,
tensorboard/, grids/ (references | target | samples, for people not trained on), example/ (photos of
one of them, to sample with), config.json. With --config.optimizer.steps=0 the run holds the weights
of --config.init_from unchanged, for persona_jax.evaluate.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from persona_jax.data import images
from persona_jax.data.dataset import open_dataset, rows_of
from persona_jax.data.encodings import encode
from persona_jax.data.loader import batches
from persona_jax.data.photo_datasets import Photos
from persona_jax.data.splits import People, photos_of
from persona_jax.errors import UserError
from persona_jax.interop.checkpoints import newest_step
from persona_jax.methods import adapter_training, finetuning, finetuning_loop
from persona_jax.methods.adapter_features import adapter_job
from persona_jax.models.adapter import Adapter
from persona_jax.pipelines import generation
from persona_jax.pipelines.image_encoders import ImageEncoder, open_image_encoder
from persona_jax.pipelines.pipeline import Pipeline, open_pipeline
from persona_jax.runtime import settings
from persona_jax.runtime.command_line import run_with_config
from persona_jax.runtime.mesh import initialize_distributed, make_mesh, place, shard_params, to_host
from persona_jax.runtime.run_folder import refuse_another_run, write_run_files
from persona_jax.training.loop import fit, locked
from persona_jax.training.state import init_state, make_optimizer


def main(config: ConfigDict, workdir: Path) -> None:
    """Trains with the method of the config."""
    settings.require(config, {"method": str, "optimizer.steps": int}, "--config")
    if config.method in finetuning.METHODS:
        return finetuning_loop.finetune(config, workdir)
    initialize_distributed()
    mesh = make_mesh(**config.mesh)
    if newest_step(workdir / "checkpoints") is not None:
        refuse_another_run(workdir, config, ("method", "aggregator", "image_encoder", "seed"))
    with locked(workdir):
        write_run_files(workdir, config)

    photos, people = open_dataset(config.data)
    pipeline = open_pipeline(config, mesh)
    encoder = open_image_encoder(config, pipeline)

    def batches_from(start: int):
        encodings = encode(
            adapter_job(photos, rows_of(photos, people.train), pipeline, encoder, config)
        )
        return batches(
            encodings.arrays,
            photos_of(encodings.people, people.train),
            batch_size=config.batch_size,
            n=config.references.n,
            fixed=config.references.fixed,
            wrong=config.references.wrong,
            flip=config.flip,
            seed=config.seed,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    trainable = adapter_training.init_adapter(config, pipeline, encoder.dim)
    optimizer, ema = make_optimizer(config.optimizer), bool(config.optimizer.ema_decay)
    frozen = adapter_training.adapter_frozen_params(pipeline, encoder.blank)
    if jax.process_index() == 0:
        print(parameter_overview.get_parameter_overview(trainable, include_stats=False))
    state = fit(
        init_state(trainable, optimizer, mesh, ema=ema),
        adapter_training.adapter_step(config, pipeline, optimizer, mesh),
        place(frozen, shard_params(mesh, frozen)),
        batches_from,
        steps=config.optimizer.steps,
        workdir=workdir,
        mesh=mesh,
        save_every=config.save_every,
        log_every=config.log_every,
        callbacks=[
            (config.grid_every, grid_drawer(config, workdir, photos, people, pipeline, encoder))
        ]
        if config.grid.people
        else [],
        fingerprint={
            "method": config.method,
            "aggregator": config.aggregator.to_dict(),
            "unet": pipeline.tower("unet").hash,
            "image_encoder": encoder.hash,
        },
    )
    if jax.process_index() == 0:
        write_example(workdir / "example", photos, people, config.references.n)
        run = shlex.quote(str(workdir))
        print(
            f"{int(state.step)} steps done. Look at {workdir}/grids, then generate images, from "
            f"your own photos or these:\n"
            f"  python -m persona_jax.sample --workdir {run} --photos {run}/example/*.png "
            f'--prompt "a photo of a smiling person" --num 8 --out out'
        )


def not_trained_on(people: People) -> list[str]:
    """The people for grids and examples: validation people, or, if there are none, people trained
    on."""
    return people.validation or people.train


def write_example(folder: Path, photos: Photos, people: People, n: int) -> None:
    """Writes the references of the grids' first person as files to sample with."""
    (rows,) = photos_of(photos.people, not_trained_on(people)[:1])
    folder.mkdir(exist_ok=True)
    for i, row in enumerate(rows[:n][:-1]):
        photos.image(row).save(folder / f"{i + 1}.png")


def grid_drawer(
    config: ConfigDict,
    workdir: Path,
    photos: Photos,
    people: People,
    pipeline: Pipeline,
    encoder: ImageEncoder,
):
    """Makes a callback that draws samples of people not trained on, with references and target.

    People, photos, prompts and seeds are the same at every step, so that grids can be compared.
    """
    grid, n = config.grid, config.references.n
    chosen = not_trained_on(people)[: grid.people]
    rows = [rows_of_one[:n] for rows_of_one in photos_of(photos.people, chosen)]
    targets = [photos.image(rows_of_one[-1]) for rows_of_one in rows]
    references = [[photos.image(row) for row in rows_of_one[:-1]] for rows_of_one in rows]
    embeddings, weights = as_set([encoder.encode(set_) for set_ in references], n - 1)
    prompts = [photos.captions[rows_of_one[-1]] for rows_of_one in rows]
    ids, _ = pipeline.tokenize([p for p in prompts for _ in range(grid.samples)])
    empty, _ = pipeline.tokenize([""])
    request = generation.make_request(
        generation.picture_keys(config.seed, len(ids)),
        ids,
        empty,
        references=[
            generation.References(
                jnp.repeat(embeddings, grid.samples, axis=0),
                jnp.repeat(weights, grid.samples, axis=0),
                config.sampling.scale,
            )
        ],
        guidance=config.sampling.guidance,
        eta=config.sampling.eta,
    )
    sampler = generation.make_sampler(pipeline, steps=config.sampling.steps)
    aggregator = adapter_training.make_aggregator(config.aggregator)
    size, crop = pipeline.image_size, config.data.crop

    def square(photo) -> np.ndarray:
        return images.to_uint8(images.to_model(images.centre_crop(photo, crop), size))

    def draw(step: int, state) -> None:
        params = to_host(state.params if state.ema is None else state.ema)
        learnt = Adapter(aggregator, params, encoder.blank)
        frozen = generation.sampler_params(pipeline)
        pixels = np.asarray(sampler(frozen, (learnt,), request))
        try:
            generation.refuse_not_finite(pixels, frozen, (learnt,), request)
        except UserError as error:  # training itself stops on a loss that is not finite
            print(f"warning: grid of step {step}: {error}", file=sys.stderr)
        samples = images.to_uint8(np.nan_to_num(pixels, nan=-1.0))
        cells = [
            [*map(square, set_), *[None] * (n - 1 - len(set_)), square(target), *pictures]
            for set_, target, pictures in zip(
                references, targets, np.split(samples, len(rows)), strict=True
            )
        ]
        titles = ["references", *[""] * (n - 2), "target", "samples", *[""] * (grid.samples - 1)]
        folder = workdir / "grids"
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            sheet = images.grid(cells, titles=titles)
            images.save_sheet(sheet, folder / f"step_{step:06d}.png")

    return draw


def as_set(embeddings: Sequence[np.ndarray], slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads sets of embeddings to one array with a mask.

    Args:
      embeddings: of each set ``[n_i, D]``, or of patches ``[n_i, L, D]``.
      slots: N.

    Returns:
      Embeddings ``[B, N, D]`` or ``[B, N, L, D]``, and the mask ``[B, N]``.
    """
    padded = np.zeros((len(embeddings), slots, *embeddings[0].shape[1:]), np.float32)
    mask = np.zeros((len(embeddings), slots), np.float32)
    for i, embedded in enumerate(embeddings):
        padded[i, : len(embedded)], mask[i, : len(embedded)] = embedded, 1.0
    return padded, mask


if __name__ == "__main__":
    run_with_config(main)
