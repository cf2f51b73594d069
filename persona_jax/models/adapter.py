"""The adapter: embeddings of photos → image tokens → keys and values (IP-Adapter §3.2).

What makes the tokens is told by the parameters: a linear map of one embedding (the plain layout),
or a resampler (the Plus layout), which reads a set of embeddings, or the patches of each photo.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from persona_jax.models import resampler
from persona_jax.models.aggregators import UNPOOLED, Aggregator
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


@struct.dataclass
class Adapter:
    """What is learnt, and how it is read.

    Attributes:
      aggregator: what reads the set.
      params: as from :func:`init`.
      blank: what the eye makes of no picture, ``[L, D]``, where it gives a photo's patches; None
        elsewhere.
    """

    aggregator: Aggregator = struct.field(pytree_node=False)
    params: Mapping
    blank: Float[Array, "L D"] | None = None


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
    if aggregator.kind in UNPOOLED:
        nothing = jnp.zeros((1, 1, embedding_dim)), jnp.ones((1, 1))
        projection = resampler.for_tokens(token_dim).init(project_key, *nothing)
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
    """c_image of each set ``[B, D]``, zero for an empty one; of aggregators that pool nothing, the
    embeddings as they are."""
    return aggregator.apply(params["aggregator"], embeddings, weights)


def unconditional(
    image: Float[Array, "B ..."], blank: Float[Array, "L D"] | None = None
) -> Float[Array, "B ..."]:
    """What stands in place of `image` where there is no condition: zero; where photos are patches,
    those of no picture (see :class:`Adapter`)."""
    return jnp.zeros_like(image) if blank is None else jnp.broadcast_to(blank, image.shape)


def image_tokens(
    projection: Mapping,
    image: Float[Array, "B *N D"],
    weights: Float[Array, "B N"] | None = None,
    dtype: jnp.dtype | None = None,
) -> tuple[Float[Array, "B M E"], Float[Array, "B M"] | None]:
    """Image tokens, and their key bias, or None.

    Args:
      projection: the adapter's ``image_proj``.
      image: one embedding each ``[B, D]``; or N of them ``[B, N, D]``, which a linear map turns
        into tokens one by one and a resampler reads as a set; or N photos' patches
        ``[B, N, L, D]``, which a resampler reads photo by photo.
      weights: of the N photos ``[B, N]``; None counts all.
      dtype: to compute in.
    """
    if "latents" not in projection:
        token_dim = projection["norm"]["scale"].shape[0]
        tokens = projection["proj"]["kernel"].shape[1] // token_dim
        network = ImageProjection(token_dim, tokens, dtype=dtype)
        made = network.apply({"params": projection}, image.reshape(-1, image.shape[-1]))
        one_by_one = image.ndim == 3
    else:
        network, one_by_one = resampler.of_params(projection, dtype), image.ndim == 4
        rows = image.reshape(-1, *image.shape[-2:])
        alike = one_by_one or weights is None
        counts = jnp.ones(rows.shape[:2]) if alike else weights
        made = network.apply({"params": projection}, rows, counts)
    bias = None
    if one_by_one and weights is not None:
        # Finite, for sets of which nothing is left.
        logs = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), -1e9)
        bias = jnp.repeat(logs, made.shape[1], axis=1)
    return made.reshape(len(image), -1, made.shape[-1]), bias


def source(
    params: Mapping,
    image: Float[Array, "B *N D"],
    scale: Float[Array, "..."] | float | Mapping[LayerName, Array | float] = 1.0,
    dtype: jnp.dtype | None = None,
    weights: Float[Array, "B N"] | None = None,
) -> Source:
    """The source of keys and values of :func:`image_tokens`, at scale λ.

    A zero row is the unconditional branch: it still makes tokens, as stock IP-Adapter does.
    """
    tokens, bias = image_tokens(params["image_proj"], image, weights, dtype)
    return Source(*project_keys_values(params["ip_adapter"], tokens), bias=bias, scale=scale)
