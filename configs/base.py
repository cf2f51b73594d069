"""A small base with Stable Diffusion's layout, trained from captioned pictures.

`--config configs/base.py:tiny`: drawn portraits.
`--config configs/base.py:lfw`: photos of LFW; an hour of two CPU cores.
Both: 64 px, 16×16×8 latents.
"""

import common
from ml_collections import ConfigDict

from persona_jax.errors import UserError

LATENT_CHANNELS = 8  # with 4, eyes and teeth blur: pictures this small have no smooth parts
TEXT_DIM = 128
EMBEDDING_DIM = 256


def get_config(preset: str = "tiny") -> ConfigDict:
    if preset not in ("tiny", "lfw"):
        raise UserError(f"base preset {preset!r}; presets: tiny, lfw")
    config = ConfigDict(
        {
            "preset": preset,
            "seed": 0,
            "image_size": 64,
            "data": common.data(),
            "flip": True,  # learn from mirror images too
            "mesh": common.mesh(),
            "vocab_size": 1000,  # of the tokenizer, learnt from the captions
            "log_every": 25,
            "save_every": 200,
            "vae": vae(),
            "clip": clip(),
            "unet": unet(),
        }
    )
    return tiny(config) if preset == "tiny" else config


def tiny(config: ConfigDict) -> ConfigDict:
    """Drawn people: nothing is mirrored or recoloured, as partings, moles and hats are who and
    what is on a picture."""
    config.data.update({"dataset": "portraits", "crop": 1.0})
    # Many people with few photos each: of 2,560 people the eye learns who they are by heart.
    config.data.portraits = ConfigDict(
        {"people": {"base": 12288, "unseen": 512}, "photos": 4, "size": 64, "seed": 0}
    )
    config.flip = False
    config.vae.optimizer.steps = 1000
    config.clip.augment = False
    config.clip.optimizer.steps = 1400
    # Batches of 16, and wide outer blocks for the noise on all latent channels to get through:
    # together they learn from 16,000 examples what took 37,000 with 32 and (32, 64, 128).
    config.unet.batch_size = 16
    config.unet.optimizer.learning_rate = 2e-3
    config.unet.optimizer.steps = 5000
    config.unet.grid_every = 1000
    config.unet.tower.block_out_channels = (64, 64, 96)
    config.reader = reader()
    # The UNet's loss after 410 steps of AdamW is Muon's after 275, at the same cost a step.
    for stage in ("vae", "clip", "unet", "reader"):
        config[stage].optimizer.muon = 0.6
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
            "augment": True,  # flip, shift and recolour
            "captions": {"full": 0.5},  # share; the rest are plain
            "looks_weight": 4.0,  # of telling looks from their opposites
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
            # A network this small never learns to hand on the noise as it is, which is what
            # "epsilon" asks of it where there is little else: faces stay blotches.
            "prediction": "v_prediction",
            # A quarter of the examples has a diffusion step below 480, where expressions are
            # settled; all others have any.
            "timesteps": {"low": 0.25, "below": 480},
            "captions": {"full": 0.5},  # share; the rest are plain
            "empty_caption": 0.1,  # share of examples without a caption, for guidance
            "ema_decay": 0.999,
            "scored": 256,  # pictures read back at the end, where there is a reader
            "grid_every": 500,
            "grid_steps": 20,
            "grid_guidance": 3.0,
            "optimizer": common.optimizer(1e-3, 5000, schedule="cosine"),
            "tower": {
                "sample_size": 16,
                "in_channels": LATENT_CHANNELS,
                "out_channels": LATENT_CHANNELS,
                "block_out_channels": (32, 64, 128),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                "attention_head_dim": 4,
                "cross_attention_dim": TEXT_DIM,
                "norm_num_groups": 16,
            },
        }
    )


def reader() -> ConfigDict:
    return ConfigDict(
        {
            "batch_size": 64,
            "noise": 0.15,  # at most so much of it on a picture in [-1, 1]
            "unseen": 512,  # people to measure its errors on
            "optimizer": common.optimizer(1e-3, 1300, schedule="cosine"),
        }
    )
