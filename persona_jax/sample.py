"""Paints a person: from photos and a prompt, with a trained adapter, or one learnt by heart.

python -m persona_jax.sample --workdir runs/sa --photos a.jpg b.jpg --prompt "a smiling person"
python -m persona_jax.sample --workdir runs/dreambooth --person ann --prompt "a smiling person"
python -m persona_jax.sample --adapter ip-adapter_sd15.safetensors --pipeline FOLDER --photos a.jpg

Writes OUT/0000.png …, OUT/grid.png (references beside samples) and OUT/sample.json, which holds
everything needed to repeat it. With --attribution, OUT/attribution.png: what each photo gave.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from persona_jax import attribution, paint, personal, runs
from persona_jax.cli import read_config, run_with_arguments
from persona_jax.data import images
from persona_jax.errors import UserError
from persona_jax.interop.checkpoints import newest_step
from persona_jax.models.aggregators import EveryPhoto


def main(arguments: argparse.Namespace) -> None:
    """Photos → embeddings → pictures → files."""
    out, by_name = Path(arguments.out), painted_by_name(arguments)
    photos = [images.load_photo(path) for path in arguments.photos]
    weights, num = read_weights(arguments), arguments.num
    if num < 1:
        raise UserError(f"--num {num}: at least one picture")

    if arguments.adapter:
        places = (arguments.pipeline, arguments.image_encoder)
        run = runs.open_adapter(Path(arguments.adapter), *places, arguments.crop or 1.0)
    else:
        run = runs.open_run(Path(arguments.workdir), arguments.crop)
    if isinstance(run.aggregator, EveryPhoto) and set(weights) != {1.0}:
        raise UserError(f"--weights: {arguments.adapter} has no aggregator; all photos count alike")
    if arguments.attribution:
        attribution.check(run, np.float32(weights))
    knobs = run.knobs(
        steps=arguments.steps or None,
        guidance=arguments.guidance,
        eta=arguments.eta,
        scale=arguments.scale,
    )
    prompt = run.prompt(arguments.prompt)
    _, warnings = run.pipeline.tokenize([prompt, arguments.negative_prompt])
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    painter = runs.make_painter(run, knobs, min(num, arguments.batch_size))
    seen = None if by_name else run.eye.look(photos)

    def paint_all(weights: np.ndarray) -> np.ndarray:
        whom = {"names": [arguments.person] * num}
        if seen is not None:
            rows = np.repeat(weights[None], num, axis=0)
            whom = {"embeddings": np.repeat(seen[None], num, axis=0), "weights": rows}
        keys = paint.picture_keys(arguments.seed, num)
        negative = arguments.negative_prompt
        return painter([prompt] * num, keys, negative_prompt=negative, **whom)

    painted = paint_all(np.float32(weights))
    pictures = list(images.to_uint8(painted))
    found = None
    if arguments.attribution:
        found = attribution.attribute(run, seen, np.float32(weights), painted, paint_all)

    record = {
        "workdir": str(run.workdir.absolute()),
        "step": newest_step(run.workdir / "checkpoints"),
        "person": arguments.person,
        "photos": [str(Path(photo).absolute()) for photo in arguments.photos],
        "weights": weights,
        "prompt": prompt,
        "negative_prompt": arguments.negative_prompt,
        "seed": arguments.seed,
        "num": arguments.num,
        "batch_size": arguments.batch_size,
        "crop": run.config.data.crop,
        **dataclasses.asdict(knobs),
        "attribution": found and found.record(),
    }
    write(out, pictures, photos, record, run.pipeline.image_size)
    beside = "all" if by_name else "the photos beside them"
    print(f"{len(pictures)} pictures in {out}; {beside} in {out / 'grid.png'}")
    if found:
        squares = [images.centre_crop(photo, record["crop"]) for photo in photos]
        attribution.draw(found, squares, run.pipeline.image_size).save(out / "attribution.png")
        print(f"what each photo contributed: {out / 'attribution.png'}")


def painted_by_name(arguments: argparse.Namespace) -> bool:
    """Whether people are painted by name, not from photos.

    Raises:
      UserError: flags that do not go together.
    """
    if bool(arguments.workdir) == bool(arguments.adapter):
        raise UserError("give --workdir, a run, or --adapter, a file, and --pipeline with it")
    if arguments.adapter:
        if not arguments.pipeline or not arguments.photos or arguments.person:
            raise UserError("--adapter: give --pipeline, the base it is for, and --photos")
        return False
    method = read_config(Path(arguments.workdir)).method
    by_name = method in personal.METHODS
    if by_name != (arguments.person is not None) or by_name == bool(arguments.photos):
        wanted = "--person, one of those it learnt, and no --photos" if by_name else "--photos"
        raise UserError(f"{arguments.workdir} is a run of {method}: give {wanted}")
    return by_name


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
    rows = [
        *([squares] if squares else []),
        *(pictures[i : i + width] for i in range(0, len(pictures), width)),
    ]
    images.grid(rows, size=size).save(out / "grid.png")
    (out / "sample.json").write_text(json.dumps(record, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--workdir", help="a run of persona_jax.train")
    flags.add_argument(
        "--adapter", help="in its place, an IP-Adapter file, or a folder that export wrote"
    )
    flags.add_argument("--pipeline", help="the base of --adapter: tiny, a folder or a hub id")
    flags.add_argument("--image_encoder", help="folder or hub id, where the base has none")
    flags.add_argument("--photos", nargs="+", default=[], help="the person's photos")
    flags.add_argument("--person", help="whom to paint, of those that a DreamBooth or LoRA learnt")
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
    flags.add_argument(
        "--attribution", action="store_true", help="show what each photo contributed"
    )
    flags.add_argument("--batch_size", type=int, default=8, help="pictures painted at once")
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
