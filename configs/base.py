"""A small base with Stable Diffusion's layout, trained from captioned photos.

`--config configs/base.py:lfw`: 64 px, 16×16×8 latents; sized for an hour of two CPU cores.
"""

import common
from ml_collections import ConfigDict

from persona_jax.errors import UserError

LATENT_CHANNELS = 8  # with 4, eyes and teeth blur: pictures this small have no smooth parts
TEXT_DIM = 128
EMBEDDING_DIM = 256


def get_config(preset: str = "lfw") -> ConfigDict:
    if preset != "lfw":
        raise UserError(f"base preset {preset!r}; presets: lfw")
    config = ConfigDict(
        {
            "preset": preset,
            "seed": 0,
            "image_size": 64,
            "data": common.data(),
            "mesh": common.mesh(),
            "vocab_size": 1000,  # of the tokenizer, learnt from the captions
            "log_every": 25,
            "save_every": 200,
            "vae": vae(),
            "clip": clip(),
            "unet": unet(),
        }
    )
    return config


def vae() -> ConfigDict:
    return ConfigDict(
        {
            "batch_size": 16,
            "kl_weight": 1e-3,
            "optimizer": common.optimizer(2e-3, 2400, schedule="cosine", weight_decay=0.0),
            "tower": {
                "block_out_channels": (16, 32, 64),
                "down_block_types": ("DownEncoderBlock2D",) * 3,
                "up_block_types": ("UpDecoderBlock2D",) * 3,
                "latent_channels": LATENT_CHANNELS,
                "layers_per_block": 1,
                "norm_num_groups": 8,
                "sample_size": 64,
            },
        }
    )


def clip() -> ConfigDict:
    return ConfigDict(
        {
            "batch_size": 64,
            "identity_weight": 1.0,
            "identity_temperature": 0.1,
            "optimizer": common.optimizer(1e-3, 1200, schedule="cosine", weight_decay=0.05),
            "text": {
                "hidden_size": TEXT_DIM,
                "intermediate_size": 4 * TEXT_DIM,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "max_position_embeddings": 77,
                "projection_dim": EMBEDDING_DIM,
                "hidden_act": "gelu",
            },
            "vision": {
                "hidden_size": 192,
                "intermediate_size": 768,
                "num_hidden_layers": 4,
                "num_attention_heads": 6,
                "image_size": 64,
                "patch_size": 16,
                "projection_dim": EMBEDDING_DIM,
                "hidden_act": "gelu",
            },
        }
    )


def unet() -> ConfigDict:
    return ConfigDict(
        {
            "batch_size": 32,
            "empty_caption": 0.1,  # share of examples without a caption, for guidance
            "ema_decay": 0.999,
            "grid_every": 500,
            "grid_steps": 20,
            "grid_guidance": 3.0,
            "optimizer": common.optimizer(1e-3, 3000, schedule="cosine"),
            "tower": {
                "sample_size": 16,
                "in_channels": LATENT_CHANNELS,
                "out_channels": LATENT_CHANNELS,
                "block_out_channels": (64, 96, 128),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                "attention_head_dim": 4,
                "cross_attention_dim": TEXT_DIM,
                "norm_num_groups": 16,
            },
        }
    )
