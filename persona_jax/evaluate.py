"""Measures, on people never seen in training, how much of a person an adapter's samples keep.

python -m persona_jax.evaluate --workdir runs/sa

For drawn portraits, whose people are known number by number: paints each test person from 1, 3 and
9 of their photos and reads the traits back off the pictures. Beside it stand the same pictures
taken for another person's, and real photos of the person; it also paints each as on their held-out
photo, for the prompt's fidelity and the pictures' distance from photos. Writes report.json,
report.html, curve.svg (identity by number of photos), grid.png and single pictures into
WORKDIR/evaluation.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict
from PIL import Image

from persona_jax import paint, personal, runs
from persona_jax.cli import read_config, run_with_arguments
from persona_jax.data import images
from persona_jax.data.photos import Photos
from persona_jax.data.portraits import traits
from persona_jax.data.splits import photos_of
from persona_jax.dataset import open_dataset
from persona_jax.errors import UserError
from persona_jax.interop import folders
from persona_jax.metrics import distributions, fidelity, judging, plots, reading
from persona_jax.metrics import report as tables


def main(arguments: argparse.Namespace) -> None:
    """People → references → pictures → readings → report."""
    workdir = Path(arguments.workdir)
    config = read_config(workdir)
    photos, groups = open_dataset(config.data)
    if not photos.has("identity"):
        raise UserError(
            f"evaluate: nobody knows the true traits of {config.data.dataset} people; only runs on "
            "portraits can be read back"
        )
    chosen = whom(arguments, workdir, config, getattr(groups, arguments.group))
    sets = photos_of(photos.people, chosen)
    most, fewest = max(arguments.references), min(map(len, sets))
    if min(arguments.references) < 1 or most >= fewest:
        raise UserError(
            f"--references {most}: each person has {fewest} photos, of which one is held out"
        )
    reader = reading.load_reader(folders.find(config.pipeline).parent / "reader")
    run = runs.open_run(workdir)
    knobs = run.knobs(steps=arguments.steps, guidance=arguments.guidance, scale=arguments.scale)
    painter = runs.make_painter(run, knobs)
    prompts = [run.prompt(fidelity.PLAIN)] * (len(chosen) * arguments.samples)
    # The same noise for all numbers of references.
    keys = paint.picture_keys(arguments.seed, len(prompts))

    def each(values: np.ndarray) -> np.ndarray:
        """A person's value for each of their samples."""
        return np.repeat(values, arguments.samples, axis=0)

    held_out = [rows[-1] for rows in sets]
    captions = [run.prompt(photos.captions[row]) for row in held_out]
    if run.personal:
        counts = [config.references.n - 1]
        shown = {counts[0]: painter(prompts, keys, names=each(np.asarray(chosen)).tolist())}
        asked = painter(captions, keys[: len(chosen)], names=chosen)
    else:
        counts = arguments.references
        looks = [run.eye.look([photos.image(row) for row in rows[:most]]) for rows in sets]
        one = np.stack(looks)
        embeddings = each(one)
        shown = {}
        for count in counts:
            weights = np.broadcast_to(np.float32(np.arange(most) < count), embeddings.shape[:2])
            shown[count] = painter(prompts, keys, embeddings=embeddings, weights=weights)
        whole = np.ones(one.shape[:2], np.float32)
        asked = painter(captions, keys[: len(one)], embeddings=one, weights=whole)

    identity = photos.truth("identity")[held_out]
    scene = photos.truth("scene")
    hidden = traits.hidden_traits(scene)
    truth = each(identity)
    report: dict = {"people": len(chosen), "samples": arguments.samples, "references": {}}
    report |= {**dataclasses.asdict(knobs), "prompt": prompts[0], "group": arguments.group}
    for count in counts:
        read = reader.read(shown[count]).identity
        times = np.stack([hidden[rows[:count]].sum(axis=0) for rows in sets])
        report["references"][count] = fidelity.identity_fidelity(reader, read, truth) | {
            "by_hiding": fidelity.error_by_hiding(read, truth, each(times))
        }
    # Pictures from another person's photos: the last ones, held against the next person.
    report["another_person"] = fidelity.identity_fidelity(
        reader, read, np.roll(truth, -arguments.samples, axis=0)
    )
    real = judging.photos_as_pictures(photos, np.asarray(held_out), run.pipeline.image_size)
    read_real = reader.read(real)
    report["held_out_photo"] = fidelity.identity_fidelity(
        reader, read_real.identity, identity, 1 - hidden[held_out]
    )
    # How real photos score that are not the ones everything is held against.
    firsts = [rows[0] for rows in sets]
    others = judging.photos_as_pictures(photos, np.asarray(firsts), run.pipeline.image_size)
    report["held_out_photo"] |= likeness(reader, scene[firsts], others, read_real.features)
    report["as_on_the_photo"] = likeness(reader, scene[held_out], asked, read_real.features)
    write(workdir / "evaluation", report, photos, sets, shown, asked)


def likeness(
    reader: reading.Reader,
    scene: Float[np.ndarray, "P J"],
    pictures: Float[np.ndarray, "P S S 3"],
    real: Float[np.ndarray, "R F"],
) -> dict[str, float]:
    """Prompt fidelity, KID and IS by the reader's features and classes; FID of enough pictures.

    Args:
      reader: the judge.
      scene: what is asked for.
      pictures: in [−1, 1].
      real: features of real photos.
    """
    prompt, readings = judging.scene_fidelity(reader, scene, pictures)
    features = readings.features
    found = {
        "prompt": float(prompt.mean()),
        "kid": distributions.kernel_distance(features, real, seed=0)[0],
        "is": distributions.inception_score(readings.logits, 0, min(10, len(features)))[0],
    }
    one, other = distributions.moments(features), distributions.moments(real)
    if distributions.full_rank(one, other):
        found["fid"] = distributions.frechet_distance(one, other)
    return {name: round(value, 4) for name, value in found.items()}


def whom(
    arguments: argparse.Namespace, workdir: Path, config: ConfigDict, group: Sequence[str]
) -> list[str]:
    """The first people of the group; of those that the run learnt, where weights belong to people.

    Raises:
      UserError: too few of them.
    """
    if config.method in personal.METHODS:
        learnt = {path.parent.name for path in workdir.glob("people/*/person.json")}
        group = [name for name in group if name in learnt]
    chosen = list(group[: arguments.people])
    if len(chosen) < arguments.people or arguments.people < 2:
        raise UserError(f"--people {arguments.people}: there are {len(chosen)}, and 2 are needed")
    return chosen


def write(
    out: Path,
    report: dict,
    photos: Photos,
    sets: Sequence[np.ndarray],
    shown: dict[int, np.ndarray],
    asked: np.ndarray,
) -> None:
    """report.json; a grid of the first people: their references, then a sample per number."""
    out.mkdir(exist_ok=True)
    for name, pictures in ({f"from_{n}": p for n, p in shown.items()} | {"as_on": asked}).items():
        (out / name).mkdir(exist_ok=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(images.to_uint8(picture)).save(out / name / f"{i:04d}.png")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "curve.svg").write_text(curve(report))
    most, samples, size = max(shown), report["samples"], asked.shape[1]
    cells = []
    for i, rows in enumerate(sets[:8]):
        references = [np.asarray(photos.image(row).resize((size, size))) for row in rows[:most]]
        target = np.asarray(photos.image(rows[-1]).resize((size, size)))
        pictures = [images.to_uint8(shown[count][i * samples]) for count in shown]
        cells.append([*references, target, *pictures, images.to_uint8(asked[i])])
    titles = ["references", *[""] * (most - 1), "held out", *(f"from {n}" for n in shown), "as on"]
    images.grid(cells, titles=titles).save(out / "grid.png")
    caption = f"{report['people']} {report['group']} people, by the reader of the run's base"
    tables.write(out, table(report), caption, ["curve.svg", "grid.png"])


def table(report: dict) -> tables.Table:
    """What the report says, by the photos that the pictures are from."""
    rows = {f"from {n}": found for n, found in report["references"].items()}
    rows["from another person's"] = report["another_person"]
    rows["as on the held-out photo"] = report["as_on_the_photo"]
    rows["real photos"] = report["held_out_photo"]
    columns = {
        "named, of 32 ↑": ("named", "{:.3f}"),
        "error of the traits ↓": ("error", "{:.4f}"),
        "prompt ↑": ("prompt", "{:.3f}"),
        "KID ↓": ("kid", "{:.4f}"),
        "IS ↑": ("is", "{:.2f}"),
        "FID ↓": ("fid", "{:.1f}"),
    }
    return {
        name: {
            title: form.format(found[key]) if key in found else ""
            for title, (key, form) in columns.items()
        }
        for name, found in rows.items()
    }


def curve(report: dict) -> str:
    """Identity by number of photos, between another person's photos and a real one."""
    named = {count: found["named"] for count, found in report["references"].items()}
    lines = {"samples": named}
    for name in ("held_out_photo", "another_person"):
        lines[name.replace("_", " ")] = dict.fromkeys(named, report[name]["named"])
    title = f"samples that name the right one of {fidelity.AMONG}"
    return plots.line_plot(lines, title=title, x_label="reference photos", top=1.0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--workdir", required=True, help="a run of persona_jax.train")
    flags.add_argument("--group", choices=("validation", "test"), default="test")
    flags.add_argument("--people", type=int, default=128)
    flags.add_argument("--samples", type=int, default=1, help="pictures of each person")
    flags.add_argument("--references", type=int, nargs="+", default=[1, 3, 9])
    flags.add_argument("--scale", type=float, help="λ of the adapter")
    flags.add_argument("--guidance", type=float, help="classifier-free guidance")
    flags.add_argument("--steps", type=int, help="DDIM steps")
    flags.add_argument("--seed", type=int, default=0)
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
