"""A tower's config.json: published settings are read, unsupported ones are named in the error."""

import pytest

from persona_jax.errors import UserError
from persona_jax.models import towers

SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


@pytest.mark.parametrize(
    ("tower", "config", "named"),
    [
        (
            "unet",
            SDXL,
            [
                "addition_embed_type='text_time'",
                "addition_time_embed_dim=256",
                "projection_class_embeddings_input_dim=2816",
                "transformer_layers_per_block=[1, 2, 10]",
            ],
        ),
        ("unet", {"class_embed_type": "timestep"}, ["class_embed_type='timestep'"]),
        ("unet", {"downsample_padding": 0}, ["downsample_padding=0"]),
        ("unet", {"mid_block_type": None}, ["mid_block_type=None"]),
        ("unet", {"sample_size": None}, ["sample_size=None"]),
        ("unet", {"down_block_types": ["AttnDownBlock2D"]}, ["AttnDownBlock2D"]),
        ("unet", {"layers_per_block": [2, 2]}, ["layers_per_block=[2, 2]"]),
        ("unet", {"block_out_channels": [32, 64]}, ["2 block_out_channels, 4 down_block_types"]),
        ("vae", {"use_quant_conv": False}, ["use_quant_conv=False"]),
        ("vae", {"mid_block_add_attention": False}, ["mid_block_add_attention=False"]),
        ("vae", {"shift_factor": 0.1159, "latents_mean": [0.0]}, ["shift_factor", "latents_mean"]),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"]}, ["AttnDownEncoderBlock2D"]),
        ("text_encoder", {"hidden_act": "relu"}, ["hidden_act='relu'"]),
        ("image_encoder", {"qkv_bias": True}, ["qkv_bias=True"]),
    ],
)
def test_unsupported_settings_are_refused_by_name(tower, config, named):
    with pytest.raises(UserError) as error:
        towers.build(tower, config)
    assert all(setting in str(error.value) for setting in named)
    assert "\n" not in str(error.value)


PUBLISHED = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder": {
        "_name_or_path": "openai/clip-vit-large-patch14",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
        "vocab_size": 49408,
    },
    "image_encoder": {
        "_name_or_path": "./image_encoder",
        "architectures": ["CLIPVisionModelWithProjection"],
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "image_size": 224,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 5120,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "projection_dim": 1024,
        "torch_dtype": "float16",
        "transformers_version": "4.28.0.dev0",
    },
}


@pytest.mark.parametrize("tower", towers.TOWERS)
def test_published_configs_are_understood(tower):
    """Every value of the configs of Stable Diffusion 1.5 and the IP-Adapter's ViT-H is kept."""
    config = towers.build(tower, PUBLISHED[tower]).config
    for key, value in PUBLISHED[tower].items():
        if hasattr(config, key):
            assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value)
