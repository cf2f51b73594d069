"""Encodes the photos that an adapter learns from, ahead of training: a job for many machines.

python -m persona_jax.encode --config configs/sa.py:sd15 --part 3/16

Training does this by itself, its processes sharing the work; a job of its own needs no accelerator
that training would rather have. Give every machine another part, and the same data_dir if they
share a disk; parts are numbered from 1. Run a part again after an interruption: it goes on where it
was.
"""

import argparse

import jax
import numpy as np
from ml_collections import ConfigDict

from persona_jax.data import images
from persona_jax.data.dataset import open_dataset, rows_of
from persona_jax.data.encodings import EncodingJob
from persona_jax.data.photos import Photos
from persona_jax.errors import UserError
from persona_jax.models.vae import AutoencoderKL
from persona_jax.pipelines.image_encoders import ImageEncoder, open_image_encoder
from persona_jax.pipelines.pipeline import Pipeline, open_pipeline
from persona_jax.runtime import buckets
from persona_jax.runtime.command_line import config_parser, run_with_arguments
from persona_jax.runtime.mesh import local_sharding


def main(arguments: argparse.Namespace) -> None:
    """Data, frozen towers, one part of the encodings."""
    config = arguments.config
    if config.method != "adapter":
        raise UserError(f"config.method={config.method}: only adapters' photos are encoded ahead")
    part, parts = numbers(arguments.part)
    photos, people = open_dataset(config.data)
    pipeline = open_pipeline(config)
    job = adapter_job(
        photos,
        rows_of(photos, people.train),
        pipeline,
        open_image_encoder(config, pipeline),
        config,
    )
    job.work(part - 1, parts)
    missing = job.missing()
    print(
        f"{job.place}: part {part} of {parts} is done, {len(job.shards) - len(missing)} of "
        f"{len(job.shards)} shards are here"
    )


def numbers(part: str) -> tuple[int, int]:
    """(k, n) of ``k/n``.

    Raises:
      UserError: anything else, or not 1 ≤ k ≤ n.
    """
    k, _, n = part.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise UserError(f"--part {part}: expected a number of all parts, 3/16 say, from 1 on")
    return int(k), int(n)


def adapter_job(
    photos: Photos, rows: np.ndarray, pipeline: Pipeline, encoder: ImageEncoder, config: ConfigDict
) -> EncodingJob:
    """Latent moments, image embeddings and caption tokens of the chosen photos."""
    vae, size, crop = pipeline.vae, pipeline.image_size, config.data.crop

    @jax.jit
    def towers(vae_params, encoder_params, pixels, seen):
        moments = vae.module.apply({"params": vae_params}, pixels, method=AutoencoderKL.encode)
        return {"moments": moments, "embeddings": encoder.embed(encoder_params, seen)}

    def encode_images(pictures):
        pixels = [images.to_model(images.centre_crop(p, crop), size) for p in pictures]
        seen = [encoder.preprocess(p) for p in pictures]
        shared = jax.device_put((np.stack(pixels), np.stack(seen)), local_sharding(len(pictures)))
        return towers(vae.params, encoder.params, *shared)

    return EncodingJob(
        photos,
        rows,
        encode_images=encode_images,
        encode_captions=lambda captions: {"tokens": pipeline.tokenize(captions)[0]},
        cache_dir=buckets.local(config.data.data_dir) / "encoded",
        key=f"train {vae.hash} {encoder.hash} {pipeline.text_encoder.hash} {size} {crop}",
        mirrored=config.flip,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = config_parser(__doc__)
    flags.add_argument("--part", default="1/1", metavar="K/N", help="which of how many parts")
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
