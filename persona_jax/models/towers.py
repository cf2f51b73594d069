"""The four towers of a pipeline, by the name of their folder."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from persona_jax.models.clip import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from persona_jax.models.unet import UNet2DConditionModel, UNetConfig
from persona_jax.models.vae import AutoencoderKL, VAEConfig

TOWERS = ("unet", "vae", "text_encoder", "image_encoder")


def build(tower: str, config: Mapping[str, Any], dtype: DTypeLike | None = None) -> nn.Module:
    """The Flax module of a tower.

    Args:
      tower: one of :data:`TOWERS`.
      config: the content of its ``config.json``.
      dtype: computation dtype; None computes in the wider of the parameters' and the inputs'.

    Raises:
      UserError: settings that are not supported.
    """
    dtype = None if dtype is None else jnp.dtype(dtype)
    match tower:
        case "unet":
            return UNet2DConditionModel(UNetConfig.from_json(config), dtype)
        case "vae":
            return AutoencoderKL(VAEConfig.from_json(config), dtype)
        case "text_encoder":
            return CLIPTextModel(CLIPTextConfig.from_json(config), dtype)
        case "image_encoder":
            return CLIPVisionModelWithProjection(CLIPVisionConfig.from_json(config), dtype)
    raise ValueError(f"no tower {tower!r}; towers: {TOWERS}")


def initialise(module: nn.Module, key: jax.Array) -> dict:
    """Random float32 parameters of a tower. Under ``jax.eval_shape``, their shapes."""
    config = module.config
    inputs: tuple[jax.Array | tuple[()], ...]
    match config:
        case UNetConfig():
            size = 2 ** (len(config.block_out_channels) - 1)
            inputs = (jnp.zeros((1, size, size, config.in_channels)), jnp.zeros(1), ())
        case VAEConfig():
            inputs = (jnp.zeros((1, config.downscale, config.downscale, config.in_channels)),)
        case CLIPTextConfig():
            inputs = (jnp.zeros((1, config.max_position_embeddings), jnp.int32),)
        case CLIPVisionConfig():
            side = config.image_size
            inputs = (jnp.zeros((1, side, side, config.num_channels)),)
    return module.init(key, *inputs)["params"]


@functools.lru_cache(maxsize=16)  # slow to trace, and used several times per run
def abstract_params(module: nn.Module) -> Mapping:
    """The shapes and dtypes of a tower's parameters, as a tree."""
    return jax.eval_shape(lambda key: initialise(module, key), jax.random.key(0))
