"""Sizes and items of the benchmark; random towers in diffusers' layout, read by all sides."""

import dataclasses
from pathlib import Path

from persona_jax.planning.published import CLIP_VIT_H_14, STABLE_DIFFUSION_1_5

TEXT_LENGTH = 77
PHOTOS = 9
"""Number of reference photos in the training step and in sampling."""
SCHEDULE = STABLE_DIFFUSION_1_5["scheduler"] | {"clip_sample": False, "steps_offset": 1}
WHAT = ("matmul", "unet", "sampling", "step", "whole_step", "vae_encode", "vae_decode", "clip")
"""The items. matmul is one large product, the yardstick for the speed of the others. At sd15,
whole_step needs four times the UNet's weights in memory on each side."""
MATRIX = {"cpu": 2048, "gpu": 8192}
"""Rows and columns of matmul's matrices, by platform."""


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of all networks, and the batch and steps they run with.

    Attributes:
      unet, vae, image_encoder: configurations of diffusers' and transformers' classes.
      batch: batch size; VAE and image encoder always take one picture.
      steps: DDIM steps.
    """

    unet: dict
    vae: dict
    image_encoder: dict
    batch: int
    steps: int


_SMALL_UNET = {
    "sample_size": 16,
    "block_out_channels": (64, 64, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
}
SIZES = {
    "sd15": Size(
        unet=dict(STABLE_DIFFUSION_1_5["unet"]),
        vae=dict(STABLE_DIFFUSION_1_5["vae"]),
        image_encoder=dict(CLIP_VIT_H_14),
        batch=1,
        steps=2,
    ),
    "small": Size(
        unet=_SMALL_UNET,
        vae=dict(STABLE_DIFFUSION_1_5["vae"])
        | {
            "block_out_channels": (16, 32, 64),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": 64,
        },
        image_encoder=dict(CLIP_VIT_H_14)
        | {
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "image_size": 64,
            "patch_size": 16,
            "projection_dim": 256,
        },
        batch=16,
        steps=10,
    ),
}


def size_of(name: str, batch: int | None = None, steps: int | None = None) -> Size:
    """Returns a size by its name, with batch size and DDIM steps replaced where given."""
    changes = {"batch": batch, "steps": steps}
    return dataclasses.replace(SIZES[name], **{k: v for k, v in changes.items() if v})


def write(size: Size, folder: Path) -> None:
    """Writes the missing towers, each into its own folder."""
    import diffusers
    import torch
    import transformers

    makers = {
        "unet": lambda: diffusers.UNet2DConditionModel(**size.unet),
        "vae": lambda: diffusers.AutoencoderKL(**size.vae),
        "image_encoder": lambda: transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**size.image_encoder)
        ),
    }
    for name, make in makers.items():
        if not (folder / name / "config.json").exists():
            torch.manual_seed(0)
            make().save_pretrained(folder / name)
