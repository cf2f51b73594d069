"""Packs a finished base, its reader and a plain adapter, in half precision, to be shipped.

python -m persona_jax.base.ship --base bases/tiny --adapter runs/ip --out tiny
"""

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from persona_jax.errors import UserError
from persona_jax.evaluation import trait_classifier as reading
from persona_jax.interop.checkpoints import load_params
from persona_jax.interop.folders import Tower
from persona_jax.interop.ip_adapter import save_ip_adapter
from persona_jax.models.towers import TOWERS
from persona_jax.pipelines import pipeline
from persona_jax.runtime import settings
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.run_folder import read_config

MOST_BYTES = 20_000_000


def main(arguments: argparse.Namespace) -> None:
    """float32 in, float16 out."""
    base, run, out = Path(arguments.base), Path(arguments.adapter), Path(arguments.out)
    config = read_config(run)
    parts = pipeline.load(str(base / "pipeline"))
    if Path(config.pipeline).resolve() != (base / "pipeline").resolve():
        raise UserError(f"--adapter {run}: it was trained on {config.pipeline}, not on {base}")
    halves = {name: half(getattr(parts, name)) for name in TOWERS}
    pipeline.save(dataclasses.replace(parts, **halves), out / "pipeline")
    shutil.copy(base / "pipeline/text_projection.safetensors", out / "pipeline")
    reader = reading.load_trait_classifier(base / "reader")
    reading.save_trait_classifier(
        dataclasses.replace(reader, params=to_float16(reader.params)), out / "reader"
    )
    learnt = load_params(run / "checkpoints", "ema" if config.optimizer.ema_decay else "params")
    file = out / "ip_adapter.safetensors"
    save_ip_adapter(learnt, parts.unet.module.config, file, np.float16)
    for name in ("report.json", "prompts.png"):
        shutil.copy(base / name, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")
    if size > MOST_BYTES:
        raise UserError(f"{out}: {size} bytes; at most {MOST_BYTES} may be shipped")


def half(tower: Tower) -> Tower:
    """A tower with float16 parameters."""
    return dataclasses.replace(tower, params=to_float16(tower.params))


def to_float16(tree: Any) -> Any:
    """Every array in half precision."""
    return jax.tree.map(lambda x: np.asarray(x, np.float16), tree)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--base", type=settings.path, required=True, help="a finished run of persona_jax.pretrain"
    )
    flags.add_argument(
        "--adapter", type=settings.path, required=True, help="a run of configs/ip.py on that base"
    )
    flags.add_argument("--out", type=settings.path, required=True, help="folder to write")
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
