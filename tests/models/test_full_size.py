"""Stable Diffusion 1.5's towers and ViT-H at full size: parity, and the memory of loading.

Slow, and up to about 12 GB of memory; best one at a time:
``pytest --slow -s tests/models/test_full_size.py -k vae``.
"""

import gc
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch_models

pytestmark = pytest.mark.slow

UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}


@pytest.fixture(autouse=True)
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)
    gc.collect()


@pytest.fixture
def folder(tmp_path):
    """A folder deleted after the tests: pytest would keep gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def show(**differences: float) -> None:
    for tower, difference in differences.items():
        print(f"\n{tower}: relative difference {difference:.1e}")
        assert difference < 1e-4


def test_unet_at_64(folder):
    show(unet=torch_models.unet_difference(UNET, folder, size=64))


def test_vae_at_512(folder):
    encode, decode = torch_models.vae_differences(VAE, folder, size=512)
    show(vae_encode=encode, vae_decode=decode)


def test_text_encoder(folder):
    hidden, pooled = torch_models.text_differences(TEXT, folder)
    show(text_hidden=hidden, text_pooled=pooled)


def test_image_encoder_vit_h(folder):
    embedding, penultimate = torch_models.vision_differences(VISION, folder)
    show(vision_embedding=embedding, vision_penultimate=penultimate)


SAVE = """
import torch_models, test_full_size as t
torch_models.make_unet(t.UNET).save_pretrained({folder!r}, {kw})
"""

LOAD = """
import re
from pathlib import Path

import jax, jax.numpy as jnp
from persona_jax.interop.folders import load_tower

def peak() -> int:
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

jnp.zeros(1).block_until_ready()
before = peak()
params = load_tower(Path({folder!r}), "unet", param_dtype={dtype!r}).params
jax.block_until_ready(params)
print((peak() - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def in_another_process(script: str) -> str:
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    # The parameters go to one device, although the other tests force eight.
    environment = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("shards", ["", "max_shard_size='1GB'"], ids=["one file", "shards"])
def test_memory_of_loading_the_unet(shards, folder):
    """The increase of peak resident memory, relative to the weights' bytes."""
    in_another_process(SAVE.format(folder=str(folder), kw=shards))
    for dtype in (None, "bfloat16"):
        times = float(in_another_process(LOAD.format(folder=str(folder), dtype=dtype)))
        print(f"\nloading the UNet ({shards or 'one file'}, {dtype or 'float32'}): {times:.2f}×")
        assert times < 1.3
