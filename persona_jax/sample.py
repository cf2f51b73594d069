"""Paints a person from photos and a prompt, with a trained adapter.

python -m persona_jax.sample --workdir runs/sa --photos a.jpg b.jpg --prompt "a smiling person"

Writes OUT/0000.png …, OUT/grid.png (references beside samples) and OUT/sample.json, which holds
everything needed to repeat it.
"""

import argparse
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from persona_jax import methods, paint
from persona_jax.cli import read_config, run_with_arguments
from persona_jax.data import images
from persona_jax.errors import UserError
from persona_jax.eyes import open_eye
from persona_jax.interop.checkpoints import load_params, newest_step
from persona_jax.pipeline import open_pipeline


def main(arguments: argparse.Namespace) -> None:
    """Photos → embeddings → pictures → files."""
    workdir, out = Path(arguments.workdir), Path(arguments.out)
    config = read_config(workdir)
    if arguments.crop is not None:
        config.data.crop = arguments.crop
    photos = [images.load_photo(path) for path in arguments.photos]
    weights = read_weights(arguments)
    if arguments.num < 1:
        raise UserError(f"--num {arguments.num}: at least one picture")

    pipeline = open_pipeline(config)
    eye = open_eye(config, pipeline)
    which = "ema" if config.optimizer.ema_decay else "params"
    params = load_params(workdir / "checkpoints", which)
    embeddings = eye.look(photos)

    sampling = config.sampling
    settings = {
        "scale": sampling.scale if arguments.scale is None else arguments.scale,
        "guidance": sampling.guidance if arguments.guidance is None else arguments.guidance,
        "steps": arguments.steps or sampling.steps,
        "eta": sampling.eta if arguments.eta is None else arguments.eta,
    }
    ids, warnings = pipeline.tokenize([arguments.prompt])
    negative, more = pipeline.tokenize([arguments.negative_prompt])
    for warning in warnings + more:
        print(f"warning: {warning}", file=sys.stderr)
    aggregator = methods.make_aggregator(config.aggregator)
    painter = paint.make_painter(pipeline, aggregator, steps=settings["steps"])
    frozen = paint.frozen_params(pipeline)
    num = arguments.num
    request = paint.Request(
        keys=paint.picture_keys(arguments.seed, num),
        ids=jnp.repeat(jnp.asarray(ids), num, axis=0),
        negative_ids=jnp.repeat(jnp.asarray(negative), num, axis=0),
        references=paint.References(
            jnp.repeat(embeddings[None], num, axis=0),
            jnp.repeat(jnp.asarray([weights], jnp.float32), num, axis=0),
            settings["scale"],
        ),
        guidance=settings["guidance"],
        eta=settings["eta"],
    )
    size = min(num, arguments.batch_size)
    painted = paint.in_batches(painter, frozen, params, request, size)
    pictures = list(images.to_uint8(painted))

    record = {
        "workdir": str(workdir.absolute()),
        "step": newest_step(workdir / "checkpoints"),
        "photos": [str(Path(photo).absolute()) for photo in arguments.photos],
        "weights": weights,
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "seed": arguments.seed,
        "num": arguments.num,
        "batch_size": arguments.batch_size,
        "crop": config.data.crop,
        **settings,
    }
    write(out, pictures, photos, record, pipeline.image_size)
    print(f"{len(pictures)} pictures in {out}; the photos beside them in {out / 'grid.png'}")


def read_weights(arguments: argparse.Namespace) -> list[float]:
    """One weight per photo, 1 by default; UserError on another number of them or a negative."""
    if arguments.weights is None:
        return [1.0] * len(arguments.photos)
    if len(arguments.weights) != len(arguments.photos):
        raise UserError(
            f"--weights: {len(arguments.weights)} weights for {len(arguments.photos)} photos; "
            "one each"
        )
    if not all(np.isfinite(w) and w >= 0 for w in arguments.weights):
        raise UserError("--weights: each must be 0 (leave out) or more")
    return arguments.weights


def write(
    out: Path, pictures: list[np.ndarray], photos: list[Image.Image], record: dict, size: int
) -> None:
    """Single PNGs, the grid and the JSON."""
    out.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(out / f"{i:04d}.png")
    squares = [images.centre_crop(photo, record["crop"]).resize((size, size)) for photo in photos]
    width = max(len(squares), min(len(pictures), 8))
    rows = [squares, *(pictures[i : i + width] for i in range(0, len(pictures), width))]
    images.grid(rows, size=size).save(out / "grid.png")
    (out / "sample.json").write_text(json.dumps(record, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--workdir", required=True, help="a run of persona_jax.train")
    flags.add_argument("--photos", required=True, nargs="+", help="the person's photos")
    flags.add_argument("--prompt", default="a photo of a person")
    flags.add_argument("--negative_prompt", default="")
    flags.add_argument("--num", type=int, default=4, help="how many pictures")
    flags.add_argument("--out", required=True, help="folder for the pictures")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--weights", type=float, nargs="+", help="how much each photo counts")
    flags.add_argument("--scale", type=float, help="λ of the adapter; 0 ignores the photos")
    flags.add_argument("--guidance", type=float, help="classifier-free guidance")
    flags.add_argument("--steps", type=int, help="DDIM steps")
    flags.add_argument("--eta", type=float, help="0 is deterministic DDIM, 1 ancestral")
    flags.add_argument("--crop", type=float, help="central part of a photo to use, 0 to 1")
    flags.add_argument("--batch_size", type=int, default=8, help="pictures painted at once")
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
