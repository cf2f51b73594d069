"""Trains several methods on the same people and compares them on people none of them has seen.

python -m persona_jax.compare --preset tiny --out runs/compare

Equal budgets; guidance, λ and learning rates are chosen on validation people; all methods paint the
same test people with the same prompts and noise. Beside the methods stand the rows without which
their numbers say little: real photos, real photos through the VAE, another person's photos, the
text alone, the plain adapter with all photos side by side. Writes OUT/table.md, report.html,
table.json and grid.png. Stopped, it goes on where it was when run again.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import PIL.Image
from jaxtyping import Float
from ml_collections import ConfigDict

from persona_jax import paint, runs, train
from persona_jax.cli import load_config, run_with_arguments
from persona_jax.data import images
from persona_jax.data.photos import Photos
from persona_jax.dataset import open_dataset
from persona_jax.errors import UserError
from persona_jax.eyes import Eye
from persona_jax.interop import folders
from persona_jax.interop.checkpoints import newest_step
from persona_jax.metrics import faces, judging, reading, report
from persona_jax.metrics.judging import Judge, Subjects, Verdict
from persona_jax.models.aggregators import EveryPhoto
from persona_jax.pipeline import open_pipeline

ADAPTERS = ("ip", "max", "avg", "sa", "avg_mlp")
METHODS = (*ADAPTERS, "dreambooth", "lora")
GUIDANCE, SCALES = (2.0, 3.0, 5.0), (0.75, 1.25)
"""What sampling may choose from; λ = 1 is tried with each guidance."""
RATES = (0.5, 2.0)
"""Factors of the config's learning rate that methods of one person may choose from, beside 1."""
SHORTER = (0.5,)
"""Shares of the config's steps that they may choose from, beside all of them."""
SHOWN = 8
"""People on the grid."""
AGAIN = 32
"""People painted plainly twice, for diversity."""
CHOOSERS = {"adapter": 32, "personal": 4}
"""Validation people by whom choices are made; personal ones are trained for it."""


@dataclasses.dataclass(frozen=True)
class World:
    """What all methods share: people, photos, and who judges.

    Attributes:
      out: where everything goes.
      photos: all of them.
      judge: who says how good pictures are.
      test, validation: whom to paint.
      painters: compiled, by aggregator and number of steps; all methods share one base.
      looks: embeddings of the subjects' references, by the eye and the subjects' names.
    """

    out: Path
    photos: Photos
    judge: Judge
    test: Subjects
    validation: Subjects
    painters: dict = dataclasses.field(default_factory=dict)
    looks: dict = dataclasses.field(default_factory=dict)

    def look(self, eye: Eye, whom: Subjects) -> Float[np.ndarray, "P N D"]:
        """What the eye sees in the references of each; looked at once."""
        key = (eye.hash, *whom.names)
        if key not in self.looks:
            sets = [[self.photos.image(row) for row in rows] for rows in whom.references.tolist()]
            self.looks[key] = np.stack([eye.look(set_) for set_ in sets])
        return self.looks[key]


def main(arguments: argparse.Namespace) -> None:
    """Runs → choices → pictures → verdicts → table."""
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown or "sa" not in arguments.methods:
        raise UserError(
            f"--methods {' '.join(arguments.methods)}: of {', '.join(METHODS)}, sa among them "
            "(differences are told from it)"
        )
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds}: one training of each method or more")
    out = Path(arguments.out)
    configs = {name: _config(arguments, name) for name in arguments.methods}
    data = configs["sa"]
    photos, groups = open_dataset(data.data)
    judge = open_judge(data, photos)
    world = World(
        out,
        photos,
        judge,
        judging.subjects(judge, photos, groups.test, arguments.people, data, AGAIN),
        judging.subjects(judge, photos, groups.validation, CHOOSERS["adapter"], data),
    )
    _same_settings(out, arguments)
    rows: dict[str, list[Verdict]] = {}
    for seed in range(arguments.seeds):
        for name, config in configs.items():
            rows.setdefault(name, []).append(_method(world, name, config, seed))
        rows.setdefault("sa, another person's photos", []).append(
            _control(world, "sa", data, seed, "another", lambda e: np.roll(e, 1, axis=0))
        )
        if "ip" in configs:
            side_by_side = _control(world, "ip", configs["ip"], seed, "every", EveryPhoto())
            rows.setdefault("ip, all photos side by side", []).append(side_by_side)
    rows["text alone"] = [_control(world, "sa", data, 0, "text", None)]
    rows |= {name: [found] for name, found in _photos(world, data).items()}
    size = open_pipeline(data).image_size
    held_out = judging.photos_as_pictures(photos, world.test.held_out, size, data.data.crop)
    real = judge.photos(world.test, world.test.held_out, held_out).features
    _grid(world, arguments.methods, data.data.crop).save(out / "grid.png")
    report.write(
        out,
        report.table(rows, real, versus="sa", fid=arguments.fid),
        f"{arguments.people} people, {arguments.seeds} training seeds; judged by {judge.name}",
        ["grid.png"],
    )


def open_judge(config: ConfigDict, photos: Photos) -> Judge:
    """Who can judge pictures of these people painted on this base: by the truth where it is known,
    by faces elsewhere."""
    if photos.has("identity"):
        reader = reading.load_reader(folders.find(config.pipeline).parent / "reader")
        return judging.TraitJudge(reader, photos.truth("identity"), photos.truth("scene"))
    return faces.open_face_judge(config, photos)


def _config(arguments: argparse.Namespace, name: str) -> ConfigDict:
    file = "avg" if name == "avg_mlp" else name
    changes = ["--config.aggregator.kind=avg_mlp"] if name == "avg_mlp" else []
    if name in ADAPTERS and arguments.steps:
        changes.append(f"--config.optimizer.steps={arguments.steps}")
    if arguments.pipeline:
        changes.append(f"--config.pipeline={arguments.pipeline}")
        changes += ["--config.init_from="] * (name in ADAPTERS)
    folder = Path(arguments.configs)
    return load_config(f"{folder / file}.py:{arguments.preset}", changes)


def _method(world: World, name: str, config: ConfigDict, seed: int) -> Verdict:
    """The verdict on a method trained from one seed, its choices made."""
    if name in ADAPTERS:
        workdir = _trained(world.out / f"runs/{name}-{seed}", config, seed=seed)
    else:
        length = _choose_training(world, name, config)
        changes = {"group": "test", "count": len(world.test.names), "seed": seed}
        workdir = world.out / f"runs/{name}-{seed}"
        _learnt_by_heart(workdir, config, **changes, **length)
    run = runs.open_run(workdir)
    knobs = _choose_knobs(world, name, run, seed)
    return _verdict(world, f"{name}-{seed}", run, world.test, knobs)


def _trained(workdir: Path, config: ConfigDict, seed: int) -> Path:
    """The workdir of an adapter trained to the end."""
    config = config.copy_and_resolve_references()
    config.seed, config.grid.people = seed, 0
    if (newest_step(workdir / "checkpoints") or 0) < config.optimizer.steps:
        print(f"training {workdir}", flush=True)
        train.main(config, workdir)
    return workdir


def _learnt_by_heart(
    workdir: Path,
    config: ConfigDict,
    *,
    group: str,
    count: int,
    seed: int,
    learning_rate: float,
    steps: int,
) -> Path:
    """The workdir of people learnt one by one."""
    config = config.copy_and_resolve_references()
    config.seed, config.optimizer.learning_rate = seed, learning_rate
    config.optimizer.steps = steps
    config.people.group, config.people.count = group, count
    if len(list(workdir.glob("people/*/person.json"))) < count:
        print(f"learning {count} people by heart in {workdir}", flush=True)
        train.main(config, workdir)
    return workdir


def _choice_of(name: str, learning_rate: float, steps: int) -> str:
    """Where validation people lie who were learnt so."""
    return f"runs/{name}-choice-{learning_rate:g}-{steps}"


def _choose_training(world: World, name: str, config: ConfigDict) -> dict[str, float | int]:
    """The learning rate and then the steps by which validation people come out best."""
    few = world.validation.some(CHOOSERS["personal"])
    most, rate = config.optimizer.steps, config.optimizer.learning_rate

    def loss(choice: Mapping[str, float | int]) -> float:
        workdir = world.out / _choice_of(name, **choice)
        changes = {"group": "validation", "count": len(few.names), "seed": 0}
        run = runs.open_run(_learnt_by_heart(workdir, config, **changes, **choice))
        return world.judge.loss(_verdict(world, workdir.name, run, few, run.knobs()))

    def measure() -> dict[str, float | int]:
        rates = [{"learning_rate": factor * rate, "steps": most} for factor in (1.0, *RATES)]
        best = min(rates, key=loss)
        shorter = [{**best, "steps": max(1, round(share * most))} for share in SHORTER]
        return min([best, *shorter], key=loss)

    return _remembered(world.out / f"choices/{name}-training.json", measure)


def _choose_knobs(world: World, name: str, run: runs.Run, seed: int) -> runs.Knobs:
    """Guidance, and an adapter's λ, chosen on validation people."""
    if run.personal:  # the choice of the training has left validation people
        chosen = run.config.optimizer
        run = runs.open_run(world.out / _choice_of(name, chosen.learning_rate, chosen.steps))
    whom = world.validation.some(CHOOSERS["personal"]) if run.personal else world.validation

    def loss(changes: Mapping[str, float]) -> float:
        words = "-".join(f"{k}{v:g}" for k, v in changes.items())
        label = f"{name}-{seed}-choice-{words}"
        return world.judge.loss(_verdict(world, label, run, whom, run.knobs(**changes)))

    def measure() -> dict[str, float]:
        tried = [{"guidance": g} for g in GUIDANCE]
        best = min(tried, key=loss)
        if run.personal:
            return best
        return min([best, *({**best, "scale": s} for s in SCALES)], key=loss)

    return run.knobs(**_remembered(world.out / f"choices/{name}-{seed}.json", measure))


def _control(
    world: World,
    name: str,
    config: ConfigDict,
    seed: int,
    label: str,
    change: Callable[[np.ndarray], np.ndarray] | EveryPhoto | None,
) -> Verdict:
    """A method's run under the same choices, with other references, or none."""
    run = runs.open_run(_trained(world.out / f"runs/{name}-{seed}", config, seed))
    knobs = _choose_knobs(world, name, run, seed)
    return _verdict(world, f"{name}-{seed}-{label}", run, world.test, knobs, change)


def _verdict(
    world: World,
    label: str,
    run: runs.Run,
    whom: Subjects,
    knobs: runs.Knobs,
    change: Callable[[np.ndarray], np.ndarray] | EveryPhoto | None = lambda embeddings: embeddings,
) -> Verdict:
    """What the reader says of a run's pictures of people; pictures are kept and painted once.

    change: of the references' embeddings; or an aggregator in place of the run's; None for no
    references at all.
    """
    file = world.out / f"pictures/{label}.npy"
    if file.exists():
        return world.judge.pictures(whom, np.load(file))
    print(f"painting {label}", flush=True)
    aggregator = change if isinstance(change, EveryPhoto) else run.aggregator
    compiled = world.painters.get((aggregator, knobs.steps))
    if compiled is None:
        compiled = paint.make_painter(run.pipeline, aggregator, steps=knobs.steps)
        world.painters[aggregator, knobs.steps] = compiled
    painter = runs.make_painter(run, knobs, painter=compiled)
    who, prompts = map(list, zip(*whom.pictures, strict=True))
    shown = {}
    if run.personal:
        shown = {"names": [whom.names[i] for i in who]}
    elif change is not None:
        seen = world.look(run.eye, whom)
        seen = (seen if isinstance(change, EveryPhoto) else change(seen))[who]
        shown = {"embeddings": seen, "weights": np.ones(seen.shape[:2], np.float32)}
    keys = paint.picture_keys(0, len(prompts))
    pictures = painter([run.prompt(prompt) for prompt in prompts], keys, **shown)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".new.npy")
    np.save(beside, pictures.astype(np.float16))
    beside.rename(file)
    return world.judge.pictures(whom, np.load(file))


def _photos(world: World, config: ConfigDict) -> dict[str, Verdict]:
    """Each person's first photo; the held-out ones as the VAE gives them back."""
    base, whom = open_pipeline(config), world.test
    first, size, crop = whom.references[:, 0], base.image_size, config.data.crop
    other = judging.photos_as_pictures(world.photos, first, size, crop)
    real = judging.photos_as_pictures(world.photos, whom.held_out, size, crop)
    restore = jax.jit(lambda params, pixels: base.vae.module.apply({"params": params}, pixels))
    parts = [restore(base.vae.params, real[i : i + 32]) for i in range(0, len(real), 32)]
    restored = np.clip(np.concatenate(parts), -1.0, 1.0)
    return {
        "real photos": world.judge.photos(whom, first, other),
        "real photos through the VAE": world.judge.photos(whom, whom.held_out, restored),
    }


def _grid(world: World, names: list[str], crop: float) -> PIL.Image.Image:
    """The first people: three of their photos and the held-out one, then what each method made of
    them, plainly and as on the held-out photo."""
    whom, cells = world.test, []
    painted = {name: np.load(world.out / f"pictures/{name}-0.npy") for name in names}
    size = painted["sa"].shape[1]
    for i in range(SHOWN):
        rows = [*whom.references[i, :3], whom.held_out[i]]
        photos = judging.photos_as_pictures(world.photos, np.asarray(rows), size, crop)
        pictures = [p[j] for p in painted.values() for j in (i, len(whom.names) + i)]
        cells.append([images.to_uint8(x) for x in (*photos, *np.float32(pictures))])
    titles = ["photos", "", "", "held out", *(t for name in names for t in (name, ""))]
    return images.grid(cells, titles=titles)


def _remembered(file: Path, measure: Callable) -> float | dict:
    """What `measure` found, kept in a file."""
    if not file.exists():
        found = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def _same_settings(out: Path, arguments: argparse.Namespace) -> None:
    """Refuses a folder of another comparison: its pictures would be taken for this one's."""
    file = out / "settings.json"
    free = ("out", "methods", "seeds", "fid")  # these only add to what is there
    settings = {name: value for name, value in vars(arguments).items() if name not in free}
    if file.exists() and json.loads(file.read_text()) != settings:
        raise UserError(
            f"--out {out} holds a comparison with other settings ({file.read_text().strip()}); "
            "choose another folder"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--preset", default="tiny", help="of all configs")
    flags.add_argument("--out", required=True, help="folder for runs, pictures and the table")
    flags.add_argument("--methods", nargs="+", default=list(report.PAPER), help=", ".join(METHODS))
    flags.add_argument("--seeds", type=int, default=1, help="trainings of each method")
    flags.add_argument("--people", type=int, default=128, help="test people")
    flags.add_argument("--pipeline", help="the base, in place of the preset's; with its reader")
    flags.add_argument("--steps", type=int, help="of each adapter's training; the config's if not")
    flags.add_argument(
        "--fid", action="store_true", help="with FID, though of fewer pictures than features"
    )
    flags.add_argument("--configs", default="configs", help="folder of the configs")
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
