"""Attention, and the sources the UNet attends to (docs/design.md, "Sources of keys and values")."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from persona_jax.models.platforms import platform

LayerName = str
"""Torch path of a cross-attention layer: ``mid_block.attentions.0.transformer_blocks.0.attn2``."""

KernelTree = Mapping[LayerName, Mapping[str, Mapping[str, Array]]]
"""``{layer: {"to_k": {"kernel": [D, C]}, "to_v": {"kernel": [D, C]}}}``, one pair per layer."""

_LONG = 2**20
"""Query–key products per head above which chunked attention is faster on a CPU."""


class LayerSource(NamedTuple):
    """One cross-attention layer's part of a source: keys, values, key bias and scale."""

    keys: Float[Array, "B L C"]
    values: Float[Array, "B L C"]
    bias: Float[Array, "B L"] | None
    scale: Float[Array, "..."] | float


@struct.dataclass
class Source:
    """Keys and values for every cross-attention layer of a UNet, and their scale.

    Attributes:
      keys: per layer ``[B, L, C]``.
      values: per layer ``[B, L, C]``.
      bias: ``[B, L]`` added to every layer's attention logits (log weights; a large negative
        number hides a token), or None.
      scale: λ, broadcast to ``[B, h·w]``: a number or an array, or a mapping of layers to these.
    """

    keys: Mapping[LayerName, Array]
    values: Mapping[LayerName, Array]
    bias: Array | None = None
    scale: Array | float | Mapping[LayerName, Array | float] = 1.0

    def at(self, layer: LayerName) -> LayerSource:
        """The part of this source for `layer`."""
        scale = self.scale[layer] if isinstance(self.scale, Mapping) else self.scale
        return LayerSource(self.keys[layer], self.values[layer], self.bias, scale)


def project_keys_values(
    kernels: KernelTree, tokens: Float[Array, "B L D"]
) -> tuple[dict[LayerName, Array], dict[LayerName, Array]]:
    """K = c W_k and V = c W_v of every layer, of the text (W) or of the adapter (W').

    Args:
      kernels: per layer the two projection kernels ``[D, C]``.
      tokens: c, attended to, ``[B, L, D]``; its dtype is the result's.

    Returns:
      Keys and values, each ``{layer: [B, L, C]}``.
    """

    def project(name: str) -> dict[LayerName, Array]:
        return {
            layer: tokens @ pair[name]["kernel"].astype(tokens.dtype)
            for layer, pair in kernels.items()
        }

    return project("to_k"), project("to_v")


def _softmax_attention(q: Array, k: Array, v: Array, bias: Array | None = None) -> Array:
    return jax.nn.dot_product_attention(q, k, v, bias=bias, implementation="xla")


def _chunked_attention(q: Array, k: Array, v: Array) -> Array:
    """Attention for one (example, head) and 1,024 queries at a time.

    The logits stay in cache: on a CPU this is several times faster at 64×64 latents, and takes far
    less memory. The backward pass recomputes the logits, because storing them takes too much
    memory.
    """
    length = q.shape[1]
    chunk = 1024 if length % 1024 == 0 else length

    def one_head(args: tuple) -> Array:
        queries, keys, values = args

        @jax.checkpoint
        def one_chunk(part: Array) -> Array:
            logits = (part @ keys.T).astype(jnp.float32) * (q.shape[-1] ** -0.5)
            return jax.nn.softmax(logits, axis=-1).astype(values.dtype) @ values

        chunks = queries.reshape(length // chunk, chunk, -1)
        return jax.lax.map(one_chunk, chunks).reshape(length, -1)

    def flat(x: Array) -> Array:
        return x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])

    out = jax.lax.map(one_head, (flat(q), flat(k), flat(v)))
    return out.reshape(q.shape[0], q.shape[2], length, -1).transpose(0, 2, 1, 3)


_FLASH_HEADS = (40, 64, 80, 128)
"""Head sizes for which the TPU kernel is known to compile."""


def _batch_axes() -> tuple[str, ...] | None:
    """The mesh axes that the batch is split over: all axes of the mesh being traced for.

    None if there are several devices and no mesh: the kernel cannot be split among them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return () if jax.device_count() == 1 else None
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    # Inside shard_map (manual axes) the batch is this device's share already.
    return tuple(name for name, kind in kinds if kind != AxisType.Manual)


def _flash_takes(q: Array, k: Array) -> bool:
    axes = _batch_axes()
    if axes is None or q.shape[-1] not in _FLASH_HEADS:
        return False
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axes)
    return q.shape[0] % devices == 0 and q.shape[1] % 1024 == 0 and k.shape[1] % 1024 == 0


def _flash_attention(q: Array, k: Array, v: Array) -> Array:
    """JAX's Pallas kernel for TPUs, which keeps the logits in on-chip memory."""
    block = 512
    sizes = flash_attention.BlockSizes(
        block_b=1,
        **dict.fromkeys(("block_q", "block_k_major", "block_k"), block),
        **{f"block_{name}_dkv": block for name in ("q_major", "k_major", "q", "k")},
        **{f"block_{name}_dq": block for name in ("k_major", "q", "k")},
    )

    def kernel(q: Array, k: Array, v: Array) -> Array:
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        out = flash_attention.flash_attention(
            q, k, v, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes
        )
        return out.transpose(0, 2, 1, 3)

    axes = _batch_axes()
    if not axes:
        return kernel(q, k, v)
    spec = PartitionSpec(axes)
    # check_vma=False: the kernel does not annotate how its outputs vary over the mesh.
    shared = jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return shared(q, k, v)


def _ampere_or_later() -> bool:
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major = capability.partition(".")[0]
    return major.isdigit() and int(major) >= 8


def _cudnn_takes(q: Array, bias: Array | None) -> bool:
    # cuDNN takes head sizes up to 128, and up to 256 on Hopper only. SD 1.5's deepest heads have
    # 160; the VAE's single head has 512.
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and bias is None
        and _ampere_or_later()
    )


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B L H D"],
    v: Float[Array, "B L H D"],
    bias: Float[Array, "B L"] | None = None,
) -> Float[Array, "B T H D"]:
    """softmax(q kᵀ/√D + bias) v, with the kernel that suits the backend.

    This is the only place that chooses a kernel. Softmax statistics are float32.

    Args:
      q: queries ``[B, T, H, D]``.
      k: keys ``[B, L, H, D]``.
      v: values ``[B, L, H, D]``.
      bias: per key ``[B, L]``, the same for every head and query; None adds nothing.

    Returns:
      ``[B, T, H, D]``.
    """
    if _cudnn_takes(q, bias):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if bias is not None:
        return _softmax_attention(q, k, v, bias[:, None, None, :].astype(q.dtype))
    if q.shape[1] * k.shape[1] < _LONG:
        return _softmax_attention(q, k, v, None)
    if platform() == "cpu":
        return _chunked_attention(q, k, v)
    if platform() == "tpu" and _flash_takes(q, k):
        return _flash_attention(q, k, v)
    return _softmax_attention(q, k, v)


def split_heads(x: Float[Array, "B T C"], heads: int) -> Float[Array, "B T H D"]:
    """[B, T, H·D] → [B, T, H, D]."""
    return x.reshape(*x.shape[:2], heads, -1)


def merge_heads(x: Float[Array, "B T H D"]) -> Float[Array, "B T C"]:
    """[B, T, H, D] → [B, T, H·D]."""
    return x.reshape(*x.shape[:2], -1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with diffusers' parameter names (``to_q … to_out.0``)."""

    heads: int
    qkv_bias: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        """[B, T, C] → [B, T, C]."""
        q, k, v = (
            split_heads(
                nn.Dense(x.shape[-1], use_bias=self.qkv_bias, dtype=self.dtype, name=name)(x),
                self.heads,
            )
            for name in ("to_q", "to_k", "to_v")
        )
        out = merge_heads(attention(q, k, v))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="to_out.0")(out)


class Kernel(nn.Module):
    """A kernel that only declares its parameter; :func:`project_keys_values` applies it."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> Array:
        """The kernel ``[D, C]``."""
        return self.param("kernel", nn.initializers.lecun_normal(), self.shape)


class CrossAttention(nn.Module):
    """Z = Σ_s λ_s Attn(Q, K_s, V_s): decoupled cross-attention over any number of sources.

    The text's W_k and W_v are parameters of this layer, as in diffusers. They are applied outside,
    once per prompt, because sources do not depend on the diffusion step.
    """

    heads: int
    source_dim: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T C"], sources: tuple[LayerSource, ...]
    ) -> Float[Array, "B T C"]:
        """[B, T, C] and this layer's part of every source → [B, T, C]."""
        channels = x.shape[-1]
        q = nn.Dense(channels, use_bias=False, dtype=self.dtype, name="to_q")(x)
        q = split_heads(q, self.heads)
        for name in ("to_k", "to_v"):
            Kernel((self.source_dim, channels), name=name)()
        out = jnp.zeros_like(x, dtype=q.dtype)
        for source in sources:
            k, v = (split_heads(a, self.heads).astype(q.dtype) for a in source[:2])
            scale = jnp.asarray(source.scale, q.dtype)
            out += scale[..., None] * merge_heads(attention(q, k, v, source.bias))
        return nn.Dense(channels, dtype=self.dtype, name="to_out.0")(out)
