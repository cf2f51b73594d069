"""The adapter: an aggregated embedding → image tokens → keys and values (IP-Adapter §3.2)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from persona_jax.models.aggregators import Aggregator
from persona_jax.models.attention import KernelTree, LayerName, Source, project_keys_values

TOKENS = 4
"""Image tokens M of the plain IP-Adapter layout; its readers hard-code it."""


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


def init(
    key: Array, aggregator: Aggregator, embedding_dim: int, token_dim: int, kernels: KernelTree
) -> dict:
    """A fresh adapter.

    Args:
      key: randomness of the projection and the aggregator.
      aggregator: what reads the set.
      embedding_dim: D of the reference embeddings.
      token_dim: the UNet's cross-attention dimension.
      kernels: the UNet's text W_k, W_v (:func:`persona_jax.models.unet.text_kernels`); W'_k, W'_v
        start as float32 copies of them.

    Returns:
      ``{"image_proj": …, "ip_adapter": {layer: {"to_k", "to_v"}}, "aggregator": …}``.
    """
    project_key, aggregator_key = jax.random.split(key)
    projection = ImageProjection(token_dim).init(project_key, jnp.zeros((1, embedding_dim)))
    return {
        "image_proj": projection["params"],
        "ip_adapter": jax.tree.map(lambda x: jnp.array(x, jnp.float32), dict(kernels)),
        "aggregator": aggregator.init(aggregator_key, embedding_dim),
    }


def aggregate(
    params: Mapping,
    aggregator: Aggregator,
    embeddings: Float[Array, "B N D"],
    weights: Float[Array, "B N"],
) -> Float[Array, "B *N D"]:
    """c_image of each set ``[B, D]``, zero for an empty one; ``[B, N, D]`` of EveryPhoto."""
    return aggregator.apply(params["aggregator"], embeddings, weights)


def source(
    params: Mapping,
    image: Float[Array, "B *N D"],
    scale: Float[Array, "..."] | float | Mapping[LayerName, Array | float] = 1.0,
    dtype: jnp.dtype | None = None,
) -> Source:
    """The source of keys and values of embeddings, at scale λ: of one aggregate ``[B, D]``, or of
    several side by side ``[B, N, D]``, each with tokens of its own.

    A zero row is the unconditional branch: it still makes tokens, as stock IP-Adapter does.
    """
    token_dim = params["image_proj"]["norm"]["scale"].shape[0]
    tokens = params["image_proj"]["proj"]["kernel"].shape[1] // token_dim
    projection = ImageProjection(token_dim, tokens, dtype=dtype)
    rows = image.reshape(-1, image.shape[-1])
    tokens = projection.apply({"params": params["image_proj"]}, rows)
    tokens = tokens.reshape(len(image), -1, token_dim)
    return Source(*project_keys_values(params["ip_adapter"], tokens), scale=scale)
