"""Third stage: the UNet, from captions alone."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from persona_jax.base.caption_sampling import captions_of, draw_caption, odds_of
from persona_jax.base.stage import fit_stage, save_tower
from persona_jax.data import images
from persona_jax.data.encodings import EncodingJob, Encodings, encode
from persona_jax.data.loader import photo_batches
from persona_jax.data.photo_datasets import Photos
from persona_jax.diffusion.loss import denoising_loss, draw_steps, example_keys
from persona_jax.diffusion.schedule import STABLE_DIFFUSION
from persona_jax.interop import folders
from persona_jax.models import towers
from persona_jax.models.attention import Source, project_keys_values
from persona_jax.models.unet import text_kernels
from persona_jax.models.vae import AutoencoderKL, draw_latents
from persona_jax.pipelines import generation as paint
from persona_jax.pipelines import pipeline
from persona_jax.runtime import buckets
from persona_jax.runtime.mesh import to_host

PROMPTS = (
    "a photo of a smiling person",
    "a photo of a person with a calm face",
    "a photo of a surprised person",
    "",
)
SAMPLES = 6


def train_unet(config: ConfigDict, workdir: Path, mesh: Mesh, photos: Photos, rows) -> None:
    """Noise prediction from captions, a tenth of them empty."""
    folder, unet_config = workdir / "pipeline", config.unet
    settings = unet_config.tower.to_dict()
    module = towers.build("unet", settings)
    parts = pipeline.load(str(folder), only=("vae", "text_encoder"))
    text, vae = parts.text_encoder, parts.vae
    encodings = encode_latents(photos, rows, parts, config)
    kinds = captions_of(photos, rows)
    odds = odds_of(kinds, unet_config.captions.to_dict())
    tokens = np.stack([parts.tokenize(kind)[0] for kind in kinds.values()], axis=1)
    empty, _ = parts.tokenize([""])
    schedule, seed, scale = parts.schedule, config.seed, vae.module.config.scaling_factor

    def loss(params, frozen, batch, step):
        keys = example_keys(seed, step, batch["index"])
        drop_key, caption_key, latent_key, noise_key, t_key = jax.vmap(
            lambda k: jax.random.split(k, 5)
        )(keys).T
        dropped = jax.vmap(jax.random.uniform)(drop_key) < unet_config.empty_caption
        ids = draw_caption(caption_key, batch["tokens"], odds)
        ids = jnp.where(dropped[:, None], frozen["empty"], ids)
        hidden = text.module.apply({"params": frozen["text_encoder"]}, ids).hidden
        source = Source(*project_keys_values(text_kernels(params, module.config), hidden))
        latents = jax.vmap(lambda k, m: draw_latents(k, m, scale))(latent_key, batch["moments"])
        noise = jax.vmap(lambda k: jax.random.normal(k, latents.shape[1:]))(noise_key)
        t = draw_steps(t_key, schedule, **unet_config.timesteps)

        def predict(z, t):
            return module.apply({"params": params}, z, t, (source,))

        return denoising_loss(predict, schedule, latents, noise, t).mean(), {}

    def batches_from(start):
        chosen = photo_batches(
            len(rows),
            unet_config.batch_size,
            flip=config.flip,
            seed=seed + 2,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for batch in chosen:
            photo, side = batch["photo"], batch["flip"].astype(np.int64)
            yield {
                "moments": encodings.arrays["moments"][photo, side],
                "tokens": tokens[photo],
                "index": batch["index"],
            }

    parts = dataclasses.replace(parts, unet=folders.Tower(module, {}, settings))
    painter = paint.make_sampler(parts, steps=unet_config.grid_steps)
    ids, _ = parts.tokenize([prompt for prompt in PROMPTS for _ in range(SAMPLES)])
    request = paint.Request(
        # The same noise for every prompt, so that the rows differ by the prompt alone.
        keys=jnp.tile(paint.picture_keys(seed, SAMPLES), len(PROMPTS)),
        ids=jnp.asarray(ids),
        negative_ids=jnp.repeat(jnp.asarray(empty), len(ids), axis=0),
        guidance=unet_config.grid_guidance,
    )

    def draw(step, state):
        frozen = {"unet": to_host(state.ema), "vae": vae.params, "text_encoder": text.params}
        pictures = images.to_uint8(np.asarray(painter(frozen, (), request)))
        grid = images.grid([list(row) for row in np.split(pictures, len(PROMPTS))])
        if jax.process_index() == 0:
            grid.save(workdir / "unet" / f"grid_{step:06d}.png")

    learnt = fit_stage(
        config,
        unet_config,
        workdir / "unet",
        mesh,
        lambda: towers.initialise(module, jax.random.key(seed + 2)),
        loss,
        {"text_encoder": text.params, "empty": jnp.asarray(empty)},
        batches_from,
        callbacks=[(unet_config.grid_every, draw)],
    )
    save_tower(folder, "unet", settings, learnt)


def write_scaffold(folder: Path, prediction: str) -> None:
    """The small files that make the towers' folders a pipeline."""
    scheduler = STABLE_DIFFUSION | {"prediction_type": prediction}
    folders.write_json(folder / "scheduler/scheduler_config.json", scheduler)
    folders.write_json(folder / "model_index.json", folders.model_index())


def encode_latents(photos: Photos, rows, parts: pipeline.Pipeline, config: ConfigDict) -> Encodings:
    """The moments of every base photo, and of its mirror image where the stages flip."""
    vae, size, crop = parts.vae, config.image_size, config.data.crop
    moments = jax.jit(lambda p, x: vae.module.apply({"params": p}, x, method=AutoencoderKL.encode))

    def encode_images(pictures):
        pixels = [images.to_model(images.centre_crop(p, crop), size) for p in pictures]
        return {"moments": np.asarray(moments(vae.params, np.stack(pixels)))}

    job = EncodingJob(
        photos,
        rows,
        encode_images=encode_images,
        encode_captions=lambda captions: {},
        cache_dir=buckets.local(config.data.data_dir) / "encoded",
        key=f"base {vae.hash} {size} {crop}",
        mirrored=config.flip,
    )
    return encode(job)
