"""Trains a small base in Stable Diffusion's layout from captioned photos.

python -m persona_jax.pretrain --config configs/base.py:lfw --workdir bases/lfw

Three stages, each resumable by running the same command again: VAE, CLIP pair, UNet; for drawn
portraits a fourth, the reader that measures what is painted. The people kept for validation and
test are in none of them. Writes WORKDIR/pipeline, a pipeline folder, and WORKDIR/report.json.
"""

import functools
import json
import shlex
from pathlib import Path

from ml_collections import ConfigDict

from persona_jax.base.caption_sampling import captions_of
from persona_jax.base.clip import score_clip, train_clip
from persona_jax.base.prompts import score_prompts
from persona_jax.base.stage import read_pictures
from persona_jax.base.trait_classifier_training import (
    score_trait_classifier,
    train_trait_classifier,
)
from persona_jax.base.unet import train_unet, write_scaffold
from persona_jax.base.vae import score_vae, train_vae
from persona_jax.data.dataset import open_dataset, rows_of
from persona_jax.data.tokenizer import learn_tokenizer
from persona_jax.runtime import checksums, settings
from persona_jax.runtime.command_line import run_with_config
from persona_jax.runtime.mesh import first_process, initialize_distributed, make_mesh
from persona_jax.runtime.run_folder import config_difference, read_config, write_run_files
from persona_jax.training.loop import locked


def main(config: ConfigDict, workdir: Path) -> None:
    """One run at a time in a workdir."""
    settings.require(config, {"vae.optimizer.steps": int, "unet.prediction": str}, "--config")
    initialize_distributed()
    with locked(workdir):
        make_base(config, workdir)


def make_base(config: ConfigDict, workdir: Path) -> None:
    """VAE, CLIP pair, UNet, report."""
    if (workdir / "report.json").exists() and not config_difference(read_config(workdir), config):
        print(f"{workdir} holds this base already, finished: {workdir / 'pipeline'}")
        return
    finished = (workdir / "report.json", workdir / "pipeline" / checksums.NAME)
    for path in finished:
        first_process(functools.partial(path.unlink, missing_ok=True))
    mesh = make_mesh(**config.mesh)
    write_run_files(workdir, config)
    photos, people = open_dataset(config.data)
    rows = rows_of(photos, people.base)
    held_out = rows_of(photos, [*people.validation, *people.test])
    print(f"{len(rows)} photos of {len(people.base)} people; {len(held_out)} photos held out")
    pictures = read_pictures(photos, rows, config)
    folder = workdir / "pipeline"
    captions = [caption for kind in captions_of(photos, rows).values() for caption in kind]
    length = config.clip.text.max_position_embeddings
    vocabulary = folder / "tokenizer"
    first_process(lambda: learn_tokenizer(captions, config.vocab_size, length, vocabulary))
    first_process(lambda: write_scaffold(folder, config.unet.prediction))

    train_vae(config, workdir, mesh, pictures)
    report = {"vae": score_vae(folder, read_pictures(photos, held_out[:256], config))}
    print(json.dumps(report), flush=True)
    train_clip(config, workdir, mesh, photos, rows, pictures)
    report |= {"clip": score_clip(folder, photos, held_out, config)}
    print(json.dumps(report), flush=True)
    train_unet(config, workdir, mesh, photos, rows)
    if "reader" in config:
        train_trait_classifier(config, workdir, mesh)
        report |= {"reader": score_trait_classifier(workdir / "reader")}
        report |= {"prompts": score_prompts(workdir, config)}
    text = json.dumps(report, indent=2) + "\n"
    first_process(lambda: checksums.write(folder))
    first_process(lambda: (workdir / "report.json").write_text(text))
    print(
        f"base written to {folder}; pictures in {workdir / 'unet'}. Next:\n"
        f"  python -m persona_jax.train --config configs/sa.py:{config.preset} --workdir runs/sa "
        f"--config.pipeline={shlex.quote(str(folder))} --config.init_from="
    )


if __name__ == "__main__":
    run_with_config(main)
