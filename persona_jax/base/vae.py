"""First stage: an autoencoder, its latents scaled to unit variance."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from persona_jax.base.stage import fit_stage, in_parts, picture_batches, save_tower, to_float
from persona_jax.data import images
from persona_jax.diffusion.loss import example_keys
from persona_jax.interop import folders
from persona_jax.models import towers
from persona_jax.models.vae import AutoencoderKL, draw_latents, kl_divergence


def train_vae(config: ConfigDict, workdir: Path, mesh: Mesh, pictures: np.ndarray) -> None:
    """Reconstruction (squared and absolute error) and a little KL; then the latents' scale."""
    settings = config.vae.tower.to_dict()
    module = towers.build("vae", settings)
    kl_weight, seed = config.vae.kl_weight, config.seed

    def loss(params, frozen, batch, step):
        image = batch["image"]
        moments = module.apply({"params": params}, image, method=AutoencoderKL.encode)
        keys = example_keys(seed, step, batch["index"])
        scale = module.config.scaling_factor
        latents = jax.vmap(lambda key, m: draw_latents(key, m, scale))(keys, moments)
        error = module.apply({"params": params}, latents, method=AutoencoderKL.decode) - image
        squared = jnp.mean(error**2)
        kl = jnp.mean(kl_divergence(moments)) / latents[0].size
        total = squared + 0.2 * jnp.mean(jnp.abs(error)) + kl_weight * kl
        return total, {"psnr": 10 * jnp.log10(4.0 / squared), "kl": kl}

    def batches_from(start):
        return picture_batches(pictures, config.vae.batch_size, config.flip, seed, start)

    learnt = fit_stage(
        config,
        config.vae,
        workdir / "vae",
        mesh,
        towers.initialise(module, jax.random.key(seed)),
        loss,
        {},
        batches_from,
    )
    encode = jax.jit(lambda p, x: module.apply({"params": p}, x, method=AutoencoderKL.encode))
    sample = to_float(pictures[:: max(1, len(pictures) // 512)][:512])
    moments = in_parts(lambda part: encode(learnt, part), sample)
    mean, log_variance = np.split(moments, 2, axis=-1)
    std = float(np.sqrt(mean.var() + np.exp(log_variance).mean()))
    settings["scaling_factor"] = round(1 / std, 5)
    save_tower(workdir / "pipeline", "vae", settings, learnt)


def score_vae(folder: Path, pictures: np.ndarray) -> dict:
    """PSNR of reconstructions of unseen people, in dB over values in [−1, 1]."""
    vae = folders.load_tower(folder / "vae", "vae")
    reconstruct = jax.jit(lambda p, x: vae.module.apply({"params": p}, x))
    image = to_float(pictures)
    again = np.clip(in_parts(lambda part: reconstruct(vae.params, part), image), -1, 1)
    error = ((again - image) ** 2).mean(axis=(1, 2, 3))
    rows = [list(images.to_uint8(x[:12])) for x in (image, again)]
    images.grid(rows).save(folder.parent / "vae.png")
    return {"psnr": round(float(np.mean(10 * np.log10(4 / error))), 2), "photos": len(image)}
