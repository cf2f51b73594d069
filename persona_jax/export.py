"""Exports a run to files that diffusers reads.

python -m persona_jax.export --workdir runs/sa --out exported --format ip-adapter --verify
python -m persona_jax.export --workdir runs/dreambooth --person ann --out ann --format diffusers
python -m persona_jax.export --workdir runs/lora --person ann --out ann --format lora

ip-adapter: ip_adapter.safetensors in the published plain layout, and the aggregator as one page of
PyTorch (aggregator.py, .json, .safetensors); a resampler is written in the published Plus layout
alone; with --photos also their aggregated embeddings, image_embeds.safetensors. diffusers: a whole
pipeline folder, of a fine-tuned person or of a base. lora: the person's LoRA in PEFT's layout. Each
has a README.md with its base and how to use it. --verify samples with diffusers too and compares
the latents.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from persona_jax.data import photo_decoding
from persona_jax.errors import UserError
from persona_jax.interop import cards, folders, tensors
from persona_jax.interop.aggregator_files import save_aggregator
from persona_jax.interop.checkpoints import read_fingerprint
from persona_jax.interop.ip_adapter import save_ip_adapter, save_ip_adapter_bin
from persona_jax.interop.lora_files import FILE, KOHYA_FILE, save_kohya, save_lora
from persona_jax.methods import finetuning, finetuning_loop
from persona_jax.models import adapter
from persona_jax.models.towers import TOWERS
from persona_jax.pipelines.pipeline import load as load_pipeline
from persona_jax.pipelines.pipeline import save as save_pipeline
from persona_jax.runs import diffusers_check, finished_run
from persona_jax.runtime import buckets, checksums, files, settings
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.run_folder import read_config

DTYPES = {"float32": np.float32, "float16": np.float16}


def main(arguments: argparse.Namespace) -> None:
    """Exports a run. The folder gets its name when all files are written (and verified)."""
    workdir, out = buckets.local(arguments.workdir), buckets.local(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: not an empty folder; name another")
    write = {"ip-adapter": write_adapter, "diffusers": write_pipeline, "lora": write_lora}
    refuse_flags_without_use(arguments)
    try:
        with files.whole_folder(out) as folder:
            difference = write[arguments.format](workdir, folder, arguments)
            checksums.write(folder)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    print(f"written to {out}; {out / 'README.md'} says how to use it")
    if difference is not None:
        print(f"verified: latents differ from those of diffusers by {difference:.1e}, relatively")


def refuse_flags_without_use(arguments: argparse.Namespace) -> None:
    """Raises an error for flags that a format does not use.

    Raises:
      UserError: a flag is given that the format does not use; it is named.
    """
    adapters = arguments.format == "ip-adapter"
    flags = ("person",) if adapters else ("bin", "photos", "weights")
    if given := [f"--{flag}" for flag in flags if getattr(arguments, flag)]:
        raise UserError(
            f"--format {arguments.format} has no use for {', '.join(given)}; leave it out, or take "
            f"--format {'lora or diffusers' if adapters else 'ip-adapter'}"
        )


def write_adapter(workdir: Path, folder: Path, arguments: argparse.Namespace) -> float | None:
    """Writes an adapter's files; returns the difference from diffusers if it is verified."""
    method = read_config(workdir).get("method")
    if method != "adapter":
        raise UserError(f"--format ip-adapter: {workdir} is a run of {method or 'a base'}")
    run = finished_run.open_run(workdir, weights=arguments.weights)
    trained = read_fingerprint(workdir / "checkpoints")
    learnt, encoder, unet = run.adapter, run.encoder, run.pipeline.tower("unet")
    assert learnt is not None  # a run of an adapter has both
    assert encoder is not None
    config, dtype = unet.module.config, DTYPES[arguments.dtype]
    save_ip_adapter(learnt.params, config, folder / "ip_adapter.safetensors", dtype)
    if arguments.bin:
        save_ip_adapter_bin(folder / "ip_adapter.safetensors", folder / "ip_adapter.bin")
    save_aggregator(learnt.aggregator, learnt.params["aggregator"], encoder.dim, folder)
    if arguments.photos:
        seen = encoder.encode(map(photo_decoding.load_photo, arguments.photos))
        params, weights = learnt.params["aggregator"], jnp.ones((1, len(seen)))
        image = learnt.aggregator.apply(params, jnp.asarray(seen)[None], weights)
        both = np.stack([adapter.unconditional(image, learnt.blank), image])
        if learnt.blank is not None:  # Plus has tokens for each photo: drop the axis of sets
            both = both[:, 0]
        tensors.save_tensors({"image_embeds": both}, folder / "image_embeds.safetensors")
    kind, named = learnt.aggregator.kind, bool(arguments.photos)
    card = cards.ip_adapter(run.config, trained, kind, named, missing_extractor(run))
    (folder / "README.md").write_text(card)
    if not arguments.verify:
        return None
    return diffusers_check.adapter_difference(run, folder, folders.find(run.config.pipeline))


def missing_extractor(run: finished_run.Run) -> dict[str, Any] | None:
    """Settings of transformers' CLIPImageProcessor for a run's CLIP encoder.

    None if the base's folder contains them, or the pipeline has no image encoder.
    """
    base, encoder = folders.find(run.config.pipeline), run.pipeline.image_encoder
    if encoder is None or (base / "feature_extractor/preprocessor_config.json").exists():
        return None
    side = encoder.module.config.image_size
    named = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    known = run.pipeline.feature_extractor or named
    return {key: known[key] for key in folders.clip_preprocessing(side) if key in known}


def write_pipeline(workdir: Path, folder: Path, arguments: argparse.Namespace) -> float | None:
    """Writes a pipeline folder; returns the difference from diffusers if it is verified."""
    config = read_config(workdir)
    if "method" not in config:
        if arguments.person:
            raise UserError(f"--person {arguments.person}: {workdir} is a base, without people")
        source = workdir / "pipeline"
        if not (source / "unet").is_dir():
            raise UserError(f"{source}: no finished base there")
        checksums.verify(source, None, "run the training again")
        unwritten = shutil.ignore_patterns(checksums.NAME)  # main writes the export's own checksums
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=unwritten)
        if arguments.dtype != "float32":
            cast_towers(folder, DTYPES[arguments.dtype])
        (folder / "README.md").write_text(cards.base(config))
        return diffusers_check.base_difference(folder) if arguments.verify else None
    run, about, towers = open_finetuned(workdir, arguments)
    dtype = DTYPES[arguments.dtype]
    changed = {
        name: dataclasses.replace(
            tower,
            params=jax.tree.map(lambda x: np.asarray(x, dtype), towers.get(name, tower.params)),
        )
        for name in TOWERS
        if (tower := getattr(run.pipeline, name)) is not None
    }
    save_pipeline(dataclasses.replace(run.pipeline, **changed), folder)
    (folder / "README.md").write_text(cards.person(run.config, about, arguments.person))
    return diffusers_check.base_difference(folder) if arguments.verify else None


def cast_towers(folder: Path, dtype: DTypeLike) -> None:
    """Rewrites the towers of a pipeline folder in another dtype."""
    parts = load_pipeline(str(folder))
    for name in TOWERS:
        tower = parts.tower(name)
        params = jax.tree.map(lambda x: np.asarray(x, dtype), tower.params)
        folders.save_tower(folder / name, name, tower.config, params)


def write_lora(workdir: Path, folder: Path, arguments: argparse.Namespace) -> float | None:
    """Writes a person's LoRA; returns the difference from diffusers if it is verified."""
    run, about, towers = open_finetuned(workdir, arguments)
    if run.config.method != "lora":
        raise UserError(f"--format lora: {workdir} is a run of {run.config.method}")
    update = finetuning_loop.load_person_lora(workdir, arguments.person, run.pipeline, run.config)
    for save, name in ((save_lora, FILE), (save_kohya, KOHYA_FILE)):
        save(update, folder / name, run.config.lora.alpha, DTYPES[arguments.dtype])
    (folder / "README.md").write_text(cards.lora(run.config, about, arguments.person))
    if not arguments.verify:
        return None
    return diffusers_check.lora_difference(run, towers, folder, folders.find(run.config.pipeline))


def open_finetuned(
    workdir: Path, arguments: argparse.Namespace
) -> tuple[finished_run.Run, dict, dict]:
    """Opens a run of per-person fine-tuning for ``--person``.

    Returns:
      The run, the content of ``person.json``, and the person's towers.

    Raises:
      UserError: the run is of another kind, no person is named, or the base is another one.
    """
    config = read_config(workdir)
    if config.get("method") not in finetuning.METHODS:
        raise UserError(
            f"--format {arguments.format}: {workdir} is a run of {config.get('method')}; adapters "
            "are exported with --format ip-adapter"
        )
    if not arguments.person:
        raise UserError(f"--format {arguments.format}: name the person, --person NAME")
    run = finished_run.open_run(workdir)
    towers = finetuning_loop.load_person(workdir, arguments.person, run.pipeline, run.config)
    about = folders.read_json(
        finetuning_loop.person_folder(workdir, arguments.person) / "person.json"
    )
    return run, about, towers


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--workdir",
        type=settings.path,
        required=True,
        help="a run of persona_jax.train or pretrain",
    )
    flags.add_argument(
        "--out", type=settings.path, required=True, help="folder to write, new or empty"
    )
    flags.add_argument("--format", required=True, choices=("ip-adapter", "diffusers", "lora"))
    flags.add_argument("--person", help="name of the person, for a run of dreambooth or lora")
    flags.add_argument("--photos", nargs="+", default=[], help="photos to write image_embeds of")
    flags.add_argument(
        "--weights", choices=("ema", "params"), help="running average or last step; ema if there"
    )
    flags.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of the weights; aggregator and image_embeds are always float32",
    )
    flags.add_argument(
        "--bin", action="store_true", help="ip_adapter.bin too, for older software (needs torch)"
    )
    flags.add_argument(
        "--verify", action="store_true", help="compare with diffusers (needs the extra 'torch')"
    )
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
