"""The resampler of IP-Adapter-Plus (a perceiver, Jaegle et al. 2021): a sequence → M tokens."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from persona_jax.models.aggregators import weighted_softmax
from persona_jax.models.attention import merge_heads, split_heads

DEPTH, TOKENS, HEAD = 4, 16, 64
"""Blocks, tokens M and head size of the published layout. diffusers supports no other depth and no
other head size."""


class PerceiverAttention(nn.Module):
    """Latents attend to the sequence and to themselves; parameters have the published names."""

    inner: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N E"],
        latents: Float[Array, "B M E"],
        weights: Float[Array, "B N"],
    ) -> Float[Array, "B M E"]:
        """[B, N, E], latents [B, M, E] and weights [B, N] → [B, M, E]."""
        x, latents = _norm("norm1", self.dtype)(x), _norm("norm2", self.dtype)(latents)
        heads, sequence = self.inner // HEAD, jnp.concatenate([x, latents], axis=1)
        q = split_heads(_dense(self.inner, "to_q", self.dtype)(latents), heads)
        k, v = jnp.split(_dense(2 * self.inner, "to_kv", self.dtype)(sequence), 2, axis=-1)
        k, v = split_heads(k, heads), split_heads(v, heads)
        logits = jnp.einsum("bqhd,bnhd->bhqn", q, k) * HEAD**-0.5
        counts = jnp.concatenate([weights, jnp.ones(latents.shape[:2], weights.dtype)], axis=1)
        mixed = jnp.einsum("bhqn,bnhd->bqhd", weighted_softmax(logits, counts).astype(v.dtype), v)
        return _dense(latents.shape[-1], "to_out", self.dtype)(merge_heads(mixed))


class FeedForward(nn.Module):
    """LayerNorm, linear, GELU, linear; the layers are numbered as in the published layout."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B M E"]) -> Float[Array, "B M E"]:
        """[B, M, E] → [B, M, E]."""
        dim = x.shape[-1]
        y = _dense(4 * dim, "1", self.dtype)(_norm("0", self.dtype)(x))
        return _dense(dim, "3", self.dtype)(nn.gelu(y, approximate=False))


class Resampler(nn.Module):
    """M learned latents attend to a sequence ``[B, N, D]``.

    A weight of 0 hides a member of the sequence; weight w counts it w times. In IP-Adapter-Plus the
    sequence is the patches of one photo; here it may also be the embeddings of a set of photos.
    """

    token_dim: int
    width: int
    inner: int
    tokens: int = TOKENS
    depth: int = DEPTH
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], weights: Float[Array, "B N"]
    ) -> Float[Array, "B M E"]:
        """[B, N, D], weights [B, N] → [B, M, token_dim]."""
        start = nn.initializers.normal(self.width**-0.5)
        latents = self.param("latents", start, (1, self.tokens, self.width))
        x = nn.Dense(self.width, dtype=self.dtype, name="proj_in")(x)
        latents = jnp.broadcast_to(latents, (len(x), *latents.shape[1:])).astype(x.dtype)
        for i in range(self.depth):
            attend = PerceiverAttention(self.inner, dtype=self.dtype, name=f"layers.{i}.0")
            latents += attend(x, latents, weights)
            latents += FeedForward(dtype=self.dtype, name=f"layers.{i}.1")(latents)
        out = nn.Dense(self.token_dim, dtype=self.dtype, name="proj_out")(latents)
        return _norm("norm_out", self.dtype)(out)


def for_tokens(token_dim: int) -> Resampler:
    """A resampler for a UNet of this cross-attention dimension. Its width is the same dimension, as
    in the published ones for Stable Diffusion 1.5."""
    return Resampler(token_dim, width=token_dim, inner=HEAD * max(1, token_dim // HEAD))


def of_params(params: Mapping, dtype: jnp.dtype | None = None) -> Resampler:
    """The resampler that these parameters belong to."""
    _, tokens, width = params["latents"].shape
    return Resampler(
        token_dim=params["norm_out"]["scale"].shape[0],
        width=width,
        inner=params["layers.0.0"]["to_q"]["kernel"].shape[1],
        tokens=tokens,
        depth=sum(name.endswith(".0") for name in params if name.startswith("layers.")),
        dtype=dtype,
    )


def _norm(name: str, dtype: jnp.dtype | None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)


def _dense(features: int, name: str, dtype: jnp.dtype | None) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=dtype, name=name)
