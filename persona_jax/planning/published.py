"""Settings of published ``config.json`` files, for planning without the pipeline's files."""

from collections.abc import Mapping
from typing import Any

STABLE_DIFFUSION_1_5: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": 512,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "eos_token_id": 2,
    },
    "scheduler": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
    },
}

CLIP_VIT_H_14: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}

PIPELINES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": STABLE_DIFFUSION_1_5,
    "runwayml/stable-diffusion-v1-5": STABLE_DIFFUSION_1_5,
}
"""``config.json`` of each part of a pipeline, by hub id and folder."""

IMAGE_ENCODERS = {
    "h94/IP-Adapter/models/image_encoder": CLIP_VIT_H_14,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": CLIP_VIT_H_14,
}
"""``config.json`` of image encoders, by hub id."""
