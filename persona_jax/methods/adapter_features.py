"""Cached features for adapter training: latent moments, image embeddings and caption tokens."""

import jax
import numpy as np
from ml_collections import ConfigDict

from persona_jax.data import images
from persona_jax.data.encodings import EncodingJob
from persona_jax.data.photo_datasets import Photos
from persona_jax.models.vae import AutoencoderKL
from persona_jax.pipelines.image_encoders import ImageEncoder
from persona_jax.pipelines.pipeline import Pipeline
from persona_jax.runtime import buckets
from persona_jax.runtime.mesh import local_sharding


def adapter_job(
    photos: Photos, rows: np.ndarray, pipeline: Pipeline, encoder: ImageEncoder, config: ConfigDict
) -> EncodingJob:
    """The job that computes and caches the features of the chosen photos.

    Args:
      photos: the dataset.
      rows: indices of the chosen photos.
      pipeline: its VAE and tokenizer are used.
      encoder: image encoder.
      config: of the run; ``data`` (crop, cache folder) and ``flip`` are read.
    """
    vae, size, crop = pipeline.tower("vae"), pipeline.image_size, config.data.crop
    text = pipeline.tower("text_encoder")

    @jax.jit
    def towers(vae_params, encoder_params, pixels, encoder_inputs):
        moments = vae.module.apply({"params": vae_params}, pixels, method=AutoencoderKL.encode)
        return {"moments": moments, "embeddings": encoder.embed(encoder_params, encoder_inputs)}

    def encode_images(pictures):
        inputs = [
            (images.to_model(images.centre_crop(p, crop), size), encoder.preprocess(p))
            for p in pictures
        ]
        pixels, encoder_inputs = map(np.stack, zip(*inputs, strict=True))
        sharded = jax.device_put((pixels, encoder_inputs), local_sharding(len(pixels)))
        return towers(vae.params, encoder.params, *sharded)

    return EncodingJob(
        photos,
        rows,
        encode_images=encode_images,
        encode_captions=lambda captions: {"tokens": pipeline.tokenize(captions)[0]},
        cache_dir=buckets.local(config.data.data_dir) / "encoded",
        key=f"train {vae.hash} {encoder.hash} {text.hash} {size} {crop}",
        mirrored=config.flip,
    )
