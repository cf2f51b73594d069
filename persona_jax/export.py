"""Hands a run to PyTorch: files that stock diffusers reads.

python -m persona_jax.export --workdir runs/sa --out exported --format ip-adapter --verify
python -m persona_jax.export --workdir runs/dreambooth --person ann --out ann --format diffusers
python -m persona_jax.export --workdir runs/lora --person ann --out ann --format lora

ip-adapter: ip_adapter.safetensors in the published plain layout, and what reads a set of photos, as
one page of PyTorch (aggregator.py, .json, .safetensors); a resampler in the published Plus layout,
which needs no more; with --photos also what is made of them, image_embeds.safetensors. diffusers: a
whole pipeline folder, of a person learnt by heart or of a base. lora: the person's LoRA in PEFT's
layout. Each with a README.md that says how to use it, and on which base. --verify paints with both
and compares.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax.data import images
from persona_jax.errors import UserError
from persona_jax.interop import cards, folders, tensors
from persona_jax.interop.aggregator_files import save_aggregator
from persona_jax.interop.checkpoints import read_fingerprint
from persona_jax.interop.ip_adapter import save_ip_adapter, save_ip_adapter_bin
from persona_jax.methods import finetuning, finetuning_loop
from persona_jax.models import adapter
from persona_jax.pipelines.pipeline import save as save_pipeline
from persona_jax.runs import diffusers_reference, finished_run
from persona_jax.runtime import buckets, checksums, files, settings
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.run_folder import read_config

DTYPES = {"float32": np.float32, "float16": np.float16}


def main(arguments: argparse.Namespace) -> None:
    """Run → files, which get their place when all are there (and, if asked, verified)."""
    workdir, out = buckets.local(arguments.workdir), buckets.local(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: there is something already; name another folder")
    write = {"ip-adapter": write_adapter, "diffusers": write_pipeline, "lora": write_lora}
    try:
        with files.whole_folder(out) as folder:
            difference = write[arguments.format](workdir, folder, arguments)
            checksums.write(folder)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    print(f"written to {out}; {out / 'README.md'} says how to use it")
    if difference is not None:
        print(f"stock diffusers paints the same: latents differ by {difference:.1e}, relatively")


def write_adapter(workdir: Path, folder: Path, arguments: argparse.Namespace) -> float | None:
    """An adapter's files."""
    method = read_config(workdir).get("method")
    if method != "adapter":
        raise UserError(f"--format ip-adapter: {workdir} is a run of {method or 'a base'}")
    run = finished_run.open_run(workdir, weights=arguments.weights)
    trained = read_fingerprint(workdir / "checkpoints")
    same_base(workdir, trained.get("unet"), run.pipeline.unet.hash)
    same_base(workdir, trained.get("eye"), run.encoder.hash, "image encoder")
    config, dtype = run.pipeline.unet.module.config, DTYPES[arguments.dtype]
    learnt = run.adapter
    save_ip_adapter(learnt.params, config, folder / "ip_adapter.safetensors", dtype)
    if arguments.bin:
        save_ip_adapter_bin(folder / "ip_adapter.safetensors", folder / "ip_adapter.bin")
    save_aggregator(learnt.aggregator, learnt.params["aggregator"], run.encoder.dim, folder)
    if arguments.photos:
        seen = run.encoder.encode([images.load_photo(path) for path in arguments.photos])
        params, weights = learnt.params["aggregator"], jnp.ones((1, len(seen)))
        image = learnt.aggregator.apply(params, jnp.asarray(seen)[None], weights)
        both = np.stack([adapter.unconditional(image, learnt.blank), image])
        if learnt.blank is not None:  # photo by photo
            both = both[:, 0]
        tensors.save_tensors({"image_embeds": both}, folder / "image_embeds.safetensors")
    text = cards.ip_adapter(run.config, trained, learnt.aggregator.kind, bool(arguments.photos))
    (folder / "README.md").write_text(text)
    if not arguments.verify:
        return None
    return diffusers_reference.adapter_difference(run, folder, folders.find(run.config.pipeline))


def write_pipeline(workdir: Path, folder: Path, arguments: argparse.Namespace) -> float | None:
    """A pipeline folder."""
    config = read_config(workdir)
    if "method" not in config:
        source = workdir / "pipeline"
        if not (source / "unet").is_dir():
            raise UserError(f"{source}: no finished base there")
        shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / "README.md").write_text(cards.base(config))
        return diffusers_reference.base_difference(folder) if arguments.verify else None
    run, about, towers = open_finetuned(workdir, arguments)
    changed = {
        name: dataclasses.replace(
            getattr(run.pipeline, name),
            params=jax.tree.map(lambda x: np.asarray(x, DTYPES[arguments.dtype]), towers[name]),
        )
        for name in finetuning.TOWERS
    }
    save_pipeline(dataclasses.replace(run.pipeline, **changed), folder)
    (folder / "README.md").write_text(cards.person(run.config, about, arguments.person))
    return diffusers_reference.base_difference(folder) if arguments.verify else None


def write_lora(workdir: Path, folder: Path, arguments: argparse.Namespace) -> float | None:
    """A person's LoRA."""
    run, about, towers = open_finetuned(workdir, arguments)
    if run.config.method != "lora":
        raise UserError(f"--format lora: {workdir} is a run of {run.config.method}")
    name = "pytorch_lora_weights.safetensors"
    shutil.copy(finetuning_loop.person_folder(workdir, arguments.person) / name, folder / name)
    (folder / "README.md").write_text(cards.lora(run.config, about, arguments.person))
    if not arguments.verify:
        return None
    return diffusers_reference.lora_difference(
        run, towers, folder, folders.find(run.config.pipeline)
    )


def open_finetuned(
    workdir: Path, arguments: argparse.Namespace
) -> tuple[finished_run.Run, dict, dict]:
    """The run, what ``person.json`` says of the person, and their towers.

    Raises:
      UserError: not such a run, nobody named, or another base.
    """
    config = read_config(workdir)
    if config.get("method") not in finetuning.METHODS:
        raise UserError(
            f"--format {arguments.format}: {workdir} is a run of {config.get('method')}; adapters "
            "are exported with --format ip-adapter"
        )
    if not arguments.person:
        raise UserError(f"--format {arguments.format}: say who, --person NAME")
    run = finished_run.open_run(workdir)
    towers = finetuning_loop.load_person(workdir, arguments.person, run.pipeline, run.config)
    about = folders.read_json(
        finetuning_loop.person_folder(workdir, arguments.person) / "person.json"
    )
    same_base(workdir, about.get("unet"), run.pipeline.unet.hash)
    return run, about, towers


def same_base(workdir: Path, trained: str | None, now: str, what: str = "base") -> None:
    """Refuses an export on another base than what was trained on.

    Raises:
      UserError: names both hashes.
    """
    if trained != now:
        raise UserError(
            f"{workdir}: it was trained on a {what} of hash {trained or 'unknown'}, and where that "
            f"lay there is now one of {now}; bring the first one back"
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
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
    flags.add_argument("--person", help="who, of a run that learnt people by heart")
    flags.add_argument("--photos", nargs="+", default=[], help="read them, for image_embeds")
    flags.add_argument(
        "--weights", choices=("ema", "params"), help="running average or last step; ema if there"
    )
    flags.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    flags.add_argument(
        "--bin", action="store_true", help="ip_adapter.bin too, for old readers (takes torch)"
    )
    flags.add_argument(
        "--verify", action="store_true", help="paint with stock diffusers too (extra 'torch')"
    )
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
