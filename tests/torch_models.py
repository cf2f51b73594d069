"""Reference models of diffusers and transformers with random weights, and comparisons with ours.

Each ``*_difference`` makes a stock model, saves it, loads its folder with our code and returns the
relative difference of the outputs. The stock model is freed before ours is loaded, so that full
sizes fit into memory.
"""

import gc
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from persona_jax.data.tokenizer import learn_tokenizer
from persona_jax.diffusion.schedule import STABLE_DIFFUSION
from persona_jax.interop.folders import load_tower
from persona_jax.models.attention import Source, project_keys_values
from persona_jax.models.unet import text_kernels
from persona_jax.models.vae import AutoencoderKL

# Operations are small and cores few: more threads would only wait for each other.
torch.set_num_threads(1)

PUBLISHED = Path(__file__).with_name("published")
"""Names and shapes of published tensors, one file each."""

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

# The smallest pipeline with a down, a mid, an up and an attention-free block: tests spend most of
# their time compiling it.
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}
TINY_VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
TINY_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 12,
}


def relative(ours, theirs) -> float:
    """Returns ‖ours − theirs‖ / ‖theirs‖, in float64."""
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.detach().numpy()
    theirs = np.asarray(theirs, np.float64)
    return float(np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs))


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Randomises vectors too: swapped norm scales or biases are invisible while all are 1 or 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().numpy().transpose(0, 2, 3, 1))


def make_unet(settings: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomise(diffusers.UNet2DConditionModel(**settings))


def make_vae(settings: dict) -> torch.nn.Module:
    torch.manual_seed(1)
    return randomise(diffusers.AutoencoderKL(**settings))


def make_text_encoder(settings: dict) -> torch.nn.Module:
    torch.manual_seed(2)
    return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings)))


def make_image_encoder(settings: dict) -> torch.nn.Module:
    torch.manual_seed(3)
    config = transformers.CLIPVisionConfig(**settings)
    return randomise(transformers.CLIPVisionModelWithProjection(config))


def write_pipeline(folder: Path, *, prediction: str = "epsilon", clip: bool = True) -> None:
    """Writes a tiny random StableDiffusionPipeline with diffusers.

    Args:
      folder: where to write it.
      prediction: `prediction_type` of its scheduler.
      clip: whether it has an image encoder and a feature extractor.
    """
    captions = ["a photo of a smiling woman", "a portrait of an angry man"] * 5
    learn_tokenizer(captions, 560, TINY_TEXT["max_position_embeddings"], folder / "learnt")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder / "learnt"))
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    unet = make_unet(TINY_UNET)
    text_encoder = make_text_encoder(TINY_TEXT | special)
    with torch.no_grad():
        # Like published weights: predictions of unit size, and different prompts matter.
        unet.conv_out.weight.mul_(8.0)
        text_encoder.get_input_embeddings().weight.mul_(20.0)
    diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=make_vae(TINY_VAE),
        text_encoder=text_encoder,
        image_encoder=make_image_encoder(TINY_VISION) if clip else None,
        feature_extractor=transformers.CLIPImageProcessorPil(size=16, crop_size=16)
        if clip
        else None,
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler.from_config(
            STABLE_DIFFUSION | {"prediction_type": prediction}
        ),
        safety_checker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def open_diffusers(folder: Path) -> diffusers.StableDiffusionPipeline:
    """Opens a pipeline folder with stock diffusers."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_difference(settings: dict, folder: Path, size: int, tokens: int = 77) -> float:
    theirs = make_unet(settings)
    theirs.save_pretrained(folder)
    z, text = normal(2, size, size, 4), normal(2, tokens, settings["cross_attention_dim"], seed=1)
    t = np.array([3, 801])
    with torch.no_grad():
        expected = theirs(nchw(z), torch.from_numpy(t), torch.from_numpy(text)).sample
    del theirs
    gc.collect()
    ours = load_tower(folder, "unet")

    @jax.jit
    def run(params, z, t, text):
        kernels = text_kernels(params, ours.module.config)
        source = Source(*project_keys_values(kernels, text))
        return ours.module.apply({"params": params}, z, t, (source,))

    return relative(run(ours.params, z, t, text).transpose(0, 3, 1, 2), expected)


def vae_differences(settings: dict, folder: Path, size: int) -> tuple[float, float]:
    """Returns the differences of an image's moments, and of their decoded mean."""
    theirs = make_vae(settings)
    theirs.save_pretrained(folder)
    image = normal(1, size, size, 3)
    with torch.no_grad():
        moments = theirs.encode(nchw(image)).latent_dist.parameters
        latents = moments[:, : moments.shape[1] // 2]
        decoded = theirs.decode(latents).sample
    del theirs
    gc.collect()
    ours = load_tower(folder, "vae")
    scale = ours.module.config.scaling_factor

    @jax.jit
    def run(params, image, latents):
        variables = {"params": params}
        return (
            ours.module.apply(variables, image, method=AutoencoderKL.encode),
            ours.module.apply(variables, latents, method=AutoencoderKL.decode),
        )

    a, b = run(ours.params, image, scale * nhwc(latents))
    return relative(a.transpose(0, 3, 1, 2), moments), relative(b.transpose(0, 3, 1, 2), decoded)


def text_differences(settings: dict, folder: Path) -> tuple[float, float]:
    """Returns the differences of the hidden states and of the pooled output."""
    theirs = make_text_encoder(settings)
    theirs.save_pretrained(folder)
    ids = np.random.default_rng(0).integers(0, settings["vocab_size"] - 3, (2, 77))
    ids[0, 9:], ids[1, 40:] = settings["vocab_size"] - 1, settings["vocab_size"] - 1
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids))
    del theirs
    ours = load_tower(folder, "text_encoder")
    hidden, pooled = jax.jit(ours.module.apply)({"params": ours.params}, jnp.asarray(ids))
    return relative(hidden, expected.last_hidden_state), relative(pooled, expected.pooler_output)


def vision_differences(settings: dict, folder: Path) -> tuple[float, float]:
    """Returns the differences of the projected embedding and of the penultimate states."""
    theirs = make_image_encoder(settings)
    theirs.save_pretrained(folder)
    size = settings["image_size"]
    pixels = normal(2, size, size, 3)
    with torch.no_grad():
        expected = theirs(nchw(pixels), output_hidden_states=True)
    embedding, penultimate = expected.image_embeds, expected.hidden_states[-2]
    del theirs, expected
    gc.collect()
    ours = load_tower(folder, "image_encoder")
    got = jax.jit(ours.module.apply)({"params": ours.params}, pixels)
    return relative(got.embedding, embedding), relative(got.penultimate, penultimate)
