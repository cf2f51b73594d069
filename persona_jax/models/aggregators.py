"""Aggregators: a set of reference embeddings [B, N, D] with weights [B, N] → one [B, D].

A weight of 0 removes a photo everywhere, weight w counts it w times, and the empty set gives
exactly the zero vector, which is the unconditional branch of stock IP-Adapter (docs/design.md,
"Sets and masks").
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
    # Chosen, not multiplied: 0 · x would be −0 or NaN for some x.
    return jnp.where((weights > 0).any(axis=1, keepdims=True), x, 0.0)


def _shares(weights: Array) -> Array:
    total = weights.sum(axis=1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def first(embeddings: Float[Array, "B N D"], weights: Float[Array, "B N"]) -> Float[Array, "B D"]:
    """The first photo whose weight is not 0: the plain IP-Adapter."""
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
    """softmax(logits + log w) over N, float32: weight 2 equals listing the key twice, weight 0
    removes it, and when nothing is left the result is all zeros."""
    weights = weights[:, None, None, :]
    logits = jnp.where(weights > 0, logits.astype(jnp.float32), -jnp.inf)
    peak = logits.max(axis=-1, keepdims=True)
    odds = weights * jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = odds.sum(axis=-1, keepdims=True)
    return odds / jnp.where(total > 0, total, 1.0)


def _norm(name: str, dtype: jnp.dtype | None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)


class SetBlock(nn.Module):
    """Pre-norm transformer block over a set, no positions. Both residual branches end in zero
    kernels, so that it starts as the identity."""

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
    """Mean cosine of each photo to all photos of its set, by their weights, in [−1, 1].

    Itself included: of n photos of equal weight this is (1 + (n − 1) · mean over the others) / n,
    which orders them alike; without itself, listing every photo twice would change the result.
    """
    squares = (embeddings.astype(jnp.float32) ** 2).sum(axis=-1, keepdims=True)
    unit = embeddings * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
    return jnp.einsum("bnd,bd->bn", unit, jnp.einsum("bn,bnd->bd", _shares(weights), unit))


CONSENSUS = 20.0
"""Unit of the pooling heads' trust in :func:`agreement`: at 1 a photo whose cosine to the rest is
lower by 0.1 gets a seventh of the share."""


class AttentionPooling(nn.Module):
    """A learned query per head reads the set; each head pools its own slice of a linear map of the
    features, so that each attribute can trust its own photo.

    logits_h = q_h · k_h / √d + 20 β_h · agreement: photos that agree with the rest are trusted,
    which outvotes a photo of somebody else. Queries and β start at zero (every photo counts the
    same), the map as the identity: the average. Keys start at random (with queries and keys at zero
    there would be no gradient).
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
        """`seen`, which decides, and `x`, what is pooled → pooled [B, D] and each head's share per
        photo [B, H, N]."""
        dim = x.shape[-1]
        if dim % self.heads:
            raise UserError(f"aggregator: {self.heads} pooling heads do not divide D={dim}")
        # No bias before the keys either: the same for every photo, the softmax would cancel it.
        norm = nn.LayerNorm(epsilon=1e-5, use_bias=False, dtype=self.dtype, name="norm")
        keys = nn.Dense(dim, use_bias=False, dtype=self.dtype, name="to_k")(norm(seen))
        query = self.param("query", nn.initializers.zeros, (self.heads, dim // self.heads))
        trust = self.param("consensus", nn.initializers.zeros, (self.heads,))
        # Agreement is one more feature of each key, and trust in it one more of each query.
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
    """Transformer blocks over the set say which photo to trust for what; the photos' own embeddings
    are pooled. It starts exactly as `average`.

    What the blocks make of a photo is not pooled itself: free to rewrite embeddings, they learn
    two thousand people by heart and read unseen ones no better than the average does.
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
    """The average, then residual blocks on it, with about as many parameters as a
    :class:`SelfAttentionAggregator` of that depth and width: is it attention that helps, or only
    parameters? It starts exactly as `average`."""

    depth: int = 2
    width: int = 512
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self, embeddings: Float[Array, "B N D"], weights: Float[Array, "B N"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B 1 N"]]:
        """[B, N, D], weights [B, N] → [B, D] and the share of each photo [B, 1, N]."""
        x, dim = average(embeddings, weights), embeddings.shape[-1]
        # 12 D · width a block of attention, and 2 D² in the pool.
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
    """What the package knows of a kind of aggregator: one entry of :data:`KINDS`.

    Attributes:
      gives: what an adapter is given, for the README beside its exported files.
      pool: embeddings ``[B, N, D]``, weights ``[B, N]`` → ``[B, D]``, where nothing is learned.
      network: the module that learns to pool; its sizes are the settings of that name.
      sizes: their names.
      layout: of the exported file. In "Plus" nothing is pooled: what makes the image tokens, a
        resampler, reads the set, or each photo's patches.
      patches: it is given patches of each photo, in place of one embedding.
      exported: whether it is more than a comparison.
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
    """An aggregator by name: what it learns (perhaps nothing) and how it is applied.

    Attributes:
      kind: one of :data:`KINDS`.
      module: the network of those that learn; None for the others.
    """

    kind: str
    module: nn.Module | None = None

    def __post_init__(self):
        """Refuses an unknown kind, and one that learns, without its network."""
        if known_kind(self.kind).network and self.module is None:
            raise UserError(f"aggregator.kind={self.kind}: it has a network, and none was given")

    def init(self, key: Array, dim: int) -> dict:
        """Its parameters for embeddings of `dim` features; empty where nothing is learned."""
        if self.module is None:
            return {}
        return self.module.init(key, jnp.zeros((1, 1, dim)), jnp.ones((1, 1)))["params"]

    def apply(
        self, params: dict, embeddings: Float[Array, "B N *D"], weights: Float[Array, "B N"]
    ) -> Float[Array, "B ..."]:
        """[B, N, D], weights [B, N] → [B, D]; of :data:`UNPOOLED` kinds, the embeddings as they
        are."""
        entry = KINDS.get(self.kind)
        if entry and entry.pool:
            return entry.pool(embeddings, weights)
        if self.module is None:
            return embeddings
        pooled, _ = self.module.apply({"params": params}, embeddings, weights)
        return pooled


@dataclasses.dataclass(frozen=True)
class EveryPhoto(Aggregator):
    """No aggregate at all: every photo makes image tokens of its own, n·4 under one softmax, which
    is what diffusers does with several images. For sampling an adapter of one photo with sets."""

    kind: str = "every"

    def __post_init__(self):
        """Is no kind that configs know."""
