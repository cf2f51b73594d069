"""Aggregators: a set of reference embeddings [B, N, D] with weights [B, N] → one [B, D].

A weight of 0 removes a photo; weight w counts it w times. The empty set gives exactly the zero
vector, which is IP-Adapter's unconditional branch (docs/design.md, "Sets and masks").
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from persona_jax.errors import UserError
from persona_jax.models.attention import merge_heads, split_heads


def _zero_if_empty(x: Array, weights: Array) -> Array:
    # where, not a product: 0 · x is −0 or NaN for some x.
    return jnp.where((weights > 0).any(axis=1, keepdims=True), x, 0.0)


def _shares(weights: Array) -> Array:
    total = weights.sum(axis=1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def first(embeddings: Float[Array, "B N D"], weights: Float[Array, "B N"]) -> Float[Array, "B D"]:
    """The embedding of the first photo whose weight is not 0, as in the plain IP-Adapter."""
    present = weights > 0
    index = jnp.argmax(present, axis=1)
    chosen = jnp.take_along_axis(embeddings, index[:, None, None], axis=1)[:, 0]
    return _zero_if_empty(chosen, weights)


def maximum(embeddings: Float[Array, "B N D"], weights: Float[Array, "B N"]) -> Float[Array, "B D"]:
    """The largest value of each feature over the photos whose weight is not 0."""
    present = weights > 0
    largest = jnp.where(present[..., None], embeddings, -jnp.inf).max(axis=1)
    return _zero_if_empty(largest, weights)


def average(embeddings: Float[Array, "B N D"], weights: Float[Array, "B N"]) -> Float[Array, "B D"]:
    """Σ w x / Σ w."""
    return _zero_if_empty(jnp.einsum("bn,bnd->bd", _shares(weights), embeddings), weights)


def weighted_softmax(
    logits: Float[Array, "B H Q N"], weights: Float[Array, "B N"]
) -> Float[Array, "B H Q N"]:
    """softmax(logits + log w) over N, float32.

    Weight 2 equals listing the key twice; weight 0 removes it. If all are removed, the result is
    zero.
    """
    weights = weights[:, None, None, :]
    logits = jnp.where(weights > 0, logits.astype(jnp.float32), -jnp.inf)
    peak = logits.max(axis=-1, keepdims=True)
    odds = weights * jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = odds.sum(axis=-1, keepdims=True)
    return odds / jnp.where(total > 0, total, 1.0)


def _norm(name: str, dtype: jnp.dtype | None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)


class SetBlock(nn.Module):
    """Pre-norm transformer block over a set, without positions.

    The last kernel of both residual branches starts at zero, so the block starts as the identity.
    """

    heads: int
    width: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], weights: Float[Array, "B N"]
    ) -> Float[Array, "B N D"]:
        """[B, N, D] → [B, N, D]."""
        if self.width % self.heads:
            raise UserError(f"aggregator: {self.heads} heads do not divide width={self.width}")
        y = _norm("norm1", self.dtype)(x)
        q, k, v = (
            split_heads(
                nn.Dense(self.width, use_bias=False, dtype=self.dtype, name=name)(y), self.heads
            )
            for name in ("to_q", "to_k", "to_v")
        )
        logits = jnp.einsum("bqhd,bnhd->bhqn", q, k) * q.shape[-1] ** -0.5
        mixed = jnp.einsum("bhqn,bnhd->bqhd", weighted_softmax(logits, weights).astype(v.dtype), v)
        x += self._zero_dense(x.shape[-1], "to_out")(merge_heads(mixed))
        y = nn.Dense(4 * self.width, dtype=self.dtype, name="fc1")(_norm("norm2", self.dtype)(x))
        return x + self._zero_dense(x.shape[-1], "fc2")(nn.gelu(y))

    def _zero_dense(self, features: int, name: str) -> nn.Dense:
        zeros = nn.initializers.zeros
        return nn.Dense(features, kernel_init=zeros, dtype=self.dtype, name=name)


def _identity(key: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> Array:
    return jnp.eye(*shape, dtype=dtype)


def agreement(
    embeddings: Float[Array, "B N D"], weights: Float[Array, "B N"]
) -> Float[Array, "B N"]:
    """Weighted mean cosine similarity of each photo to all photos of its set, in [−1, 1].

    The mean includes the photo itself; without it, listing every photo twice would change the
    result. For n photos of equal weight it is (1 + (n − 1) · mean over the others) / n, which gives
    the same order as the mean over the others.
    """
    squares = (embeddings.astype(jnp.float32) ** 2).sum(axis=-1, keepdims=True)
    unit = embeddings * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
    return jnp.einsum("bnd,bd->bn", unit, jnp.einsum("bn,bnd->bd", _shares(weights), unit))


CONSENSUS = 20.0
"""Factor of :func:`agreement` in the pooling logits. At β = 1 (:class:`AttentionPooling`) a photo
whose mean cosine is lower by 0.1 gets a seventh of the share (e⁻²)."""


class AttentionPooling(nn.Module):
    """Attention pooling over a set with one learned query per head.

    Each head pools its own slice of a linear map of the features, so that different features may
    be taken from different photos.

    logits_h = q_h · k_h / √d + 20 β_h · agreement. The second term gives more weight to photos that
    agree with the others, which suppresses a photo of another person.

    Queries and β start at zero (all photos weigh the same) and the linear map as the identity, so
    pooling starts as the average. Keys start at random: with queries and keys both at zero there
    would be no gradient.
    """

    heads: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self,
        seen: Float[Array, "B N D"],
        x: Float[Array, "B N D"],
        weights: Float[Array, "B N"],
    ) -> tuple[Float[Array, "B D"], Float[Array, "B H N"]]:
        """Pools a set.

        Args:
          seen: features that the keys are computed from ``[B, N, D]``.
          x: features that are pooled ``[B, N, D]``.
          weights: of the photos ``[B, N]``.

        Returns:
          Pooled features ``[B, D]``, and the share of each photo in each head ``[B, H, N]``.
        """
        dim = x.shape[-1]
        if dim % self.heads:
            raise UserError(f"aggregator: {self.heads} pooling heads do not divide D={dim}")
        # No bias in the norm: it adds the same to every photo's logit, which the softmax cancels.
        norm = nn.LayerNorm(epsilon=1e-5, use_bias=False, dtype=self.dtype, name="norm")
        keys = nn.Dense(dim, use_bias=False, dtype=self.dtype, name="to_k")(norm(seen))
        query = self.param("query", nn.initializers.zeros, (self.heads, dim // self.heads))
        trust = self.param("consensus", nn.initializers.zeros, (self.heads,))
        # Agreement is appended to each key as a feature, and 20 β to each query.
        shared = jnp.broadcast_to(
            agreement(x, weights)[:, :, None, None], (*keys.shape[:2], self.heads, 1)
        )
        keys = jnp.concatenate([split_heads(keys, self.heads), shared.astype(keys.dtype)], axis=-1)
        query = jnp.concatenate(
            [query * (dim // self.heads) ** -0.5, CONSENSUS * trust[:, None]], axis=-1
        )
        logits = jnp.einsum("hd,bnhd->bhn", query, keys)
        shares = weighted_softmax(logits[:, :, None, :], weights)[:, :, 0]
        values = split_heads(
            nn.Dense(dim, use_bias=False, kernel_init=_identity, dtype=self.dtype, name="to_v")(x),
            self.heads,
        )
        pooled = jnp.einsum("bhn,bnhd->bhd", shares.astype(x.dtype), values)
        return _zero_if_empty(pooled.reshape(x.shape[0], dim), weights), shares


class SelfAttentionAggregator(nn.Module):
    """Self-attention over the set computes pooling weights for the photos' own embeddings.

    It starts exactly as `average`. The outputs of the transformer blocks only set the weights and
    are not pooled: when they were, the blocks overfitted to two thousand training people and were
    no better than the average on unseen ones.
    """

    depth: int = 2
    heads: int = 8
    width: int = 512
    pooling_heads: int = 8
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self, embeddings: Float[Array, "B N D"], weights: Float[Array, "B N"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B H N"]]:
        """[B, N, D], weights [B, N] → aggregate [B, D] and pooling shares [B, H, N]."""
        seen = embeddings
        for i in range(self.depth):
            block = SetBlock(self.heads, self.width, dtype=self.dtype, name=f"blocks.{i}")
            seen = block(seen, weights)
        pool = AttentionPooling(self.pooling_heads, dtype=self.dtype, name="pool")
        return pool(seen, embeddings, weights)


class AverageMLP(nn.Module):
    """The average, followed by residual MLP blocks: a control for the self-attention aggregator.

    It has about as many parameters as a :class:`SelfAttentionAggregator` of the same depth and
    width, to separate the effect of attention from that of parameters. It starts exactly as
    `average`.
    """

    depth: int = 2
    width: int = 512
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self, embeddings: Float[Array, "B N D"], weights: Float[Array, "B N"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B 1 N"]]:
        """[B, N, D], weights [B, N] → [B, D] and the share of each photo [B, 1, N]."""
        x, dim = average(embeddings, weights), embeddings.shape[-1]
        # As many parameters as attention: 12 D · width per block, and 2 D² in the pooling.
        hidden = 6 * self.width + dim // self.depth
        for i in range(self.depth):
            y = _norm(f"blocks.{i}.norm", self.dtype)(x)
            y = nn.gelu(nn.Dense(hidden, dtype=self.dtype, name=f"blocks.{i}.fc1")(y))
            x += nn.Dense(
                dim,
                kernel_init=nn.initializers.zeros,
                dtype=self.dtype,
                name=f"blocks.{i}.fc2",
            )(y)
        return _zero_if_empty(x, weights), _shares(weights)[:, None]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of aggregator: an entry of :data:`KINDS`.

    Attributes:
      gives: the adapter's input, for the README of exported files.
      pool: embeddings ``[B, N, D]``, weights ``[B, N]`` → ``[B, D]``; None for other kinds.
      network: the Flax module of a kind with parameters; None for other kinds.
      sizes: the config's settings that the module takes.
      layout: of the exported file. Kinds of the Plus layout do not pool: the resampler reads the
        set, or the patches of each photo.
      patches: whether the input is patches of each photo instead of one embedding.
      exported: False for a control for comparisons.
      probed: whether :mod:`persona_jax.probe` measures it.
    """

    gives: str
    pool: Callable[[Array, Array], Array] | None = None
    network: type[nn.Module] | None = None
    sizes: tuple[str, ...] = ()
    layout: Literal["plain", "Plus"] = "plain"
    patches: bool = False
    exported: bool = True
    probed: bool = True


KINDS = {
    "first": Kind("the first photo alone", pool=first),
    "max": Kind("the element-wise maximum of the photos' embeddings", pool=maximum),
    "avg": Kind("the average of the photos' embeddings", pool=average),
    "self_attention": Kind(
        "self-attention over the set of the photos' embeddings",
        network=SelfAttentionAggregator,
        sizes=("depth", "heads", "width", "pooling_heads"),
    ),
    "avg_mlp": Kind(
        "a network on the average of the photos' embeddings",
        network=AverageMLP,
        sizes=("depth", "width"),
        exported=False,
        probed=False,
    ),
    "resampler": Kind(
        "the set of the photos' embeddings, which its resampler reads together",
        layout="Plus",
        probed=False,
    ),
    "plus": Kind(
        "photos, whose patches its resampler reads one photo after the other",
        layout="Plus",
        patches=True,
        probed=False,
    ),
}
"""By their name in configs (``aggregator.kind``)."""

FIXED = {name: kind.pool for name, kind in KINDS.items() if kind.pool}
LEARNT = tuple(name for name, kind in KINDS.items() if kind.network)
UNPOOLED = tuple(name for name, kind in KINDS.items() if kind.layout == "Plus")


def known_kind(name: str) -> Kind:
    """The entry of a name. Raises UserError where there is none."""
    if name not in KINDS:
        raise UserError(f"aggregator.kind={name!r}; known: {', '.join(KINDS)}")
    return KINDS[name]


def build(kind: str, settings: Mapping[str, Any]) -> "Aggregator":
    """An aggregator by its name; `settings` have the sizes that :data:`KINDS` names.

    Raises:
      UserError: an unknown kind.
    """
    entry = known_kind(kind)
    if entry.layout == "Plus":
        return EveryPhoto(kind)
    if entry.network is None:
        return Aggregator(kind)
    return Aggregator(kind, entry.network(**{name: settings[name] for name in entry.sizes}))


@dataclasses.dataclass(frozen=True)
class Aggregator:
    """An aggregator by name: its parameters, if any, and how it is applied.

    Attributes:
      kind: one of :data:`KINDS`.
      module: the network of those that learn; None for the others.
    """

    kind: str
    module: nn.Module | None = None

    def __post_init__(self):
        """Raises UserError for an unknown kind, or for one with parameters without its module."""
        if known_kind(self.kind).network and self.module is None:
            raise UserError(f"aggregator.kind={self.kind}: its module is missing; use build")

    def init(self, key: Array, dim: int) -> dict:
        """Initial parameters for embeddings of `dim` features; empty if it has none."""
        if self.module is None:
            return {}
        return self.module.init(key, jnp.zeros((1, 1, dim)), jnp.ones((1, 1)))["params"]

    def apply(
        self, params: dict, embeddings: Float[Array, "B N *D"], weights: Float[Array, "B N"]
    ) -> Float[Array, "B ..."]:
        """[B, N, D], weights [B, N] → [B, D]; :data:`UNPOOLED` kinds return `embeddings`."""
        entry = KINDS.get(self.kind)
        if entry and entry.pool:
            return entry.pool(embeddings, weights)
        if self.module is None:
            return embeddings
        pooled, _ = self.module.apply({"params": params}, embeddings, weights)
        return pooled


@dataclasses.dataclass(frozen=True)
class EveryPhoto(Aggregator):
    """No aggregation: n photos make 4·n image tokens under one softmax, as diffusers does with
    several images. For sampling an adapter of one photo with sets."""

    kind: str = "every"

    def __post_init__(self):
        """Accepts any kind: configs cannot name this one."""
