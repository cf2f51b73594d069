"""AutoencoderKL: images [B, H, W, 3] in [−1, 1] ↔ latents [B, h, w, C]."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from persona_jax.errors import UserError
from persona_jax.models import configs
from persona_jax.models.attention import SelfAttention
from persona_jax.models.layers import (
    Downsample2D,
    ResnetBlock2D,
    Upsample2D,
    conv3,
    group_norm,
)

_EPS = 1e-6

_FIXED = {
    "act_fn": ("silu",),
    "force_upcast": (True, False),  # only applies to float16, which is not used here
    "mid_block_add_attention": (True,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The settings of ``vae/config.json`` that may vary; names and defaults are diffusers'."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)

    @classmethod
    def from_json(cls, raw: Mapping) -> "VAEConfig":
        """From the content of ``config.json``. UserError names unsupported settings."""
        config = configs.parse(cls, raw, _FIXED)
        known = {"DownEncoderBlock2D", "UpDecoderBlock2D"}
        strange = {*config.down_block_types, *config.up_block_types} - known
        if strange:
            raise UserError(
                f"VAEConfig: unsupported blocks {sorted(strange)}; known: {sorted(known)}"
            )
        blocks = len(config.block_out_channels)
        if len({blocks, len(config.down_block_types), len(config.up_block_types)}) > 1:
            raise UserError(
                "VAEConfig: down_block_types, up_block_types and block_out_channels must be "
                "equally long"
            )
        if not 1 <= blocks <= 8:
            raise UserError(f"VAEConfig: {blocks} blocks; expected 1 to 8")
        for width in config.block_out_channels:
            configs.divides("block_out_channels", width, config.norm_num_groups, "norm_num_groups")
        return config

    @property
    def downscale(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


class _Attention(nn.Module):
    """Single-head self-attention over the positions, with its own norm."""

    groups: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        y = group_norm(self.groups, _EPS, self.dtype, "group_norm")(x)
        y = y.reshape(y.shape[0], -1, y.shape[-1])
        # Parameters go into this module's scope, since diffusers' names have no level between.
        attention = SelfAttention(1, qkv_bias=True, dtype=self.dtype)
        nn.share_scope(self, attention)
        return x + attention(y).reshape(x.shape)


class _Tower(nn.Module):
    """Layers that encoder and decoder share."""

    config: VAEConfig
    dtype: jnp.dtype | None = None

    def resnet(self, channels: int, name: str) -> ResnetBlock2D:
        groups = self.config.norm_num_groups
        return ResnetBlock2D(channels, groups, _EPS, dtype=self.dtype, name=name)

    def middle(self, x: Array) -> Array:
        channels = self.config.block_out_channels[-1]
        x = self.resnet(channels, "mid_block.resnets.0")(x)
        attention = _Attention(
            self.config.norm_num_groups, dtype=self.dtype, name="mid_block.attentions.0"
        )
        return self.resnet(channels, "mid_block.resnets.1")(attention(x))

    def head(self, x: Array, channels: int) -> Array:
        x = group_norm(self.config.norm_num_groups, _EPS, self.dtype, "conv_norm_out")(x)
        return conv3(channels, self.dtype, "conv_out")(nn.silu(x))


class Encoder(_Tower):
    """Image → features from which the moments are computed."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w K"]:
        """[B, H, W, 3] → [B, h, w, 2·C]."""
        channels = self.config.block_out_channels
        x = conv3(channels[0], self.dtype, "conv_in")(x)
        for level, width in enumerate(channels):
            for i in range(self.config.layers_per_block):
                x = self.resnet(width, f"down_blocks.{level}.resnets.{i}")(x)
            if level < len(channels) - 1:
                name = f"down_blocks.{level}.downsamplers.0"
                x = Downsample2D(padding=0, dtype=self.dtype, name=name)(x)
        return self.head(self.middle(x), 2 * self.config.latent_channels)


class Decoder(_Tower):
    """Latents → image."""

    @nn.compact
    def __call__(self, z: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """[B, h, w, C] → [B, H, W, 3]."""
        channels = self.config.block_out_channels[::-1]
        x = self.middle(conv3(channels[0], self.dtype, "conv_in")(z))
        for level, width in enumerate(channels):
            for i in range(self.config.layers_per_block + 1):
                x = self.resnet(width, f"up_blocks.{level}.resnets.{i}")(x)
            if level < len(channels) - 1:
                x = Upsample2D(dtype=self.dtype, name=f"up_blocks.{level}.upsamplers.0")(x)
        return self.head(x, self.config.out_channels)


class AutoencoderKL(nn.Module):
    """The VAE, with diffusers' parameter names.

    Apply it with ``method=AutoencoderKL.encode`` or ``AutoencoderKL.decode``.
    """

    config: VAEConfig
    dtype: jnp.dtype | None = None

    def setup(self):
        """Encoder, decoder and the 1×1 convolutions before and after the latents."""
        config, dtype = self.config, self.dtype
        self.encoder = Encoder(config, dtype)
        self.decoder = Decoder(config, dtype)
        self.quant_conv = nn.Conv(2 * config.latent_channels, (1, 1), dtype=dtype)
        self.post_quant_conv = nn.Conv(config.latent_channels, (1, 1), dtype=dtype)

    def encode(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B h w K"]:
        """Image in [−1, 1] → moments ``[B, h, w, 2·C]``: mean, then log-variance.

        `scaling_factor` is not applied; :func:`sample_moments` does.
        """
        return self.quant_conv(self.encoder(image)).astype(jnp.float32)

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Scaled latents, as the UNet reads them → image, nominally in [−1, 1]."""
        z = latents / self.config.scaling_factor
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Reconstruction from the mean latents. It uses every parameter, as ``init`` needs."""
        mean, _ = jnp.split(self.encode(image), 2, axis=-1)
        return self.decode(mean * self.config.scaling_factor)


def sample_moments(
    moments: Float[Array, "*B h w K"],
    noise: Float[Array, "*B h w C"] | float,
    scaling_factor: float,
) -> Float[Array, "*B h w C"]:
    """Scaled latents z_0 = s·(mean + std·noise) (Kingma & Welling).

    The log-variance is clipped to [−30, 20], as in the original autoencoder.

    Args:
      moments: from :meth:`AutoencoderKL.encode`, ``[…, h, w, 2·C]``.
      noise: standard normal ``[…, h, w, C]``; 0 gives the mean.
      scaling_factor: s, of the VAE's config.
    """
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    std = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
    return scaling_factor * (mean + std * noise)


def kl_divergence(moments: Float[Array, "B h w K"]) -> Float[Array, " B"]:
    """KL(N(mean, std²) ‖ N(0, 1)) summed over each example's latents, in nats."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    log_variance = jnp.clip(log_variance, -30.0, 20.0)
    kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
    return kl.sum(axis=(1, 2, 3))


def draw_latents(
    key: PRNGKeyArray, moments: Float[Array, "h w K"], scaling_factor: float
) -> Float[Array, "h w C"]:
    """One example's scaled latents ``[h, w, C]``, with noise drawn from `key`."""
    shape = (*moments.shape[:-1], moments.shape[-1] // 2)
    return sample_moments(moments, jax.random.normal(key, shape), scaling_factor)
