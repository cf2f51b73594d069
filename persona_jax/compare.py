"""Trains several methods on the same people and compares them on people none of them has seen.

python -m persona_jax.compare --preset tiny --out runs/compare

Equal budgets; guidance, λ and learning rates are chosen on validation people; all methods paint the
same test people with the same prompts and noise. Beside the methods stand the rows without which
their numbers say little: real photos, real photos through the VAE, another person's photos, the
text alone, the plain adapter with all photos side by side. Writes OUT/table.md, report.html,
table.json and grid.png. Stopped, it goes on where it was when run again.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import PIL.Image
from jaxtyping import Float
from ml_collections import ConfigDict

from persona_jax import train
from persona_jax.data import images
from persona_jax.data.dataset import open_dataset
from persona_jax.data.photos import Photos
from persona_jax.errors import UserError
from persona_jax.evaluation import evaluators, networks, report
from persona_jax.evaluation.builder import build_evaluator
from persona_jax.evaluation.evaluators import EvaluationResult, Evaluator, Subjects
from persona_jax.interop.checkpoints import newest_step
from persona_jax.models.aggregators import EveryPhoto
from persona_jax.pipelines import generation
from persona_jax.pipelines.pipeline import Pipeline, open_pipeline
from persona_jax.runs import finished_run, subject_sampling
from persona_jax.runtime import buckets, files, outside, settings
from persona_jax.runtime.command_line import load_config, run_with_arguments
from persona_jax.runtime.run_folder import config_difference
from persona_jax.runtime.settings import number

ADAPTERS = ("ip", "max", "avg", "sa", "avg_mlp")
METHODS = (*ADAPTERS, "dreambooth", "lora")
GUIDANCE, SCALES = (2.0, 3.0, 5.0), (0.75, 1.25)
"""What sampling may choose from; λ = 1 is tried with each guidance."""
DOUBLINGS = 3
"""How far methods of one person may go from the config's learning rate, up or down, and from its
number of steps, down."""
SHOWN = 8
"""People on the grid."""
WITHOUT_EFFECT = ("data.data_dir:", "log_every:", "save_every:", "grid.", "grid_every:", "mesh.")
"""Settings that change no result."""
CHOOSERS = {"adapter": 32, "personal": 8}
"""Validation people by whom choices are made; personal ones are trained for it."""


@dataclasses.dataclass(frozen=True)
class World:
    """What all methods share: people, photos, and who judges.

    Attributes:
      out: where everything goes.
      photos: all of them.
      evaluator: who says how good pictures are.
      test, validation: whom to paint.
      samplers: compiled, by number of steps; all methods share one base.
      embeddings: embeddings of the subjects' references, by the image encoder and the subjects'
        names.
    """

    out: Path
    photos: Photos
    evaluator: Evaluator
    test: Subjects
    validation: Subjects
    samplers: dict = dataclasses.field(default_factory=dict)
    embeddings: dict = dataclasses.field(default_factory=dict)

    def encode_references(
        self, run: finished_run.Run, subjects: Subjects
    ) -> Float[np.ndarray, "P N D"] | None:
        """What the run's encoder sees in the references of each; looked at once."""
        if run.encoder is None:
            return None
        key = (run.encoder.hash, *subjects.names)
        if key not in self.embeddings:
            self.embeddings[key] = subject_sampling.encode_references(run, self.photos, subjects)
        return self.embeddings[key]


def main(arguments: argparse.Namespace) -> None:
    """Runs → choices → pictures → verdicts → table."""
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown or "sa" not in arguments.methods:
        raise UserError(
            f"--methods {' '.join(arguments.methods)}: of {', '.join(METHODS)}, sa among them "
            "(differences are told from it)"
        )
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds}: one training of each adapter or more")
    out = buckets.local(arguments.out)
    configs = {name: _config(arguments, name) for name in arguments.methods}
    data = configs["sa"]
    photos, groups = open_dataset(data.data)
    people = evaluators.how_many(arguments.people, groups.test)
    evaluator = build_evaluator(data, photos, people, arguments)
    world = World(
        out,
        photos,
        evaluator,
        evaluators.choose_subjects(evaluator, photos, groups.test, people, data, evaluators.AGAIN),
        evaluators.choose_subjects(evaluator, photos, groups.validation, CHOOSERS["adapter"], data),
    )
    _same_settings(out, people, configs)
    rows: dict[str, list[EvaluationResult]] = {}
    for name, config in configs.items():
        # What is learnt by heart is a training for each person anyway: people are seeds too.
        for seed in range(arguments.seeds if name in ADAPTERS else 1):
            for row, result in _method(world, name, config, seed).items():
                rows.setdefault(row, []).append(result)
    roll = {"see": lambda seen: np.roll(seen, 1, axis=0)}
    for seed in range(arguments.seeds):
        another = _control(world, "sa", data, seed, "another", **roll)
        rows.setdefault("sa, another person's photos", []).append(another)
        if "ip" in configs:
            together = _control(world, "ip", configs["ip"], seed, "every", side_by_side=True)
            rows.setdefault("ip, all photos side by side", []).append(together)
    rows["text alone"] = [_control(world, "sa", data, 0, "text", see=lambda seen: None)]
    base, crop = open_pipeline(data), data.data.crop
    first, real = evaluators.real_photos(evaluator, photos, world.test, base.image_size, crop)
    rows |= {"real photos": [first]}
    rows |= {"real photos through the VAE": [_through_the_vae(world, base, crop)]}
    images.save_sheet(_grid(world, arguments.methods, crop), out / "grid.png")
    caption = (
        f"{people} people, {arguments.seeds} trainings of each adapter; judged by {evaluator.name}"
    )
    table = report.table(rows, real, versus="sa", fid=arguments.fid)
    report.write(out, table, caption, ["grid.png"])


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


def _method(world: World, name: str, config: ConfigDict, seed: int) -> dict[str, EvaluationResult]:
    """The verdict on a method trained from one seed, its choices made; of people learnt by heart
    also what has become of everybody else."""
    if name in ADAPTERS:
        workdir = _trained(world.out / f"runs/{name}-{seed}", config, seed=seed)
    else:
        length = _choose_training(world, name, config)
        changes = {"group": "test", "count": len(world.test.names), "seed": seed}
        workdir = world.out / f"runs/{name}-{seed}"
        _finetuned(workdir, config, **changes, **length)
    run = finished_run.open_run(workdir)
    settings = _choose_settings(world, name, run, seed)
    out = {name: _evaluate(world, f"{name}-{seed}", run, world.test, settings)}
    if run.personal:
        label = f"{name}-{seed}-anybody"
        anybody = _evaluate(world, label, run, world.test, settings, named=False)
        out[f"{name}, anybody by the same weights"] = anybody
    return out


def _trained(workdir: Path, config: ConfigDict, seed: int) -> Path:
    """The workdir of an adapter trained to the end."""
    config = config.copy_and_resolve_references()
    config.seed, config.grid.people = seed, 0
    if (newest_step(workdir / "checkpoints") or 0) < config.optimizer.steps:
        print(f"training {workdir}", flush=True)
        train.main(config, workdir)
    return workdir


def _finetuned(
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


def _on_validation(
    world: World, name: str, config: ConfigDict, learning_rate: float, steps: int
) -> finished_run.Run:
    """The first validation people, learnt so."""
    workdir = world.out / f"runs/{name}-choice-{learning_rate:g}-{steps}"
    count = len(world.validation.some(CHOOSERS["personal"]).names)
    changes = {"group": "validation", "count": count, "seed": 0}
    choice = {"learning_rate": learning_rate, "steps": steps}
    return finished_run.open_run(_finetuned(workdir, config, **changes, **choice))


def _choose_training(world: World, name: str, config: ConfigDict) -> dict[str, float | int]:
    """The learning rate and then the steps by which validation people come out best, and anybody
    else stays what the base paints: what is lost there counts against what the person gains."""
    few = world.validation.some(CHOOSERS["personal"])
    most, rate = config.optimizer.steps, config.optimizer.learning_rate
    settings = finished_run.SamplingSettings(**config.sampling, scale=1.0)

    def loss(choice: Mapping[str, float | int]) -> float:
        run = _on_validation(world, name, config, **choice)
        label = run.workdir.name
        own = world.evaluator.loss(_evaluate(world, label, run, few, settings))
        label = f"{label}-anybody"
        anybody = world.evaluator.loss(_evaluate(world, label, run, few, settings, named=False))
        return own + max(0.0, untouched() - anybody)

    @functools.cache
    def untouched() -> float:
        base = finished_run.open_base(config.pipeline)
        return world.evaluator.loss(_evaluate(world, f"{name}-choice-base", base, few, settings))

    def measure() -> dict[str, float | int]:
        start = {"learning_rate": rate, "steps": most}
        best = _walk(start, "learning_rate", (2.0, 0.5), loss)
        return _walk(best, "steps", (0.5,), loss)

    return _remembered(world.out / f"choices/{name}-training.json", measure)


def _walk(
    choice: dict[str, float | int],
    key: str,
    factors: Sequence[float],
    loss: Callable[[dict[str, float | int]], float],
) -> dict[str, float | int]:
    """Multiplies one of the choice's numbers by the first of the factors that lowers the loss, and
    on by the same for as long as it does, :data:`DOUBLINGS` times at most."""
    for factor in factors:
        found = [choice]
        while len(found) <= DOUBLINGS:
            value = found[-1][key]
            further = {**found[-1], key: type(value)(value * factor) or 1}
            if loss(further) >= loss(found[-1]):
                break
            found.append(further)
        if len(found) > 1:
            return found[-1]
    return choice


def _choose_settings(
    world: World, name: str, run: finished_run.Run, seed: int
) -> finished_run.SamplingSettings:
    """Guidance, and an adapter's λ, chosen on validation people."""
    if run.personal:  # the choice of the training has left validation people
        chosen = run.config.optimizer
        run = _on_validation(world, name, run.config, chosen.learning_rate, chosen.steps)
    subjects = world.validation.some(CHOOSERS["personal"]) if run.personal else world.validation

    def loss(changes: Mapping[str, float]) -> float:
        words = "-".join(f"{k}{v:g}" for k, v in changes.items())
        label = f"{name}-{seed}-choice-{words}"
        return world.evaluator.loss(
            _evaluate(world, label, run, subjects, run.sampling_settings(**changes))
        )

    def measure() -> dict[str, float]:
        tried = [{"guidance": g} for g in GUIDANCE]
        best = min(tried, key=loss)
        if run.personal:
            return best
        return min([best, *({**best, "scale": s} for s in SCALES)], key=loss)

    return run.sampling_settings(**_remembered(world.out / f"choices/{name}-{seed}.json", measure))


def _control(
    world: World, name: str, config: ConfigDict, seed: int, label: str, **changes
) -> EvaluationResult:
    """An adapter under the same choices, with other references, or none (see :func:`_evaluate`)."""
    run = finished_run.open_run(_trained(world.out / f"runs/{name}-{seed}", config, seed))
    settings = _choose_settings(world, name, run, seed)
    return _evaluate(world, f"{name}-{seed}-{label}", run, world.test, settings, **changes)


def _evaluate(
    world: World,
    label: str,
    run: finished_run.Run,
    subjects: Subjects,
    settings: finished_run.SamplingSettings,
    *,
    see: Callable[[np.ndarray], np.ndarray | None] = lambda seen: seen,
    side_by_side: bool = False,
    named: bool = True,
) -> EvaluationResult:
    """The verdict on a run's pictures of people; pictures are kept and painted once.

    Args:
      see: changes the references' embeddings.
      side_by_side: no aggregator; each photo makes tokens of its own.
      named: see :func:`persona_jax.runs.subject_sampling.sample_subjects`.
    """
    file = world.out / f"pictures/{label}.npy"
    with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # (damaged: painted again)
        return world.evaluator.pictures(subjects, np.load(file, allow_pickle=False))
    print(f"painting {label}", flush=True)
    if settings.steps not in world.samplers:
        world.samplers[settings.steps] = generation.make_sampler(run.pipeline, steps=settings.steps)
    adapters = None
    if side_by_side:
        adapters = [run.adapter.replace(aggregator=EveryPhoto())]
    compiled = world.samplers[settings.steps]
    sampler = subject_sampling.make_run_sampler(run, settings, sampler=compiled, adapters=adapters)
    seen = see(world.encode_references(run, subjects))
    pictures = subject_sampling.sample_subjects(
        run, sampler, subjects, seen, scale=settings.scale, named=named
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".new.npy")
    np.save(beside, pictures.astype(np.float16))
    beside.rename(file)
    return world.evaluator.pictures(subjects, np.load(file))


def _through_the_vae(world: World, base: Pipeline, crop: float) -> EvaluationResult:
    """The held-out photos as the base's VAE gives them back."""
    rows = world.test.held_out
    real = evaluators.photos_as_pictures(world.photos, rows, base.image_size, crop)
    restore = jax.jit(lambda params, pixels: base.vae.module.apply({"params": params}, pixels))
    parts = [restore(base.vae.params, real[i : i + 32]) for i in range(0, len(real), 32)]
    restored = np.clip(np.concatenate(parts), -1.0, 1.0)
    return world.evaluator.photos(world.test, rows, restored)


def _grid(world: World, names: list[str], crop: float) -> PIL.Image.Image:
    """The first people: three of their photos and the held-out one, then what each method made of
    them, plainly and as on the held-out photo."""
    subjects, cells = world.test, []
    painted = {name: np.load(world.out / f"pictures/{name}-0.npy") for name in names}
    size = painted["sa"].shape[1]
    for i in range(SHOWN):
        rows = [*subjects.references[i, :3], subjects.held_out[i]]
        photos = evaluators.photos_as_pictures(world.photos, np.asarray(rows), size, crop)
        pictures = [p[j] for p in painted.values() for j in (i, len(subjects.names) + i)]
        cells.append([images.to_uint8(x) for x in (*photos, *np.float32(pictures))])
    titles = ["photos", "", "", "held out", *(t for name in names for t in (name, ""))]
    return images.grid(cells, titles=titles)


def _remembered(file: Path, measure: Callable[[], dict]) -> dict:
    """What `measure` found, kept in a file."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # (damaged: measured again)
        return json.loads(file.read_text())
    found = measure()
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.whole_file(file) as part:
        part.write_text(json.dumps(found))
    return json.loads(file.read_text())


def _same_settings(out: Path, people: int, configs: Mapping[str, ConfigDict]) -> None:
    """Refuses a folder of another comparison: its pictures would be taken for this one's. It is
    another by what its configs hold, wherever that came from, or by the number of test people;
    methods and seeds only add to what is there."""
    file, before = out / "settings.json", {}
    with contextlib.suppress(FileNotFoundError):
        before = outside.read_json(file)
    known = before.get("configs", {})
    if not isinstance(known, dict):
        raise UserError(f"--out {out}: of an earlier version of compare; choose another folder")
    changes = [f"people: {before.get('people')}, now {people}"] * (
        bool(before) and before.get("people") != people
    )
    for name in configs.keys() & known.keys():
        lines = config_difference(ConfigDict(known[name]), configs[name])
        changes += [f"{name}: {line}" for line in lines if not line.startswith(WITHOUT_EFFECT)]
    if changes:
        raise UserError(
            f"--out {out} holds a comparison with other settings "
            f"({'; '.join(sorted(changes)):.300}); choose another folder"
        )
    contents = {name: json.loads(config.to_json()) for name, config in configs.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        with files.whole_file(file) as part:
            settings = {"people": people, "configs": known | contents}
            part.write_text(json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--preset", default="tiny", help="of all configs")
    flags.add_argument(
        "--out", type=settings.path, required=True, help="folder for runs, pictures and the table"
    )
    flags.add_argument("--methods", nargs="+", default=list(report.PAPER), help=", ".join(METHODS))
    flags.add_argument(
        "--seeds", type=number(settings.COUNT), default=1, help="trainings of each adapter"
    )
    flags.add_argument(
        "--people", type=number(settings.COUNT), help="test people; all, 128 at most, if not given"
    )
    flags.add_argument("--pipeline", help="the base, in place of the preset's; with its reader")
    flags.add_argument(
        "--steps",
        type=number(settings.STEPS),
        help="of each adapter's training; the config's if not",
    )
    flags.add_argument(
        "--fid", action="store_true", help="with FID, though of fewer pictures than features"
    )
    networks.add_flags(flags)
    flags.add_argument("--configs", default="configs", help="folder of the configs")
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
