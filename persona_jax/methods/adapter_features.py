"""The features that adapter training reads, computed once: latent moments, embeddings, tokens."""

import jax
import numpy as np
from ml_collections import ConfigDict

from persona_jax.data import images
from persona_jax.data.encodings import EncodingJob
from persona_jax.data.photos import Photos
from persona_jax.models.vae import AutoencoderKL
from persona_jax.pipelines.image_encoders import ImageEncoder
from persona_jax.pipelines.pipeline import Pipeline
from persona_jax.runtime import buckets
from persona_jax.runtime.mesh import local_sharding


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
        both = [
            (images.to_model(images.centre_crop(p, crop), size), encoder.preprocess(p))
            for p in pictures
        ]
        pixels, seen = map(np.stack, zip(*both, strict=True))
        shared = jax.device_put((pixels, seen), local_sharding(len(pixels)))
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
