"""UNet2DConditionModel of the Stable Diffusion 1.x/2.x family, conditioned on sources."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from persona_jax.errors import UserError
from persona_jax.models import configs
from persona_jax.models.attention import (
    CrossAttention,
    KernelTree,
    SelfAttention,
    Source,
)
from persona_jax.models.layers import (
    Downsample2D,
    ResnetBlock2D,
    Upsample2D,
    conv1,
    conv3,
    group_norm,
    normed,
)

_ATTENTION_EPS = 1e-6  # of the GroupNorm before a transformer; resnets use config.norm_eps

_FIXED = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "transformer_layers_per_block": (1,),
    # Any value: softmax statistics are always float32 here.
    "upcast_attention": (True, False, None),
    "attention_type": ("default",),
    "dropout": (0, 0.0),
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The settings of ``unet/config.json`` that may vary; names and defaults are diffusers'.

    `attention_head_dim` is the *number* of heads, for all blocks or one per block: diffusers keeps
    the wrong name for compatibility.
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    @classmethod
    def from_json(cls, raw: Mapping) -> "UNetConfig":
        """From the content of ``config.json``. UserError names unsupported settings."""
        config = configs.parse(cls, raw, _FIXED)
        known = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
        strange = set(config.down_block_types + config.up_block_types) - known
        if strange:
            raise UserError(
                f"UNetConfig: unsupported blocks {sorted(strange)}; known: {sorted(known)}"
            )
        if config.in_channels != config.out_channels:
            kinds = {9: "inpainting", 5: "depth to image", 8: "instruct-pix2pix", 7: "upscaling"}
            kind = f" ({kinds[config.in_channels]})" if config.in_channels in kinds else ""
            raise UserError(
                f"UNetConfig: in_channels={config.in_channels}, out_channels="
                f"{config.out_channels}{kind}; supported are text-to-image UNets, which predict "
                "noise of as many channels as their latents"
            )
        per_level = ("block_out_channels", "down_block_types", "up_block_types", "heads")
        if len({len(getattr(config, name)) for name in per_level}) > 1:
            lengths = ", ".join(f"{len(getattr(config, name))} {name}" for name in per_level)
            raise UserError(f"UNetConfig: lists of one entry per level differ: {lengths}")
        if len(config.block_out_channels) > 8 or not config.block_out_channels:
            raise UserError(f"UNetConfig: {len(config.block_out_channels)} blocks; expected 1 to 8")
        halved = 2 ** (len(config.block_out_channels) - 1)
        configs.divides("sample_size", config.sample_size, halved, "a factor of 2 per downsampling")
        for width, heads in zip(config.block_out_channels, config.heads, strict=True):
            configs.divides("block_out_channels", width, config.norm_num_groups, "norm_num_groups")
            configs.divides("block_out_channels", width, heads, "heads")
        return config

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads per down block."""
        heads = self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)


def timestep_embedding(
    t: Int[Array, " B"] | Float[Array, " B"], dim: int, flip_sin_to_cos: bool, freq_shift: int
) -> Float[Array, "B E"]:
    """Sinusoids of the diffusion step (Vaswani et al. §3.5), float32 ``[B, dim]``."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    waves = (jnp.cos(angles), jnp.sin(angles))
    return jnp.concatenate(waves if flip_sin_to_cos else waves[::-1], axis=-1)


class TimestepEmbedding(nn.Module):
    """Two-layer MLP over the sinusoids."""

    channels: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B E"]) -> Float[Array, "B K"]:
        """[B, E] → [B, channels]."""
        x = nn.silu(nn.Dense(self.channels, dtype=self.dtype, name="linear_1")(x))
        return nn.Dense(self.channels, dtype=self.dtype, name="linear_2")(x)


class FeedForward(nn.Module):
    """GEGLU: [a, b] = x W; (a · gelu(b)) W'."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """[B, T, C] → [B, T, C]."""
        channels = x.shape[-1]
        a, b = jnp.split(nn.Dense(8 * channels, dtype=self.dtype, name="net.0.proj")(x), 2, -1)
        gated = jax.checkpoint(lambda a, b: a * nn.gelu(b, approximate=False))(a, b)
        return nn.Dense(channels, dtype=self.dtype, name="net.2")(gated)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention over the sources, feed-forward; pre-norm residuals."""

    heads: int
    source_dim: int
    layer: str
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"], sources: tuple) -> Float[Array, "B T C"]:
        """[B, T, C] → [B, T, C]."""

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=name)

        x += SelfAttention(self.heads, dtype=self.dtype, name="attn1")(normed(norm("norm1"), x))
        here = tuple(source.at(f"{self.layer}.attn2") for source in sources)
        cross = CrossAttention(self.heads, self.source_dim, dtype=self.dtype, name="attn2")
        x += cross(normed(norm("norm2"), x), here)
        return x + FeedForward(dtype=self.dtype, name="ff")(normed(norm("norm3"), x))


class Transformer2DModel(nn.Module):
    """A transformer block over the positions of a feature map."""

    heads: int
    config: UNetConfig
    layer: str
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], sources: tuple) -> Float[Array, "B h w C"]:
        """[B, h, w, C] → [B, h, w, C]."""
        shape, channels = x.shape, x.shape[-1]
        linear = self.config.use_linear_projection

        def project(y: Array, name: str) -> Array:
            if linear:
                return nn.Dense(channels, dtype=self.dtype, name=name)(y)
            return conv1(channels, self.dtype, name)(y.reshape(shape)).reshape(
                shape[0], -1, channels
            )

        y = normed(group_norm(self.config.norm_num_groups, _ATTENTION_EPS, self.dtype, "norm"), x)
        y = project(y.reshape(shape[0], -1, channels), "proj_in")
        y = BasicTransformerBlock(
            self.heads,
            self.config.cross_attention_dim,
            f"{self.layer}.transformer_blocks.0",
            dtype=self.dtype,
            name="transformer_blocks.0",
        )(y, sources)
        return x + project(y, "proj_out").reshape(shape)


REMAT = ("none", "transformers", "blocks")
"""What the backward pass recomputes from its input to save memory: nothing, every transformer
(which hold nearly all stored activations), or every transformer and resnet."""


class UNet2DConditionModel(nn.Module):
    """ε_θ(z_t, t, sources): predicts the noise (or v) in the latents.

    Parameter names are exactly those of diffusers. The text's keys and values are computed outside,
    by ``project_keys_values(text_kernels(params, config), tokens)``.

    Attributes:
      config: sizes.
      dtype: computation dtype; None computes in the wider of the parameters' and the inputs'.
      remat: one of :data:`REMAT`.
    """

    config: UNetConfig
    dtype: jnp.dtype | None = None
    remat: str = "none"

    def _resnet(self, channels: int, name: str) -> ResnetBlock2D:
        config = self.config
        block = nn.remat(ResnetBlock2D) if self.remat == "blocks" else ResnetBlock2D
        return block(channels, config.norm_num_groups, config.norm_eps, dtype=self.dtype, name=name)

    def _transformer(self, heads: int, layer: str, name: str) -> Transformer2DModel:
        block = Transformer2DModel if self.remat == "none" else nn.remat(Transformer2DModel)
        return block(heads, self.config, layer, dtype=self.dtype, name=name)

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B h w C"],
        t: Int[Array, " B"] | Float[Array, " B"],
        sources: Sequence[Source],
    ) -> Float[Array, "B h w K"]:
        """Predicts the noise (or v), float32.

        Args:
          latents: z_t ``[B, h, w, C]``; h and w divide by 2 to the number of downsamplings.
          t: diffusion step of each example ``[B]``.
          sources: keys and values that the cross-attention layers attend to.

        Returns:
          ``[B, h, w, K]``.

        Raises:
          ValueError: h or w does not divide.
        """
        config, channels = self.config, self.config.block_out_channels
        sources = tuple(sources)
        levels = len(channels)
        if latents.shape[1] % 2 ** (levels - 1) or latents.shape[2] % 2 ** (levels - 1):
            raise ValueError(f"latents {latents.shape}: sides must divide by {2 ** (levels - 1)}")
        sinusoids = timestep_embedding(t, channels[0], config.flip_sin_to_cos, config.freq_shift)
        time = TimestepEmbedding(4 * channels[0], dtype=self.dtype, name="time_embedding")(
            sinusoids.astype(self.dtype or latents.dtype)
        )

        x = conv3(channels[0], self.dtype, "conv_in")(latents)
        skips = [x]
        for level, kind in enumerate(config.down_block_types):
            block = f"down_blocks.{level}"
            for i in range(config.layers_per_block):
                x = self._resnet(channels[level], f"{block}.resnets.{i}")(x, time)
                if kind == "CrossAttnDownBlock2D":
                    name = f"{block}.attentions.{i}"
                    x = self._transformer(config.heads[level], name, name)(x, sources)
                skips.append(x)
            if level < levels - 1:
                x = Downsample2D(dtype=self.dtype, name=f"{block}.downsamplers.0")(x)
                skips.append(x)

        x = self._resnet(channels[-1], "mid_block.resnets.0")(x, time)
        name = "mid_block.attentions.0"
        x = self._transformer(config.heads[-1], name, name)(x, sources)
        x = self._resnet(channels[-1], "mid_block.resnets.1")(x, time)

        for level, kind in enumerate(config.up_block_types):
            block, down = f"up_blocks.{level}", levels - 1 - level
            for i in range(config.layers_per_block + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self._resnet(channels[down], f"{block}.resnets.{i}")(x, time)
                if kind == "CrossAttnUpBlock2D":
                    name = f"{block}.attentions.{i}"
                    x = self._transformer(config.heads[down], name, name)(x, sources)
            if level < levels - 1:
                x = Upsample2D(dtype=self.dtype, name=f"{block}.upsamplers.0")(x)

        x = nn.silu(
            group_norm(config.norm_num_groups, config.norm_eps, self.dtype, "conv_norm_out")(x)
        )
        return conv3(config.out_channels, self.dtype, "conv_out")(x).astype(jnp.float32)


def cross_attention_layers(config: UNetConfig) -> tuple[str, ...]:
    """Names of the cross-attention layers in diffusers' order: down, up, mid.

    This is the order of ``attn_processors``, and so of the numbers in IP-Adapter files.
    """
    levels = [
        *(("down_blocks", i, kind, 0) for i, kind in enumerate(config.down_block_types)),
        *(("up_blocks", i, kind, 1) for i, kind in enumerate(config.up_block_types)),
    ]
    blocks = [
        f"{side}.{i}.attentions.{j}"
        for side, i, kind, extra in levels
        if kind.startswith("CrossAttn")
        for j in range(config.layers_per_block + extra)
    ]
    return tuple(
        f"{block}.transformer_blocks.0.attn2" for block in (*blocks, "mid_block.attentions.0")
    )


def text_kernels(params: Mapping, config: UNetConfig) -> KernelTree:
    """The W_k and W_v that a UNet applies to text, ``{layer: {"to_k": …, "to_v": …}}``."""

    def kernels(layer: str) -> dict:
        node = params
        block, _, inner = layer.partition(".transformer_blocks.0.")
        for part in (block, "transformer_blocks.0", inner):
            node = node[part]
        return {name: node[name] for name in ("to_k", "to_v")}

    return {layer: kernels(layer) for layer in cross_attention_layers(config)}
