"""The adapter: embeddings of photos → image tokens → keys and values (IP-Adapter §3.2).

The parameters determine how tokens are made: by a linear map of one embedding (the plain layout),
or by a resampler (the Plus layout) over a set of embeddings or over the patches of each photo.
"""

from collections.abc import Mapping
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from persona_jax.models import resampler
from persona_jax.models.aggregators import UNPOOLED, Aggregator
from persona_jax.models.attention import KernelTree, LayerName, Source, project_keys_values

TOKENS = 4
"""Image tokens M of the plain IP-Adapter layout; programs that load it hard-code this number."""


class ImageProjection(nn.Module):
    """Linear to M tokens, then LayerNorm; IP-Adapter's ``image_proj``."""

    token_dim: int
    tokens: int = TOKENS
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, embedding: Float[Array, "B D"]) -> Float[Array, "B M E"]:
        """[B, D] → [B, M, token_dim]."""
        x = nn.Dense(self.tokens * self.token_dim, dtype=self.dtype, name="proj")(embedding)
        x = x.reshape(len(x), self.tokens, self.token_dim)
        norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="norm")
        return norm(x)


@struct.dataclass
class Adapter:
    """The trainable parameters, and the aggregator that they belong to.

    Attributes:
      aggregator: combines the embeddings of a set of photos.
      params: as from :func:`init`.
      blank: the image encoder's patches ``[L, D]`` of an all-zero image, where the adapter reads
        patches ("plus"); None for all other kinds.
    """

    aggregator: Aggregator = struct.field(pytree_node=False)
    params: Mapping
    blank: Float[Array, "L D"] | None = None


def init(
    key: Array, aggregator: Aggregator, embedding_dim: int, token_dim: int, kernels: KernelTree
) -> dict:
    """Initial parameters of an adapter.

    Args:
      key: randomness of the projection and the aggregator.
      aggregator: combines the embeddings of a set of photos.
      embedding_dim: D of the reference embeddings.
      token_dim: the UNet's cross-attention dimension.
      kernels: the UNet's text W_k, W_v (:func:`persona_jax.models.unet.text_kernels`); W'_k, W'_v
        start as float32 copies of them.

    Returns:
      ``{"image_proj": …, "ip_adapter": {layer: {"to_k", "to_v"}}, "aggregator": …}``.
    """
    project_key, aggregator_key = jax.random.split(key)
    if aggregator.kind in UNPOOLED:
        inputs = jnp.zeros((1, 1, embedding_dim)), jnp.ones((1, 1))
        projection = resampler.for_tokens(token_dim).init(project_key, *inputs)
    else:
        projection = ImageProjection(token_dim).init(project_key, jnp.zeros((1, embedding_dim)))
    return {
        "image_proj": projection["params"],
        "ip_adapter": jax.tree.map(lambda x: jnp.array(x, jnp.float32), dict(kernels)),
        "aggregator": aggregator.init(aggregator_key, embedding_dim),
    }


def aggregate(
    params: Mapping,
    aggregator: Aggregator,
    embeddings: Float[Array, "B N *D"],
    weights: Float[Array, "B N"],
) -> Float[Array, "B ..."]:
    """The image condition c_image of each set.

    Args:
      params: the adapter's, as from :func:`init`.
      aggregator: the one that `params` belong to.
      embeddings: of the photos ``[B, N, D]``, or their patches ``[B, N, L, D]``.
      weights: of the photos ``[B, N]``; 0 removes one.

    Returns:
      ``[B, D]``, zero for an empty set. Aggregators that do not pool return `embeddings`.
    """
    return aggregator.apply(params["aggregator"], embeddings, weights)


def unconditional(
    image: Float[Array, "B ..."], blank: Float[Array, "L D"] | None = None
) -> Float[Array, "B ..."]:
    """The unconditional counterpart of `image`: zeros, or `blank` where photos are patches (see
    :class:`Adapter`)."""
    return jnp.zeros_like(image) if blank is None else jnp.broadcast_to(blank, image.shape)


def image_tokens(
    projection: Mapping,
    image: Float[Array, "B *N D"],
    weights: Float[Array, "B N"] | None = None,
    dtype: jnp.dtype | None = None,
) -> tuple[Float[Array, "B M E"], Float[Array, "B M"] | None]:
    """Image tokens, and the bias of their keys.

    Args:
      projection: the adapter's ``image_proj``.
      image: one embedding per example ``[B, D]``; or N of them ``[B, N, D]``, which a linear map
        turns into tokens one by one and a resampler reads as a set; or the patches of N photos
        ``[B, N, L, D]``, which a resampler reads photo by photo.
      weights: of the N photos ``[B, N]``; None weighs all equally.
      dtype: to compute in.

    Returns:
      Tokens ``[B, M, E]``, and a bias ``[B, M]`` that applies `weights` to the tokens of each
      photo; None where there are no weights or the resampler has applied them.
    """
    network: ImageProjection | resampler.Resampler
    if "latents" not in projection:
        token_dim = projection["norm"]["scale"].shape[0]
        count = projection["proj"]["kernel"].shape[1] // token_dim
        network = ImageProjection(token_dim, count, dtype=dtype)
        out = network.apply({"params": projection}, image.reshape(-1, image.shape[-1]))
        one_by_one = image.ndim == 3
    else:
        network, one_by_one = resampler.of_params(projection, dtype), image.ndim == 4
        rows = image.reshape(-1, *image.shape[-2:])
        unweighted = one_by_one or weights is None
        counts = jnp.ones(rows.shape[:2]) if unweighted else weights
        out = network.apply({"params": projection}, rows, counts)
    tokens = cast(Array, out)  # apply returns a tuple where collections are mutable
    bias = None
    if one_by_one and weights is not None:
        # -1e9, not -inf: the softmax of an empty set must not be NaN.
        logs = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), -1e9)
        bias = jnp.repeat(logs, tokens.shape[1], axis=1)
    return tokens.reshape(len(image), -1, tokens.shape[-1]), bias


def source(
    params: Mapping,
    image: Float[Array, "B *N D"],
    scale: Float[Array, "..."] | float | Mapping[LayerName, Array | float] = 1.0,
    dtype: jnp.dtype | None = None,
    weights: Float[Array, "B N"] | None = None,
) -> Source:
    """Keys and values of the image tokens for every cross-attention layer, at scale λ.

    A row of zeros is the unconditional branch. It still makes tokens, as in IP-Adapter.

    Args:
      params: the adapter's, as from :func:`init`.
      image: as in :func:`image_tokens`.
      scale: λ; see :class:`persona_jax.models.attention.Source`.
      dtype: to compute in.
      weights: as in :func:`image_tokens`.
    """
    tokens, bias = image_tokens(params["image_proj"], image, weights, dtype)
    return Source(*project_keys_values(params["ip_adapter"], tokens), bias=bias, scale=scale)
