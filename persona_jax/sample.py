"""Generates images of people from photos and a prompt, with adapters or fine-tuned weights.

python -m persona_jax.sample --workdir runs/sa --photos a.jpg b.jpg --prompt "a smiling person"
python -m persona_jax.sample --workdir runs/dreambooth --person ann --prompt "a smiling person"
python -m persona_jax.sample --adapter ip-adapter_sd15.safetensors --pipeline FOLDER --photos a.jpg
python -m persona_jax.sample --pipeline FOLDER --lora style.safetensors --prompt "a person"
python -m persona_jax.sample --workdir runs/sa --photos a.jpg --photos b.jpg --mask l.png r.png

Each --photos is one person. Runs, adapters, --weights, --scale, --mask, --window and
--negative_photos are given once for all or once for each, in the same order. Writes OUT/0000.png …,
OUT/grid.png (references and samples) and OUT/sample.json, which holds all that is needed to repeat
the call. With --attribution, writes OUT/attribution.png: how much each photo contributed.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from persona_jax.api.adapters import load_adapter, load_person
from persona_jax.api.pipeline import PersonaPipeline, load_pipeline
from persona_jax.api.results import overview
from persona_jax.data import images
from persona_jax.errors import UserError
from persona_jax.methods import finetuning
from persona_jax.runs import attribution, reference_sets
from persona_jax.runtime import buckets, outputs, settings
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.run_folder import read_run
from persona_jax.runtime.settings import number

SHOWN = 64
"""Maximal number of images in the grid."""
FILES = r"\d{4,}\.png|grid\.png|attribution\.png|sample\.json"


def main(arguments: argparse.Namespace) -> None:
    """Generates the images and writes all files."""
    check(arguments)
    sets = reference_sets.read_reference_sets(arguments)
    out = outputs.try_folder(arguments.out, "--out", FILES)
    pipe = open_pipeline(arguments)
    adapters = [load_adapter(path, pipe, crop=arguments.crop) for path in sources(arguments)]
    person = None
    if arguments.person:
        person = load_person(arguments.workdir[0], arguments.person, pipe)
    job = pipe.prepare(
        arguments.prompt,
        references=sets,
        adapter=adapters,
        person=person,
        loras=list(zip(arguments.lora, lora_factors(arguments), strict=True)),
        negative_prompt=arguments.negative_prompt,
        num=arguments.num,
        seed=arguments.seed,
        steps=arguments.steps or None,
        guidance=arguments.guidance,
        eta=arguments.eta,
        batch_size=arguments.batch_size,
    )
    if arguments.attribution:
        job.check_attribution()
    for warning in job.warnings:
        print(f"warning: {warning}", file=sys.stderr)

    shown, result = write_pictures(out, job.batches()), None
    if arguments.attribution:
        size = min(job.num, arguments.batch_size)
        result = job.attribution(read_pictures(out, job.num, size))
    record = {
        "runs": [str(buckets.local(x).absolute()) for x in (*arguments.workdir, *arguments.adapter)]
        or [str(Path(arguments.pipeline).absolute())],
        "step": adapters[0].step if adapters else None,
        "person": arguments.person,
        "lora": arguments.lora,
        "lora_scale": arguments.lora_scale,
        "sets": [dataclasses.asdict(one) for one in sets],
        "prompt": job.prompts[0],
        "negative_prompt": arguments.negative_prompt,
        "seed": arguments.seed,
        "num": job.num,
        "batch_size": arguments.batch_size,
        "crop": [one.crop for one in adapters],
        **dataclasses.asdict(job.settings),
        "attribution": result and result.record(),
    }
    side = pipe.image_size
    images.save_sheet(overview(shown, job.references, side), out / "grid.png")
    outputs.write_text(out / "sample.json", json.dumps(record, indent=2) + "\n")
    beside = "the photos beside them" if sets else "all"
    beside = beside if job.num <= SHOWN else f"the first {SHOWN}"
    print(f"{job.num} pictures in {out}; {beside} in {out / 'grid.png'}")
    if result:
        sheet = attribution.draw(result, job.references[0], side)
        images.save_sheet(sheet, out / "attribution.png")
        print(f"what each photo contributed: {out / 'attribution.png'}")


def check(arguments: argparse.Namespace) -> None:
    """Checks that flags can be combined.

    Raises:
      UserError: they cannot; it names them and says what to change.
    """
    workdirs, adapters, photos = arguments.workdir, arguments.adapter, arguments.photos
    if arguments.lora_scale and len(arguments.lora_scale) != len(arguments.lora):
        raise UserError(
            f"--lora_scale: {len(arguments.lora_scale)} of them for {len(arguments.lora)} --lora"
        )
    if not workdirs and not arguments.pipeline:
        raise UserError("give --workdir, a run, or --pipeline, a base, and perhaps --adapter")
    methods = {workdir: read_run(buckets.local(workdir)).method for workdir in workdirs}
    by_name = [x for x in workdirs if methods[x] in finetuning.METHODS]
    if by_name:
        if len(workdirs) + len(adapters) > 1 or arguments.lora:
            raise UserError(
                f"{by_name[0]} is a run of {methods[by_name[0]]}: it cannot be combined with "
                "others; give one --workdir alone"
            )
        if not arguments.person or photos:
            raise UserError(
                f"{by_name[0]} is a run of {methods[by_name[0]]}: give --person, one of those in "
                "its folder people/, and no --photos"
            )
        return
    if arguments.person:
        raise UserError("--person: for a run of dreambooth or lora; adapters take --photos")
    if workdirs and arguments.pipeline:
        raise UserError("--pipeline: only for --adapter and --lora; a run has its own base")
    sources = len(workdirs) + len(adapters)
    if bool(sources) != bool(photos):
        missing = "--photos" if sources else "--workdir or --adapter, for the photos"
        raise UserError(f"give {missing}")
    if sources > 1 and sources != len(photos):
        raise UserError(
            f"{sources} runs and adapters for {len(photos)} --photos; one for all or one each"
        )


def open_pipeline(arguments: argparse.Namespace) -> PersonaPipeline:
    """Opens the base of the first run, or the one of ``--pipeline``."""
    base, dtype = arguments.pipeline, "auto"
    if arguments.workdir:
        config = read_run(buckets.local(arguments.workdir[0]))
        base, dtype = config.pipeline, config.dtype
    return load_pipeline(base, image_encoder=arguments.image_encoder, dtype=dtype)


def sources(arguments: argparse.Namespace) -> list[str]:
    """The adapters' runs, then files; none with ``--person``."""
    return [] if arguments.person else [*arguments.workdir, *arguments.adapter]


def lora_factors(arguments: argparse.Namespace) -> list[float]:
    """The factor of each LoRA file."""
    return arguments.lora_scale or [1.0] * len(arguments.lora)


def write_pictures(out: Path, batches: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Writes images as PNG files, batch by batch; returns the first :data:`SHOWN`."""
    shown: list[np.ndarray] = []
    for index, picture in enumerate(picture for batch in batches for picture in batch):
        images.save(Image.fromarray(picture), out / f"{index:04d}.png")
        if index < SHOWN:
            shown.append(picture)
    return shown


def read_pictures(out: Path, num: int, size: int) -> Iterator[np.ndarray]:
    """Reads the images of :func:`write_pictures` ``[_, S, S, 3]``, `size` at a time."""
    files = [out / f"{number:04d}.png" for number in range(num)]
    for first in range(0, num, size):
        yield np.stack([np.asarray(Image.open(file)) for file in files[first : first + size]])


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--workdir",
        nargs="+",
        action="extend",
        default=[],
        help="a run of persona_jax.train, or several",
    )
    flags.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        default=[],
        help="IP-Adapter files, or folders that export wrote",
    )
    flags.add_argument("--pipeline", help="the base: tiny, a folder or a hub id")
    flags.add_argument(
        "--lora",
        nargs="+",
        action="extend",
        default=[],
        help="LoRA files in the layout of diffusers, PEFT or kohya",
    )
    flags.add_argument(
        "--lora_scale",
        type=number(settings.FACTOR),
        nargs="+",
        action="extend",
        help="factor of each; default: 1",
    )
    flags.add_argument("--image_encoder", help="folder or hub id, if the base has none")
    reference_sets.add_flags(flags)
    flags.add_argument("--person", help="name of a person of a run of dreambooth or lora")
    flags.add_argument("--prompt", type=settings.text, default="a photo of a person")
    flags.add_argument("--negative_prompt", type=settings.text, default="")
    flags.add_argument("--num", type=number(settings.COUNT), default=4, help="number of images")
    flags.add_argument("--out", type=settings.path, required=True, help="folder for the images")
    flags.add_argument("--seed", type=number(settings.SEED), default=0)
    flags.add_argument(
        "--guidance", type=number(settings.GUIDANCE), help="classifier-free guidance"
    )
    flags.add_argument("--steps", type=number(settings.STEPS), help="DDIM steps")
    flags.add_argument(
        "--eta", type=number(settings.SHARE), help="0 is deterministic DDIM, 1 ancestral"
    )
    flags.add_argument(
        "--crop", type=number(settings.CROP), help="central part of a photo to use, 0 to 1"
    )
    flags.add_argument(
        "--attribution", action="store_true", help="show what each photo contributed"
    )
    flags.add_argument(
        "--batch_size", type=number(settings.COUNT), default=8, help="images generated at once"
    )
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
