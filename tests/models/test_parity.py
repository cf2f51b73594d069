"""Every tower compared with diffusers or transformers: same random weights, float32."""

import pytest
import torch_models


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_linear_projection": True, "attention_head_dim": (2, 4, 8), "upcast_attention": True},
        {"layers_per_block": 1, "flip_sin_to_cos": False, "freq_shift": 1},
    ],
    ids=["sd1", "sd2", "other"],
)
def test_unet(change, tmp_path):
    assert torch_models.unet_difference(torch_models.SMALL_UNET | change, tmp_path, size=8) < 1e-4


def test_vae(tmp_path):
    assert max(torch_models.vae_differences(torch_models.SMALL_VAE, tmp_path, size=16)) < 1e-4


@pytest.mark.parametrize("change", [{}, {"hidden_act": "gelu", "eos_token_id": 2}], ids=["1", "2"])
def test_text_encoder(change, tmp_path):
    assert max(torch_models.text_differences(torch_models.SMALL_TEXT | change, tmp_path)) < 1e-4


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_image_encoder(act, tmp_path):
    settings = torch_models.SMALL_VISION | {"hidden_act": act}
    assert max(torch_models.vision_differences(settings, tmp_path)) < 1e-4
