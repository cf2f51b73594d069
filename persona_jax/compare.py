"""Trains several methods on the same people and compares them on people not seen in training.

python -m persona_jax.compare --preset tiny --out runs/compare

All methods have equal budgets. Guidance, λ and learning rates are chosen on validation people. All
methods generate the same test people with the same prompts and noise. The table also has control
rows: real photos, real photos through the VAE, another person's photos, text alone, and the plain
adapter with all photos side by side. Writes OUT/table.md, report.html, table.json and grid.png. An
interrupted comparison continues when it is run again.
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
from persona_jax.data.photo_datasets import Photos
from persona_jax.errors import UserError
from persona_jax.evaluation import evaluators, networks, report
from persona_jax.evaluation.builder import build_evaluator
from persona_jax.evaluation.evaluators import EvaluationResult, Evaluator, Subjects
from persona_jax.interop.checkpoints import newest_step
from persona_jax.models.aggregators import EveryPhoto
from persona_jax.pipelines import generation
from persona_jax.pipelines.pipeline import Pipeline, open_pipeline
from persona_jax.runs import finished_run, subject_sampling
from persona_jax.runtime import buckets, files, settings, untrusted
from persona_jax.runtime.command_line import load_config, run_with_arguments
from persona_jax.runtime.run_folder import config_difference
from persona_jax.runtime.settings import number

ADAPTERS = ("ip", "max", "avg", "sa", "avg_mlp")
METHODS = (*ADAPTERS, "dreambooth", "lora")
GUIDANCE, SCALES = (2.0, 3.0, 5.0), (0.75, 1.25)
"""Choices for sampling; λ = 1 is used with each guidance, the other λ with the best one."""
DOUBLINGS = 3
"""How often per-person fine-tuning may double or halve the config's learning rate, and halve its
number of steps."""
SHOWN = 8
"""Number of people on the grid."""
WITHOUT_EFFECT = ("data.data_dir:", "log_every:", "save_every:", "grid.", "grid_every:", "mesh.")
"""Settings that change no result."""
CHOOSERS = {"adapter": 32, "personal": 8}
"""Number of validation people for choices. Per-person fine-tuning must train each of them."""


@dataclasses.dataclass(frozen=True)
class World:
    """What all methods share: people, photos and the evaluator.

    Attributes:
      out: output folder.
      photos: of the dataset.
      evaluator: of generated images.
      test, validation: people to generate.
      samplers: compiled samplers by number of steps; all methods share one base.
      embeddings: cache of the references' embeddings, by image encoder and names of the subjects.
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
        """Embeds the references of each subject, once; None for per-person fine-tuning."""
        if run.encoder is None:
            return None
        key = (run.encoder.hash, *subjects.names)
        if key not in self.embeddings:
            self.embeddings[key] = subject_sampling.encode_references(run, self.photos, subjects)
        return self.embeddings[key]


def main(arguments: argparse.Namespace) -> None:
    """Trains, chooses settings, generates, evaluates and writes the table."""
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown or "sa" not in arguments.methods:
        raise UserError(
            f"--methods {' '.join(arguments.methods)}: expected some of {', '.join(METHODS)}, with "
            "sa (differences are relative to it)"
        )
    if arguments.seeds < 1:
        raise UserError(f"--seeds {arguments.seeds}: expected 1 or more")
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
        # Per-person fine-tuning has a training for each person: one seed is enough.
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
        f"{people} people, {arguments.seeds} trainings of each adapter; evaluator: {evaluator.name}"
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
    """Trains a method from one seed with chosen settings and evaluates it, by name of the row.

    Per-person fine-tuning has a second row: other people, generated by the same weights.
    """
    if name in ADAPTERS:
        workdir = _trained(world.out / f"runs/{name}-{seed}", config, seed=seed)
    else:
        length = _choose_training(world, name, config)
        workdir = world.out / f"runs/{name}-{seed}"
        _finetuned(
            workdir,
            config,
            group="test",
            count=len(world.test.names),
            seed=seed,
            learning_rate=length["learning_rate"],
            steps=int(length["steps"]),
        )
    run = finished_run.open_run(workdir)
    settings = _choose_settings(world, name, run, seed)
    out = {name: _evaluate(world, f"{name}-{seed}", run, world.test, settings)}
    if run.personal:
        label = f"{name}-{seed}-anybody"
        anybody = _evaluate(world, label, run, world.test, settings, named=False)
        out[f"{name}, anybody by the same weights"] = anybody
    return out


def _trained(workdir: Path, config: ConfigDict, seed: int) -> Path:
    """Trains an adapter to the end; returns its workdir."""
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
    """Fine-tunes people one by one; returns the workdir."""
    config = config.copy_and_resolve_references()
    config.seed, config.optimizer.learning_rate = seed, learning_rate
    config.optimizer.steps = steps
    config.people.group, config.people.count = group, count
    if len(list(workdir.glob("people/*/person.json"))) < count:
        print(f"fine-tuning {count} people in {workdir}", flush=True)
        train.main(config, workdir)
    return workdir


def _on_validation(
    world: World, name: str, config: ConfigDict, learning_rate: float, steps: int
) -> finished_run.Run:
    """Fine-tunes the first validation people with these settings and opens the run."""
    workdir = world.out / f"runs/{name}-choice-{learning_rate:g}-{steps}"
    count = len(world.validation.some(CHOOSERS["personal"]).names)
    _finetuned(
        workdir,
        config,
        group="validation",
        count=count,
        seed=0,
        learning_rate=learning_rate,
        steps=steps,
    )
    return finished_run.open_run(workdir)


def _choose_training(world: World, name: str, config: ConfigDict) -> dict[str, float | int]:
    """Chooses the learning rate, then the number of steps, on validation people.

    The loss is the evaluator's for these people, plus a penalty: the amount by which images of
    other people by the same weights are closer to these people than the base's images are.
    """
    few = world.validation.some(CHOOSERS["personal"])
    most, rate = config.optimizer.steps, config.optimizer.learning_rate
    settings = finished_run.SamplingSettings(**config.sampling, scale=1.0)

    def loss(choice: Mapping[str, float | int]) -> float:
        run = _on_validation(world, name, config, choice["learning_rate"], int(choice["steps"]))
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
    """Line search over one number of the choice.

    Multiplies it by the first of the factors that lowers the loss, and repeats this as long as the
    loss falls, at most :data:`DOUBLINGS` times.
    """
    for factor in factors:
        choices = [choice]
        while len(choices) <= DOUBLINGS:
            value = choices[-1][key]
            further = {**choices[-1], key: type(value)(value * factor) or 1}
            if loss(further) >= loss(choices[-1]):
                break
            choices.append(further)
        if len(choices) > 1:
            return choices[-1]
    return choice


def _choose_settings(
    world: World, name: str, run: finished_run.Run, seed: int
) -> finished_run.SamplingSettings:
    """Chooses guidance, and an adapter's λ, on validation people."""
    if run.personal:  # _choose_training has fine-tuned validation people with these settings
        chosen = run.config.optimizer
        run = _on_validation(world, name, run.config, chosen.learning_rate, chosen.steps)
    subjects = world.validation.some(CHOOSERS["personal"]) if run.personal else world.validation

    def loss(changes: Mapping[str, float]) -> float:
        text = "-".join(f"{k}{v:g}" for k, v in changes.items())
        label = f"{name}-{seed}-choice-{text}"
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
    """Evaluates an adapter with its chosen settings and other references (:func:`_evaluate`)."""
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
    """Generates images of people with a run and evaluates them. Images are cached on disk.

    Args:
      world: people and evaluator.
      label: name of the cached file.
      run: to sample from.
      subjects: the people.
      settings: of sampling.
      see: changes the references' embeddings; it may return None, for text alone.
      side_by_side: no aggregator; each photo gives tokens of its own.
      named: see :func:`persona_jax.runs.subject_sampling.sample_subjects`.
    """
    file = world.out / f"pictures/{label}.npy"
    with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # damaged: generated again
        return world.evaluator.pictures(subjects, np.load(file, allow_pickle=False))
    print(f"generating {label}", flush=True)
    if settings.steps not in world.samplers:
        world.samplers[settings.steps] = generation.make_sampler(run.pipeline, steps=settings.steps)
    adapters = None
    if side_by_side:
        assert run.adapter is not None
        adapters = [dataclasses.replace(run.adapter, aggregator=EveryPhoto())]
    compiled = world.samplers[settings.steps]
    sampler = subject_sampling.make_run_sampler(run, settings, sampler=compiled, adapters=adapters)
    references = world.encode_references(run, subjects)
    seen = None if references is None else see(references)
    pictures = subject_sampling.sample_subjects(
        run, sampler, subjects, seen, scale=settings.scale, named=named
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".new.npy")
    np.save(beside, pictures.astype(np.float16))
    beside.rename(file)
    return world.evaluator.pictures(subjects, np.load(file))


def _through_the_vae(world: World, base: Pipeline, crop: float) -> EvaluationResult:
    """Evaluates the held-out photos after encoding and decoding by the base's VAE."""
    rows, vae = world.test.held_out, base.tower("vae")
    real = evaluators.photos_as_pictures(world.photos, rows, base.image_size, crop)
    restore = jax.jit(lambda params, pixels: vae.module.apply({"params": params}, pixels))
    parts = [restore(vae.params, real[i : i + 32]) for i in range(0, len(real), 32)]
    restored = np.clip(np.concatenate(parts), -1.0, 1.0)
    return world.evaluator.photos(world.test, rows, restored)


def _grid(world: World, names: list[str], crop: float) -> PIL.Image.Image:
    """Draws the first people: three photos, the held-out photo, and two images of each method.

    The images are for the plain prompt and for the held-out photo's caption.
    """
    subjects, cells = world.test, []
    images_of = {name: np.load(world.out / f"pictures/{name}-0.npy") for name in names}
    size = images_of["sa"].shape[1]
    for i in range(SHOWN):
        rows = [*subjects.references[i, :3], subjects.held_out[i]]
        photos = evaluators.photos_as_pictures(world.photos, np.asarray(rows), size, crop)
        pictures = [p[j] for p in images_of.values() for j in (i, len(subjects.names) + i)]
        cells.append([images.to_uint8(x) for x in (*photos, *np.asarray(pictures, np.float32))])
    titles = ["photos", "", "", "held out", *(t for name in names for t in (name, ""))]
    return images.grid(cells, titles=titles)


def _remembered(file: Path, measure: Callable[[], dict]) -> dict:
    """Returns the result of `measure`, cached in a file."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # damaged: measured again
        return json.loads(file.read_text())
    result = measure()
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.whole_file(file) as part:
        part.write_text(json.dumps(result))
    return json.loads(file.read_text())


def _same_settings(out: Path, people: int, configs: Mapping[str, ConfigDict]) -> None:
    """Raises UserError for the folder of another comparison, whose cached images do not apply.

    It is another one if a config has other settings, or if the number of test people differs. Other
    methods and seeds add files but do not invalidate cached ones.
    """
    file, before = out / "settings.json", {}
    with contextlib.suppress(FileNotFoundError):
        before = untrusted.read_json(file)
    known = before.get("configs", {})
    if not isinstance(known, dict):
        raise UserError(f"--out {out}: of an earlier version of compare; choose another folder")
    changes = []
    if before and before.get("people") != people:
        changes.append(f"people: {before.get('people')}, now {people}")
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
    """Builds the command line."""
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
    flags.add_argument(
        "--pipeline", help="replaces the preset's base; with its trait classifier beside it"
    )
    flags.add_argument(
        "--steps",
        type=number(settings.STEPS),
        help="of each adapter's training; default: the config's",
    )
    flags.add_argument(
        "--fid", action="store_true", help="report FID even for fewer images than features"
    )
    networks.add_flags(flags)
    flags.add_argument("--configs", default="configs", help="folder of the configs")
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
