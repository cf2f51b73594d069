"""Runs per-person fine-tuning, ``config.people.at_once`` people at a time."""

import functools
import hashlib
import itertools
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from persona_jax.data import encodings, images
from persona_jax.data.dataset import open_dataset, rows_of
from persona_jax.data.photo_datasets import Photos
from persona_jax.data.splits import People, photos_of
from persona_jax.errors import UserError
from persona_jax.interop import folders, tensors
from persona_jax.interop.lora_files import FILE, save_lora
from persona_jax.methods import finetuning
from persona_jax.models import lora
from persona_jax.models.vae import AutoencoderKL
from persona_jax.pipelines import generation
from persona_jax.pipelines.pipeline import Pipeline, open_pipeline
from persona_jax.runtime import buckets, checksums, files
from persona_jax.runtime.mesh import (
    first_process,
    initialize_distributed,
    make_mesh,
    place,
    shard_params,
    to_host,
)
from persona_jax.runtime.run_folder import refuse_another_run, write_run_files
from persona_jax.training.loop import fit, locked
from persona_jax.training.state import init_state

LATENTS = "latents.npy"


def finetune(config: ConfigDict, workdir: Path) -> None:
    """Runs :func:`finetune_people` with the workdir locked against a second run."""
    initialize_distributed()
    with locked(workdir):
        finetune_people(config, workdir)


def finetune_people(config: ConfigDict, workdir: Path) -> None:
    """Fine-tunes the config's people, ``config.people.at_once`` of them in one program.

    A finished person is written to ``WORKDIR/people/NAME`` and is not trained again. Interrupted
    training continues from its last checkpoint.
    """
    mesh = make_mesh(**config.mesh)
    refuse_another_run(workdir, config, ("method", "seed", "pipeline", "lora", "token", "nouns"))
    write_run_files(workdir, config)

    photos, groups = open_dataset(config.data)
    people = chosen_people(config, groups)
    pipeline = open_pipeline(config, mesh)
    own = training_rows(photos, people, config)
    moments = encode_photos(photos, np.concatenate(own), pipeline, config)
    first = np.cumsum([0, *map(len, own)])
    prompts = [
        finetuning.insert_token(p, config.token, config.nouns)
        for p in captions(photos, own, config)
    ]
    tokens, _ = pipeline.tokenize(prompts)
    prior = class_images(photos, groups, pipeline, config)

    at_once = config.people.at_once
    optimizer = finetuning.make_people_optimizer(config)
    step_fn = finetuning.people_step(config, pipeline, optimizer, mesh)
    frozen = finetuning.person_frozen_params(config, pipeline)
    placed = place(frozen, shard_params(mesh, frozen))
    data = {"moments": moments, "tokens": tokens, **prior}
    for start in range(0, len(people), at_once):
        # Pads the last group with the last person, so that shapes match and nothing recompiles.
        chosen = np.minimum(np.arange(start, start + at_once), len(people) - 1)
        names = [people[i] for i in chosen]
        if all((person_folder(workdir, name) / "person.json").exists() for name in names):
            continue
        print(f"{start} of {len(people)} people done; now {', '.join(dict.fromkeys(names))}")
        rows = [np.arange(first[i], first[i + 1]) for i in chosen]
        trained = finetuning.init(config, pipeline, person_keys(config.seed, chosen))
        training = workdir / "training" / names[0]
        state = fit(
            init_state(trained, optimizer, mesh),
            step_fn,
            placed,
            functools.partial(person_batches, data, rows, config),
            steps=config.optimizer.steps,
            workdir=training,
            mesh=mesh,
            save_every=config.save_every,
            log_every=config.log_every,
            fingerprint={
                "method": config.method,
                "unet": pipeline.tower("unet").hash,
                "people": names,
            },
        )
        trained = to_host(state.params)
        for i, name in enumerate(names[: len(people) - start]):
            one = jax.tree.map(lambda x, i=i: x[i], trained)
            first_process(functools.partial(save_person, workdir, name, one, pipeline, config))
        first_process(functools.partial(shutil.rmtree, training))
    if jax.process_index() == 0:
        run, person, prompt = map(shlex.quote, (str(workdir), people[0], prompts[0]))
        print(
            f"{len(people)} people are in {workdir / 'people'}. Generate images of one:\n"
            f"  python -m persona_jax.sample --workdir {run} --person {person} "
            f"--prompt {prompt} --num 8 --out out"
        )


def person_keys(seed: int, people: np.ndarray) -> Key[Array, " Q"]:
    """One key per person, derived from the seed and the person's index ``[Q]``."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(people))


def chosen_people(config: ConfigDict, groups: People) -> list[str]:
    """The first ``config.people.count`` people of the group ``config.people.group``.

    Raises:
      UserError: the group is unknown or has too few people.
    """
    group, count = config.people.group, config.people.count
    people = getattr(groups, group, None)
    if people is None:
        raise UserError(f"config.people.group={group!r}; known: train, validation, test, base")
    if not 0 < count <= len(people):
        raise UserError(f"config.people.count={count}: {group} has {len(people)} people")
    return people[:count]


def training_rows(photos: Photos, people: Sequence[str], config: ConfigDict) -> list[np.ndarray]:
    """Rows of the photos each person is trained on: those that adapters get as references.

    These are the first ``config.references.n``, without the last of them if
    ``config.references.hold_out``.

    Raises:
      UserError: a person has no photo left.
    """
    wanted, hold_out = config.references.n, config.references.hold_out
    rows = [chosen[:wanted] for chosen in photos_of(photos.people, people)]
    own = [chosen[: len(chosen) - 1] if hold_out else chosen for chosen in rows]
    if empty := [name for name, chosen in zip(people, own, strict=True) if not len(chosen)]:
        raise UserError(
            f"{empty[0]}: too few photos to train on (config.references.n={wanted}, "
            f"hold_out={hold_out})"
        )
    return own


def captions(photos: Photos, own: Sequence[np.ndarray], config: ConfigDict) -> list[str]:
    """The caption of each photo, or ``config.prompt`` for all if ``config.captions`` is off."""
    rows = np.concatenate(own)
    return [photos.captions[row] if config.captions else config.prompt for row in rows]


def encode_photos(
    photos: Photos, rows: np.ndarray, pipeline: Pipeline, config: ConfigDict
) -> np.ndarray:
    """Latent moments ``[P, h, w, 2C]`` of photos, cached in ``config.data.data_dir``."""
    vae, size, crop = pipeline.tower("vae"), pipeline.image_size, config.data.crop
    moments = jax.jit(lambda p, x: vae.module.apply({"params": p}, x, method=AutoencoderKL.encode))

    def encode_images(pictures):
        pixels = [images.to_model(images.centre_crop(p, crop), size) for p in pictures]
        return {"moments": np.asarray(moments(vae.params, np.stack(pixels)))}

    job = encodings.EncodingJob(
        photos,
        rows,
        encode_images=encode_images,
        encode_captions=lambda captions: {},
        cache_dir=buckets.local(config.data.data_dir) / "encoded",
        key=f"base {vae.hash} {size} {crop}",
        mirrored=False,
    )
    return np.asarray(encodings.encode(job).arrays["moments"])[:, 0]


def class_images(
    photos: Photos, groups: People, pipeline: Pipeline, config: ConfigDict
) -> dict[str, np.ndarray]:
    """Class images for prior preservation: ``config.prior.pictures`` samples of the frozen base.

    Their prompt is ``config.prior.prompt``, or, if ``config.captions``, captions of people trained
    on. They are cached on disk and reused by all runs with the same settings.

    Returns:
      "class_latents" ``[K, h, w, C]`` and the prompts' "class_tokens" ``[K, T]``.

    Raises:
      UserError: ``config.prior.pictures`` is below 1.
    """
    count, prior = config.prior.pictures, config.prior
    if count < 1:
        raise UserError(f"config.prior.pictures={count}; at least 1 (config.prior.weight=0 is off)")
    prompts = [prior.prompt] * count
    if config.captions:
        rows = rows_of(photos, groups.train)
        chosen = np.random.default_rng(config.seed).choice(rows, count, replace=len(rows) < count)
        prompts = [photos.captions[row] for row in chosen]
    ids, _ = pipeline.tokenize(prompts)
    hashes = [pipeline.tower(name).hash for name in finetuning.TOWERS]
    settings = [prompts, config.seed, prior.steps, prior.guidance, *hashes]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]
    folder = buckets.local(config.data.data_dir) / "class_pictures" / name
    shape = (count, *pipeline.latent_shape)
    if reason := _fault(folder, shape):
        if folder.exists():
            print(f"class images {folder}: {reason}, generating them again", flush=True)
        latents = _generate_class_images(pipeline, ids, config)
        first_process(lambda: _write_latents(folder, latents))
    return {"class_latents": np.load(folder / LATENTS, allow_pickle=False), "class_tokens": ids}


def _fault(folder: Path, shape: tuple[int, ...]) -> str | None:
    """Why cached latents cannot be used (missing, damaged, other shape); None if they can."""
    if not (folder / LATENTS).exists():
        return "not there"
    try:
        result = checksums.fault(folder) or np.load(folder / LATENTS, allow_pickle=False)
    except (ValueError, EOFError) as error:
        return f"damaged ({error})"
    if isinstance(result, str):
        return f"damaged ({result})"
    return None if result.shape == shape else f"of shape {result.shape}, not {shape}"


def _generate_class_images(pipeline: Pipeline, ids: np.ndarray, config: ConfigDict) -> np.ndarray:
    print(f"generating {len(ids)} images of the class, {config.nouns[0]}")
    sampler = generation.make_latent_sampler(pipeline, steps=config.prior.steps)
    empty, _ = pipeline.tokenize([""])
    request = generation.make_request(
        generation.picture_keys(config.seed, len(ids)), ids, empty, guidance=config.prior.guidance
    )
    sampler = jax.jit(generation.split_among_devices(sampler))
    return generation.in_batches(sampler, generation.sampler_params(pipeline), (), request)


def _write_latents(folder: Path, latents: np.ndarray) -> None:
    files.remove(folder)
    with files.whole_folder(folder) as inside:
        np.save(inside / LATENTS, latents)
        checksums.write(inside)


def person_batches(
    data: Mapping[str, np.ndarray], rows: Sequence[np.ndarray], config: ConfigDict, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from step `start` on, for :func:`persona_jax.methods.finetuning.loss`.

    Each person's photos, and the class images, are shuffled anew in each epoch. A person's order
    depends on the seed and their number of photos alone, not on who is trained in the same program.

    Args:
      data: "moments" and "tokens" of all people's photos, "class_latents" and "class_tokens".
      rows: indices of each person's photos in `data` ``[Q][R]``.
      config: ``batch_size`` and ``seed`` are read.
      start: the first step.

    Raises:
      UserError: the batch size is not a multiple of the number of processes.
    """
    size, index, count = config.batch_size, jax.process_index(), jax.process_count()
    if size % count:
        raise UserError(f"config.batch_size={size}: expected a multiple of {count} processes")
    for step in itertools.count(start):
        positions = np.arange(step * size, (step + 1) * size)[index::count]
        own = [chosen[_drawn(positions, len(chosen), (config.seed, 0))] for chosen in rows]
        prior = _drawn(positions, len(data["class_latents"]), (config.seed, 1))
        photos = np.stack(own, axis=1)
        yield {
            "moments": data["moments"][photos],
            "tokens": data["tokens"][photos],
            "class_latents": data["class_latents"][prior],
            "class_tokens": data["class_tokens"][prior],
            "index": (positions % 2**31).astype(np.int32),
        }


def _drawn(positions: np.ndarray, count: int, seed: tuple[int, ...]) -> np.ndarray:
    """Items at the given positions of an endless sequence that shuffles `count` items per epoch."""
    epochs, offsets = np.divmod(positions, count)
    orders = {e: np.random.default_rng((*seed, int(e))).permutation(count) for e in set(epochs)}
    return np.asarray([orders[e][i] for e, i in zip(epochs, offsets, strict=True)])


def person_folder(workdir: Path, name: str) -> Path:
    """The folder of a finished person's weights.

    Raises:
      UserError: `name` is not a file name and would lead outside ``WORKDIR/people``.
    """
    return files.name_below(workdir / "people", name, "--person")


def save_person(
    workdir: Path, name: str, learnt: Mapping, pipeline: Pipeline, config: ConfigDict
) -> None:
    """Writes one person's weights: towers in diffusers' layout, or a LoRA file in PEFT's layout.

    The write is atomic: the folder gets its name when it is complete, with checksums.
    """
    about = {"method": config.method, "called": f"{config.token} {config.nouns[0]}"}
    about |= {name: pipeline.tower(name).hash for name in finetuning.TOWERS}
    files.remove(person_folder(workdir, name))  # left unfinished by an interrupted run
    with files.whole_folder(person_folder(workdir, name)) as folder:
        for tower in learnt.keys() - {"lora"}:
            half = jax.tree.map(lambda x: np.asarray(x, np.float16), learnt[tower])
            folders.save_tower(folder / tower, tower, pipeline.tower(tower).config, half)
        if "lora" in learnt:
            save_lora(learnt["lora"], folder / FILE, config.lora.alpha)
        folders.write_json(folder / "person.json", about)
        checksums.write(folder)


def load_person(workdir: Path, name: str, pipeline: Pipeline, config: ConfigDict) -> dict:
    """Loads a finished person's towers, ``{"unet", "text_encoder"}``.

    Raises:
      UserError: no finished person has that name, the files do not fit, or the base is not the one
        that was trained on.
    """
    folder = person_folder(workdir, name)
    if not (folder / "person.json").exists():
        there = sorted(path.parent.name for path in workdir.glob("people/*/person.json"))
        raise UserError(f"{folder}: no such person; there are: {', '.join(there[:8]) or 'none'}")
    checksums.verify(folder, None, "remove that folder and run the training again")
    finetuning.require_trained_on_base(folder, pipeline)
    frozen = {name: pipeline.tower(name).params for name in finetuning.TOWERS}
    if config.method == "lora":
        update = load_person_lora(workdir, name, pipeline, config)
        return finetuning.apply(config, frozen, {"lora": update})
    own = {
        tower: folders.load_tower(folder / tower, tower, param_dtype=jnp.float32).params
        for tower in finetuning.trained(config)
    }
    return finetuning.apply(config, frozen, own)


def load_person_lora(
    workdir: Path, name: str, pipeline: Pipeline, config: ConfigDict
) -> lora.LoraTree:
    """Loads a finished person's low-rank update of the UNet, not scaled by ``config.lora.alpha``.

    Raises:
      UserError: the tensors do not fit.
    """
    file = person_folder(workdir, name) / FILE
    unet = pipeline.tower("unet").params
    abstract = jax.eval_shape(
        lambda: {"unet": lora.init(jax.random.key(0), unet, config.lora.rank)}
    )
    return tensors.load_tree(abstract, tensors.TensorFiles([file], str(file)))["unet"]
