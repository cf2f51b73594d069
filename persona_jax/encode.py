"""Encodes the photos that an adapter learns from, ahead of training: a job for many machines.

python -m persona_jax.encode --config configs/sa.py:sd15 --part 3/16

Training does this by itself, its processes sharing the work; a job of its own needs no accelerator
that training would rather have. Give every machine another part, and the same data_dir if they
share a disk; parts are numbered from 1. Run a part again after an interruption: it goes on where it
was.
"""

import argparse

from persona_jax.data.dataset import open_dataset, rows_of
from persona_jax.errors import UserError
from persona_jax.methods.adapter_features import adapter_job
from persona_jax.pipelines.image_encoders import open_image_encoder
from persona_jax.pipelines.pipeline import open_pipeline
from persona_jax.runtime import settings
from persona_jax.runtime.command_line import config_parser, run_with_arguments


def main(arguments: argparse.Namespace) -> None:
    """Data, frozen towers, one part of the encodings."""
    config = arguments.config
    settings.require(config, {"method": str}, "--config")
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


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = config_parser(__doc__)
    flags.add_argument("--part", default="1/1", metavar="K/N", help="which of how many parts")
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
