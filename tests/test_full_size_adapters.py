"""Adapter files at Stable Diffusion 1.5's full size, random weights: stock gives the same latents.

Slow, and up to about 18 GB of memory: ``pytest --slow -s tests/test_full_size_adapters.py``.
"""

import gc
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from models.test_full_size import TEXT, UNET

from persona_jax.interop.ip_adapter import load_ip_adapter, save_ip_adapter
from persona_jax.models import adapter
from persona_jax.models.aggregators import Aggregator, EveryPhoto
from persona_jax.models.unet import text_kernels
from persona_jax.pipelines import generation, pipeline
from persona_jax.runs import diffusers_check

pytestmark = pytest.mark.slow
DIM = 1024


@pytest.fixture
def folder(tmp_path):
    """A folder deleted after the tests: pytest would keep gigabytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield tmp_path
    torch.set_num_threads(before)
    shutil.rmtree(tmp_path)


def write_base(folder) -> None:
    """Writes a base at full size; only the VAE, which latents do not need, is small."""
    torch_models.write_pipeline(folder)
    for name, make, settings in (
        ("unet", torch_models.make_unet, UNET),
        ("text_encoder", torch_models.make_text_encoder, TEXT),
    ):
        shutil.rmtree(folder / name)
        make(settings).save_pretrained(folder / name)
        gc.collect()
    shutil.rmtree(folder / "vae")
    vae = {**torch_models.TINY_VAE, "block_out_channels": (8,) * 4}
    for way in ("down", "up"):
        vae[f"{way}_block_types"] = torch_models.TINY_VAE[f"{way}_block_types"][:1] * 4
    torch_models.make_vae(vae).save_pretrained(folder / "vae")


def test_plain_and_plus_files_generate_the_same(folder, capsys):
    """Nine photos pooled, and five through a resampler; each adapter alone and both at once."""
    write_base(folder)
    towers = [tower for tower in pipeline.TOWERS if tower != "image_encoder"]
    loaded = pipeline.load(str(folder), only=towers)
    config, kinds = loaded.unet.module.config, (Aggregator("avg"), EveryPhoto("resampler"))
    assert sum(x.size for x in jax.tree.leaves(loaded.unet.params)) == 859_520_964
    kernels = text_kernels(loaded.unet.params, config)
    adapters = []
    for i, aggregator in enumerate(kinds):
        params = adapter.init(jax.random.key(i), aggregator, DIM, 768, kernels)
        keys = iter(jax.random.split(jax.random.key(9 + i), len(jax.tree.leaves(params))))
        moved = {
            part: jax.tree.map(
                lambda x, k=keys: x + 0.02 * jax.random.normal(next(k), x.shape), params[part]
            )
            for part in ("image_proj", "ip_adapter")
        }
        file = folder / f"{i}.safetensors"
        save_ip_adapter(moved, config, file)
        again = load_ip_adapter(file, config, kernels, DIM)
        adapters.append(adapter.Adapter(aggregator, again | {"aggregator": {}}))
    photos = [torch_models.normal(1, n, DIM, seed=n) for n in (9, 5)]
    reference_sets = [generation.References(jnp.asarray(x), jnp.ones(x.shape[:2])) for x in photos]
    ours = diffusers_check.our_sampler(loaded)
    off = [x.replace(scale=0.0) for x in reference_sets]
    results = [
        ours(adapters, [reference_sets[0], off[1]]),
        ours(adapters, [off[0], reference_sets[1]]),
        ours(adapters, reference_sets),
    ]
    jax.clear_caches()
    gc.collect()

    pipe = diffusers_check.open_diffusers(folder)
    names = ["0.safetensors", "1.safetensors"]
    pipe.load_ip_adapter(
        [str(folder)] * 2, subfolder=["", ""], weight_name=names, image_encoder_folder=None
    )
    pooled = photos[0].mean(axis=1)
    embeds = [
        torch.from_numpy(np.stack([np.zeros_like(x), x])).contiguous() for x in (pooled, photos[1])
    ]
    differences = []
    for latents, scale in zip(results, ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]), strict=True):
        pipe.set_ip_adapter_scale(scale)
        expected = diffusers_check.diffusers_latents(pipe, loaded, ip_adapter_image_embeds=embeds)
        differences.append(diffusers_check.apart(latents, expected))
    with capsys.disabled():
        print(f"\nplain {differences[0]:.1e}, Plus {differences[1]:.1e}, both {differences[2]:.1e}")
    assert max(differences) < 1e-3
    assert diffusers_check.apart(results[0], results[1]) > 1e-2
