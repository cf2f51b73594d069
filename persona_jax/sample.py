"""Paints people: from photos and a prompt, with trained adapters, or learnt by heart.

python -m persona_jax.sample --workdir runs/sa --photos a.jpg b.jpg --prompt "a smiling person"
python -m persona_jax.sample --workdir runs/dreambooth --person ann --prompt "a smiling person"
python -m persona_jax.sample --adapter ip-adapter_sd15.safetensors --pipeline FOLDER --photos a.jpg
python -m persona_jax.sample --pipeline FOLDER --lora style.safetensors --prompt "a person"
python -m persona_jax.sample --workdir runs/sa --photos a.jpg --photos b.jpg --mask l.png r.png

Each --photos is one person's; --weights, --scale, --mask, --window and --negative_photos, and runs
and adapters, are given once for all or once for each, in the same order. Writes OUT/0000.png …,
OUT/grid.png (references beside samples) and OUT/sample.json, which holds everything needed to
repeat it. With --attribution, OUT/attribution.png: what each photo gave.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from persona_jax.data import images
from persona_jax.errors import UserError
from persona_jax.interop.lora_files import load_lora
from persona_jax.methods import finetuning
from persona_jax.models import lora
from persona_jax.pipelines import generation
from persona_jax.runs import attribution, finished_run, reference_sets
from persona_jax.runs.streaming import make_stream
from persona_jax.runtime import buckets, finite, outputs, settings
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.run_folder import read_run
from persona_jax.runtime.settings import number

SHOWN = 64
"""Pictures in the grid."""
FILES = r"\d{4,}\.png|grid\.png|attribution\.png|sample\.json"


def main(arguments: argparse.Namespace) -> None:
    """Photos → embeddings → pictures → files."""
    num = arguments.num
    check(arguments)
    sets = reference_sets.read_reference_sets(arguments)
    out = outputs.try_folder(arguments.out, "--out", FILES)
    opened = open_runs(arguments)
    run = opened[0]
    if arguments.attribution:
        if len(sets) != 1:
            raise UserError("--attribution: it is for one set of photos")
        attribution.check(run, np.float32(sets[0].weights))
    settings = run.sampling_settings(
        steps=arguments.steps, guidance=arguments.guidance, eta=arguments.eta
    )
    prompt = run.prompt(arguments.prompt)
    _, warnings = run.pipeline.tokenize([prompt, arguments.negative_prompt])
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    run_of_set = opened * (len(sets) if len(opened) == 1 else 1)
    size = min(num, arguments.batch_size)
    stream = make_stream(
        run,
        settings,
        prompts=(prompt, arguments.negative_prompt),
        seed=arguments.seed,
        num=num,
        size=size,
        adapters=[one.adapter for one in run_of_set] if sets else [],
        towers=with_loras(run, arguments),
        person=arguments.person if run.personal else None,
    )
    owners = list(zip(run_of_set, sets, strict=True))
    references = [
        reference_sets.references(owner, one, settings.scale, size) for owner, one in owners
    ]
    side = run.pipeline.image_size
    photos = [reference_sets.squares(owner, one, max(side, 96)) for owner, one in owners]

    shown = write_pictures(out, stream(references))
    found = None
    if arguments.attribution:
        found = attribution.attribute(run, references[0], read_pictures(out, num, size), stream)
    record = {
        "runs": [str(one.workdir.absolute()) for one in opened],
        "step": run.step,
        "person": arguments.person,
        "lora": arguments.lora,
        "lora_scale": arguments.lora_scale,
        "sets": [dataclasses.asdict(one) for one in sets],
        "prompt": prompt,
        "negative_prompt": arguments.negative_prompt,
        "seed": arguments.seed,
        "num": num,
        "batch_size": arguments.batch_size,
        "crop": [one.config.data.crop for one in opened],
        **dataclasses.asdict(settings),
        "attribution": found and found.record(),
    }
    images.save_sheet(overview(shown, photos, side), out / "grid.png")
    outputs.write_text(out / "sample.json", json.dumps(record, indent=2) + "\n")
    beside = "the photos beside them" if sets else "all"
    beside = beside if num <= SHOWN else f"the first {SHOWN}"
    print(f"{num} pictures in {out}; {beside} in {out / 'grid.png'}")
    if found:
        images.save_sheet(attribution.draw(found, photos[0], side), out / "attribution.png")
        print(f"what each photo contributed: {out / 'attribution.png'}")


def check(arguments: argparse.Namespace) -> None:
    """Whether flags go together.

    Raises:
      UserError: says which do not, and what would.
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
            raise UserError(f"{by_name[0]} is a run of {methods[by_name[0]]}: it paints alone")
        if not arguments.person or photos:
            raise UserError(
                f"{by_name[0]} is a run of {methods[by_name[0]]}: give --person, one of those it "
                "learnt, and no --photos"
            )
        return
    if arguments.person:
        raise UserError("--person: for a run of dreambooth or lora; adapters take --photos")
    if workdirs and arguments.pipeline:
        raise UserError("--pipeline: a run has its base; it is for --adapter and --lora alone")
    sources = len(workdirs) + len(adapters)
    if bool(sources) != bool(photos):
        missing = "--photos" if sources else "--workdir or --adapter, for the photos"
        raise UserError(f"give {missing}")
    if sources > 1 and sources != len(photos):
        raise UserError(
            f"{sources} runs and adapters for {len(photos)} --photos; one for all or one each"
        )


def open_runs(arguments: argparse.Namespace) -> list[finished_run.Run]:
    """Runs, then adapters; or a base alone.

    Raises:
      UserError: they are not of one base.
    """
    workdirs, files = (map(buckets.local, x) for x in (arguments.workdir, arguments.adapter))
    opened = [finished_run.open_run(workdir, arguments.crop) for workdir in workdirs]
    base = opened[0].config.pipeline if opened else arguments.pipeline
    crop = arguments.crop or 1.0
    opened += [
        finished_run.open_adapter(file, base, arguments.image_encoder, crop) for file in files
    ]
    opened = opened or [finished_run.open_base(base)]
    for one in opened[1:]:
        if one.pipeline.unet.hash != opened[0].pipeline.unet.hash:
            raise UserError(
                f"{one.workdir}: its base is {one.config.pipeline}, of hash "
                f"{one.pipeline.unet.hash}; {opened[0].workdir} has {opened[0].config.pipeline}, "
                f"of {opened[0].pipeline.unet.hash}"
            )
    return opened


def with_loras(run: finished_run.Run, arguments: argparse.Namespace) -> dict:
    """The towers that LoRA files change."""
    towers = generation.sampler_params(run.pipeline)
    factors, changed = arguments.lora_scale or [1.0] * len(arguments.lora), {}
    for file, factor in zip(arguments.lora, factors, strict=True):
        updates = load_lora(buckets.local(file), towers)
        if huge := finite.beyond(updates, float(np.finfo(np.float16).max)):
            raise UserError(f"--lora {file}: {huge}, which no LoRA has; fetch it again")
        for name, update in updates.items():
            changed[name] = towers[name] = lora.merge(towers[name], update, factor)
    return changed


def write_pictures(out: Path, batches: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Single PNGs, as they come; the first :data:`SHOWN` pictures."""
    shown: list[np.ndarray] = []
    for place, picture in enumerate(picture for batch in batches for picture in batch):
        images.save(Image.fromarray(picture), out / f"{place:04d}.png")
        if place < SHOWN:
            shown.append(picture)
    return shown


def read_pictures(out: Path, num: int, size: int) -> Iterator[np.ndarray]:
    """The PNGs of :func:`write_pictures` ``[_, S, S, 3]``, `size` at a time."""
    files = [out / f"{number:04d}.png" for number in range(num)]
    for first in range(0, num, size):
        yield np.stack([np.asarray(Image.open(file)) for file in files[first : first + size]])


def overview(
    pictures: Sequence[np.ndarray], photos: Sequence[list[Image.Image]], size: int
) -> Image.Image:
    """Each set of photos in rows of its own, the pictures below."""
    width = min(max([min(len(pictures), 8), *map(len, photos)]), 16)
    rows = [
        *([x.resize((size, size)) for x in some] for own in photos for some in _rows(own, width)),
        *_rows(pictures, width),
    ]
    return images.grid(rows, size=size)


def _rows(cells: Sequence, width: int) -> list[Sequence]:
    return [cells[i : i + width] for i in range(0, len(cells), width)]


def parser() -> argparse.ArgumentParser:
    """The command line."""
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
        help="how much each counts; 1",
    )
    flags.add_argument("--image_encoder", help="folder or hub id, where the base has none")
    reference_sets.add_flags(flags)
    flags.add_argument("--person", help="whom to paint, of those that a DreamBooth or LoRA learnt")
    flags.add_argument("--prompt", type=settings.text, default="a photo of a person")
    flags.add_argument("--negative_prompt", type=settings.text, default="")
    flags.add_argument("--num", type=number(settings.COUNT), default=4, help="how many pictures")
    flags.add_argument("--out", type=settings.path, required=True, help="folder for the pictures")
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
        "--batch_size", type=number(settings.COUNT), default=8, help="pictures painted at once"
    )
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
