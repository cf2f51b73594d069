"""Encodes an adapter's training photos before training, on one or several machines.

python -m persona_jax.encode --config configs/sa.py:sd15 --part 3/16

Training encodes the photos itself if this was not done; a separate job leaves training's
accelerators free. Give each machine its own part, counted from 1, and the same data_dir if they
share a disk. An interrupted part continues when it is run again.
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
    """Encodes one part of the photos."""
    config = arguments.config
    settings.require(config, {"method": str}, "--config")
    if config.method != "adapter":
        raise UserError(f"config.method={config.method}: photos are encoded for adapters only")
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
    """Parses ``k/n`` to (k, n).

    Raises:
      UserError: the text is not of this form, or not 1 ≤ k ≤ n.
    """
    k, _, n = part.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise UserError(f"--part {part}: expected K/N with 1 ≤ K ≤ N, for example 3/16")
    return int(k), int(n)


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    flags = config_parser(__doc__)
    flags.add_argument("--part", default="1/1", metavar="K/N", help="part K of N parts")
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
