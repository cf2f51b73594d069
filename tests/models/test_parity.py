"""Every tower against diffusers or transformers, same random weights, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from persona_jax.interop.folders import load_tower
from persona_jax.models.attention import Source, project_keys_values
from persona_jax.models.unet import text_kernels
from persona_jax.models.vae import AutoencoderKL

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SMALL_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SMALL_VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
SMALL_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "eos_token_id": 98,
    "bos_token_id": 97,
    "pad_token_id": 98,
}
SMALL_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}


def relative(ours, theirs) -> float:
    theirs = theirs.detach().numpy().astype(np.float64)
    return float(np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs))


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Norm scales and biases too: a swapped pair of them would go unseen at 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def unet_difference(settings: dict, folder, size: int, tokens: int = 77) -> float:
    torch.manual_seed(0)
    theirs = randomise(diffusers.UNet2DConditionModel(**settings))
    theirs.save_pretrained(folder)
    ours = load_tower(folder, "unet")
    z, text = normal(2, size, size, 4), normal(2, tokens, settings["cross_attention_dim"], seed=1)
    t = np.array([3, 801])
    with torch.no_grad():
        expected = theirs(nchw(z), torch.from_numpy(t), torch.from_numpy(text)).sample

    @jax.jit
    def run(params, z, t, text):
        kernels = text_kernels(params, ours.module.config)
        source = Source(*project_keys_values(kernels, text))
        return ours.module.apply({"params": params}, z, t, (source,))

    return relative(run(ours.params, z, t, text).transpose(0, 3, 1, 2), expected)


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
    assert unet_difference(SMALL_UNET | change, tmp_path, size=8) < 1e-4


def vae_differences(settings: dict, folder, size: int) -> tuple[float, float]:
    torch.manual_seed(0)
    theirs = randomise(diffusers.AutoencoderKL(**settings))
    theirs.save_pretrained(folder)
    ours = load_tower(folder, "vae")
    image = normal(1, size, size, 3)
    with torch.no_grad():
        moments = theirs.encode(nchw(image)).latent_dist.parameters
        latents = moments[:, : moments.shape[1] // 2]
        decoded = theirs.decode(latents).sample
    scale = ours.module.config.scaling_factor

    @jax.jit
    def run(params, image, latents):
        variables = {"params": params}
        return (
            ours.module.apply(variables, image, method=AutoencoderKL.encode),
            ours.module.apply(variables, latents, method=AutoencoderKL.decode),
        )

    a, b = run(ours.params, image, scale * latents.numpy().transpose(0, 2, 3, 1))
    return relative(a.transpose(0, 3, 1, 2), moments), relative(b.transpose(0, 3, 1, 2), decoded)


def test_vae(tmp_path):
    assert max(vae_differences(SMALL_VAE, tmp_path, size=16)) < 1e-4


def text_differences(settings: dict, folder) -> tuple[float, float]:
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(**settings)
    theirs = randomise(transformers.CLIPTextModel(config))
    theirs.save_pretrained(folder)
    ours = load_tower(folder, "text_encoder")
    ids = np.random.default_rng(0).integers(0, settings["vocab_size"] - 3, (2, 77))
    ids[0, 9:], ids[1, 40:] = config.vocab_size - 1, config.vocab_size - 1
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids))
    hidden, pooled = jax.jit(ours.module.apply)({"params": ours.params}, jnp.asarray(ids))
    return relative(hidden, expected.last_hidden_state), relative(pooled, expected.pooler_output)


@pytest.mark.parametrize("change", [{}, {"hidden_act": "gelu", "eos_token_id": 2}], ids=["1", "2"])
def test_text_encoder(change, tmp_path):
    assert max(text_differences(SMALL_TEXT | change, tmp_path)) < 1e-4


def vision_differences(settings: dict, folder) -> list[float]:
    torch.manual_seed(0)
    theirs = randomise(
        transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**settings))
    )
    theirs.save_pretrained(folder)
    ours = load_tower(folder, "image_encoder")
    size = settings["image_size"]
    pixels = normal(2, size, size, 3)
    with torch.no_grad():
        expected = theirs(nchw(pixels), output_hidden_states=True)
    got = jax.jit(ours.module.apply)({"params": ours.params}, pixels)
    return [
        relative(got.embedding, expected.image_embeds),
        relative(got.penultimate, expected.hidden_states[-2]),
    ]


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_image_encoder(act, tmp_path):
    assert max(vision_differences(SMALL_VISION | {"hidden_act": act}, tmp_path)) < 1e-4
