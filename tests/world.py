"""Fixtures small enough for tests: drawn people, configs of a base and adapters of a few steps."""

import io
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from persona_jax.interop.checkpoints import Checkpoints
from persona_jax.methods import adapter_training
from persona_jax.pipelines.image_encoders import open_image_encoder
from persona_jax.pipelines.pipeline import open_pipeline
from persona_jax.runtime.run_folder import write_run_files

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def portrait(person: int, number: int, size: int = 48) -> Image.Image:
    """Draws a face: the person sets skin and hair, the photo position and background."""
    who, when = np.random.default_rng(person), np.random.default_rng((person, number))
    skin, hair = (tuple(int(c) for c in who.integers(40, 230, 3)) for _ in range(2))
    image = Image.new("RGB", (size, size), tuple(int(c) for c in when.integers(0, 255, 3)))
    draw, x = ImageDraw.Draw(image), int(when.integers(-4, 5)) + size // 2
    draw.ellipse((x - 15, 6, x + 15, 34), fill=hair)
    draw.ellipse((x - 12, 12, x + 12, 42), fill=skin)
    for eye in (x - 5, x + 5):
        draw.ellipse((eye - 2, 22, eye + 2, 26), fill=(20, 20, 20))
    return image


def write_people(folder: Path, people: int = 6, photos: int = 4) -> Path:
    """Writes `folder`/person_i/j.png for every person and photo."""
    for person in range(people):
        (folder / f"person_{person}").mkdir(parents=True, exist_ok=True)
        for number in range(photos):
            data = io.BytesIO()
            portrait(person, number).save(data, "PNG")
            (folder / f"person_{person}" / f"{number}.png").write_bytes(data.getvalue())
    return folder


def config_of(name: str, *preset: str) -> ConfigDict:
    """Returns the config of configs/NAME.py, by default or for a preset."""
    sys.path.insert(0, str(ROOT / "configs"))
    try:
        return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](*preset)
    finally:
        sys.path.remove(str(ROOT / "configs"))


def use_people(config: ConfigDict, people: Path, data_dir: Path) -> None:
    config.data.update(
        {
            "dataset": "folder",
            "folder": str(people),
            "data_dir": str(data_dir),
            "test_people": 1,
            "validation_people": 1,
            "least_photos": 4,
            "crop": 1.0,
        }
    )


def base_config(people: Path, data_dir: Path) -> ConfigDict:
    """Returns a base's config: two steps of every stage, at 16 px, on a folder of people."""
    config = config_of("base", "lfw")
    use_people(config, people, data_dir)
    return shrink_base(config)


def shrink_base(config: ConfigDict) -> ConfigDict:
    config.update({"image_size": 16, "vocab_size": 560, "log_every": 1})
    for stage in ("vae", "clip", "unet"):
        config[stage].batch_size = 8
        config[stage].optimizer.steps = 2
        config[stage].optimizer.muon = 0.0  # slow to compile
    config.vae.tower.update({"block_out_channels": (8, 8), "sample_size": 16})
    config.vae.tower.latent_channels = 4
    config.vae.tower.update(
        {f"{way}_block_types": config.vae.tower[f"{way}_block_types"][:2] for way in ("down", "up")}
    )
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config.clip.text.update({**small, "num_attention_heads": 2, "projection_dim": 16})
    config.clip.vision.update({**small, "num_attention_heads": 2, "projection_dim": 16})
    config.clip.vision.update({"image_size": 16})
    config.unet.update({"grid_steps": 2})
    config.unet.tower.update(
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
            "norm_num_groups": 4,
        }
    )
    return config


def adapter_config(name: str, people: Path, data_dir: Path, pipeline: Path) -> ConfigDict:
    """Returns configs/NAME.py with three steps on the small base and a folder of people."""
    config = config_of(name, "lfw")
    use_people(config, people, data_dir)
    return shrink_adapter(config, pipeline)


def shrink_adapter(config: ConfigDict, pipeline: Path) -> ConfigDict:
    config.update({"pipeline": str(pipeline), "init_from": ""})
    config.update({"batch_size": 8, "log_every": 1, "save_every": 2})
    config.references.n = 4
    config.optimizer.steps = 3
    config.aggregator.update({"width": 16, "heads": 2, "pooling_heads": 2, "depth": 1})
    config.sampling.steps = 2
    config.grid.update({"people": 1, "samples": 2})
    return config


def shaken(tree, seed: int):
    """Adds noise to all parameters: initial zeros and ones would hide errors."""
    leaves, structure = jax.tree.flatten(tree)
    generators = map(np.random.default_rng, range(seed, seed + len(leaves)))
    random = [
        np.asarray(x + 0.2 * generator.standard_normal(x.shape, np.float32))
        for x, generator in zip(leaves, generators, strict=True)
    ]
    return jax.tree.unflatten(structure, random)


def write_adapter(config, workdir) -> None:
    """Writes a run's folder as if training had ended in random parameters."""
    parts = open_pipeline(config)
    encoder = open_image_encoder(config, parts)
    params = adapter_training.init_adapter(config, parts, encoder.dim)
    state = SimpleNamespace(params=shaken(params, 0), ema=shaken(params, 100), opt_state={})
    write_run_files(workdir, config)
    trained = {"unet": parts.unet.hash, "image_encoder": encoder.hash}
    with Checkpoints(workdir / "checkpoints", fingerprint=trained) as checkpoints:
        checkpoints.save(1, state)
