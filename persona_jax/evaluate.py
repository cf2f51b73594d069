"""Evaluates identity and prompt fidelity of a run's images, on people not seen in training.

python -m persona_jax.evaluate --workdir runs/sa

Generates images of each test person from 1, 3 and 9 of their photos, with a plain prompt and with
the caption of a held-out photo. For drawn portraits, whose traits are known, the evaluator is the
base's trait classifier; for real people, a face network and the base's CLIP pair. The controls are
images from another person's photos, and real photos; for per-person fine-tuning, images of other
people by the same weights. Writes report.json, report.html, table.md, curve.svg (identity by number
of photos), grid.png and all images into WORKDIR/evaluation.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from persona_jax.data import images
from persona_jax.data.dataset import open_dataset
from persona_jax.data.photo_datasets import Photos
from persona_jax.errors import UserError
from persona_jax.evaluation import builder, evaluators, networks, plots, report
from persona_jax.evaluation.evaluators import Subjects
from persona_jax.methods import finetuning
from persona_jax.metrics.intervals import Mean
from persona_jax.runs import finished_run, subject_sampling
from persona_jax.runtime import buckets, outputs, settings
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.run_folder import read_run
from persona_jax.runtime.settings import number

SHOWN = 8
"""Number of people on the grid."""
ANOTHER, ANYBODY, REAL = "from another person's", "anybody, by the same weights", "real photos"
TITLES = {ANOTHER: "another's", ANYBODY: "anybody"}
"""Short titles for the grid and for folders."""

Pictures = dict[str, np.ndarray]


def main(arguments: argparse.Namespace) -> None:
    """Generates images of a group of people, evaluates them and writes the report."""
    workdir = buckets.local(arguments.workdir)
    config = read_run(workdir)
    out = outputs.try_folder(workdir / "evaluation", "--workdir", r".*\.(svg|json|md|html|png)")
    photos, groups = open_dataset(config.data)
    group = known_to(config.method, workdir, getattr(groups, arguments.group))
    people = evaluators.how_many(arguments.people, group)
    run = finished_run.open_run(workdir)
    evaluator = builder.build_evaluator(config, photos, people, arguments)
    subjects = evaluators.choose_subjects(
        evaluator, photos, group, people, config, evaluators.AGAIN
    )
    counts = [subjects.references.shape[1]]
    if not run.personal:
        counts = counted(arguments.references, counts[0])
    settings = run.sampling_settings(
        steps=arguments.steps, guidance=arguments.guidance, scale=arguments.scale
    )
    pictures = generate(run, settings, photos, subjects, counts, arguments.seed)

    rows = {name: [evaluator.pictures(subjects, content)] for name, content in pictures.items()}
    base, crop = run.pipeline, config.data.crop
    real, features = evaluators.real_photos(evaluator, photos, subjects, base.image_size, crop)
    table = report.table(rows | {REAL: [real]}, features, from_(max(counts)), arguments.fid)
    content = {"people": len(subjects.names), "group": arguments.group, "evaluator": evaluator.name}
    content |= {
        **dataclasses.asdict(settings),
        "prompt": run.prompt(evaluator.plain),
        "rows": table,
    }
    for count in counts:
        if details := evaluator.details(subjects, pictures[from_(count)], count):
            content.setdefault("details", {})[count] = details
    write_pictures(out, photos, subjects, pictures, crop, pictures[from_(max(counts))])
    outputs.write_text(out / "curve.svg", curve(table, counts, evaluator.likeness))
    text = json.dumps(content, indent=2, ensure_ascii=False, default=dataclasses.asdict)
    outputs.write_text(out / "report.json", text + "\n")
    caption = f"{len(subjects.names)} {arguments.group} people; evaluator: {evaluator.name}"
    report.write(out, table, caption, ["curve.svg", "grid.png"])


def from_(count: int) -> str:
    """The name of the row of images from `count` photos."""
    return f"from {count}"


def known_to(method: str, workdir: Path, group: Sequence[str]) -> list[str]:
    """The people of a group that a run can generate: all, or those with fine-tuned weights."""
    if method not in finetuning.METHODS:
        return list(group)
    finished = {path.parent.name for path in workdir.glob("people/*/person.json")}
    return [name for name in group if name in finished]


def counted(wanted: Sequence[int], most: int) -> list[int]:
    """The numbers of reference photos to generate from, sorted; `most` is how many there are.

    Raises:
      UserError: a number is below one, or above the number of references.
    """
    if min(wanted) < 1 or max(wanted) > most:
        raise UserError(
            f"--references {' '.join(map(str, wanted))}: 1 to {most}, as "
            f"config.references.n={most + 1} and one is held out"
        )
    return sorted(set(wanted))


def generate(
    run: finished_run.Run,
    settings: finished_run.SamplingSettings,
    photos: Photos,
    subjects: Subjects,
    counts: Sequence[int],
    seed: int,
) -> Pictures:
    """Generates the images of ``subjects.pictures`` for each row, all from the same noise.

    For an adapter, the rows are the numbers of references in `counts`, and another person's photos.
    For per-person fine-tuning, they are the person, and other people by the same weights.

    Returns:
      Images in [−1, 1] by row.
    """
    sampler, embeddings = (
        subject_sampling.make_run_sampler(run, settings),
        subject_sampling.encode_references(run, photos, subjects),
    )

    def sampled(embeddings: np.ndarray | None, **changes) -> np.ndarray:
        changes |= {"scale": settings.scale, "seed": seed}
        return subject_sampling.sample_subjects(run, sampler, subjects, embeddings, **changes)

    if embeddings is None:
        return {from_(counts[0]): sampled(None), ANYBODY: sampled(None, named=False)}
    out = {from_(count): sampled(embeddings, num_references=count) for count in counts}
    return out | {ANOTHER: sampled(np.roll(embeddings, 1, axis=0))}


def write_pictures(
    out: Path, photos: Photos, subjects: Subjects, pictures: Pictures, crop: float, best: np.ndarray
) -> None:
    """Writes all images, and a grid of the first people.

    The grid shows a person's references and held-out photo, then one image of each row for the
    plain prompt, and one of `best` for the held-out photo's caption.
    """
    titles = [TITLES.get(name, name) for name in pictures]
    for title, images_of_row in zip(titles, pictures.values(), strict=True):
        folder = out / title.replace(" ", "_").replace("'", "")
        for i, picture in enumerate(images_of_row):
            images.save(Image.fromarray(images.to_uint8(picture)), folder / f"{i:04d}.png")
    size, count, cells = best.shape[1], len(subjects.names), []
    for i in range(min(SHOWN, count)):
        rows = np.array([*subjects.references[i], subjects.held_out[i]])
        real = evaluators.photos_as_pictures(photos, rows, size, crop)
        plain = [images_of_row[i] for images_of_row in pictures.values()]
        cells.append([images.to_uint8(x) for x in (*real, *plain, best[count + i])])
    blank = [""] * (subjects.references.shape[1] - 1)
    titles = ["references", *blank, "held out", *titles, "as on"]
    images.save_sheet(images.grid(cells, titles=titles), out / "grid.png")


def curve(table: report.Table, counts: Sequence[int], likeness: str) -> str:
    """Plots identity over the number of photos, with another person's and real photos."""

    def mean(row: str) -> float:
        cell = table[row][likeness]
        assert isinstance(cell, Mean)
        return cell.value

    values: dict[str, Mapping[int | float, float]] = {
        "samples": {count: mean(from_(count)) for count in counts}
    }
    for name in (ANOTHER, REAL):
        if name in table:
            values[name] = dict.fromkeys(counts, mean(name))
    return plots.line_plot(values, title=likeness, x_label="reference photos", top=1.0)


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--workdir", type=settings.path, required=True, help="a run of persona_jax.train"
    )
    flags.add_argument("--group", choices=("validation", "test"), default="test")
    flags.add_argument(
        "--people", type=number(settings.COUNT), help="how many; all, 128 at most, if not given"
    )
    flags.add_argument("--references", type=number(settings.COUNT), nargs="+", default=[1, 3, 9])
    flags.add_argument("--scale", type=number(settings.FACTOR), help="λ of the adapter")
    flags.add_argument(
        "--guidance", type=number(settings.GUIDANCE), help="classifier-free guidance"
    )
    flags.add_argument("--steps", type=number(settings.STEPS), help="DDIM steps")
    flags.add_argument("--seed", type=number(settings.SEED), default=0, help="of the noise")
    flags.add_argument(
        "--fid", action="store_true", help="report FID even for fewer images than features"
    )
    networks.add_flags(flags)
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
