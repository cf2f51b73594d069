"""Aggregates a set of reference embeddings in PyTorch. It needs only torch and safetensors.

    embedding = load("aggregator.json")(embeddings)      # [B, N, D] → [B, D]
    both = torch.cat([torch.zeros_like(embedding), embedding])[:, None]
    pipe(prompt, ip_adapter_image_embeds=[both], ...)    # B = 1: one person per call

At ``guidance_scale=1`` pass ``embedding[:, None]`` alone.

`embeddings` are the image encoder's ``image_embeds`` of any number N of photos. Optional `weights`
``[B, N]`` weigh the photos; 0 removes one.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def weighted_softmax(logits: Tensor, weights: Tensor) -> Tensor:
    """softmax(logits + log w) over the last axis; a weight of 0 removes a photo."""
    return torch.softmax(logits + weights.log()[:, None, None, :], dim=-1)


class SetBlock(nn.Module):
    """Pre-norm transformer block over the set, without positions."""

    def __init__(self, dim: int, heads: int, width: int):
        """`dim` is the embeddings'; `width` is the attention's, split among `heads`."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-5), nn.LayerNorm(dim, eps=1e-5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * width), nn.Linear(4 * width, dim)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        y = self.norm1(x)
        q, k, v = (
            to(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        shares = weighted_softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, weights)
        x = x + self.to_out((shares @ v).transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


def agreement(embeddings: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cosine similarity of each photo to its set, [B, N, D] → [B, N]."""
    unit = nn.functional.normalize(embeddings, dim=-1, eps=1e-6)
    shares = weights / weights.sum(dim=1, keepdim=True)
    return torch.einsum("bnd,bmd,bm->bn", unit, unit, shares)


class AttentionPooling(nn.Module):
    """Attention pooling with one query per head; photos that agree with the others weigh more.

    Each head pools its own slice of a linear map of the features.
    """

    def __init__(self, dim: int, heads: int):
        """`dim` is the embeddings', split among `heads`."""
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5, bias=False)
        self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.query = nn.Parameter(torch.zeros(heads, dim // heads))
        self.consensus = nn.Parameter(torch.zeros(heads))

    def forward(self, seen: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """Features for the keys, and features that are pooled, both [B, N, D] → [B, D]."""
        heads, size = self.query.shape
        keys, values = (
            y.unflatten(-1, (heads, size)) for y in (self.to_k(self.norm(seen)), self.to_v(x))
        )
        logits = torch.einsum("hd,bnhd->bhn", self.query, keys) * size**-0.5
        logits = logits + 20.0 * self.consensus[:, None] * agreement(x, weights)[:, None]
        shares = weighted_softmax(logits[:, :, None], weights)[:, :, 0]
        return torch.einsum("bhn,bnhd->bhd", shares, values).flatten(1)


def first(embeddings: Tensor, weights: Tensor) -> Tensor:
    """The first photo whose weight is not 0."""
    return embeddings[torch.arange(len(embeddings)), (weights > 0).int().argmax(dim=1)]


def maximum(embeddings: Tensor, weights: Tensor) -> Tensor:
    """The largest value of each feature."""
    return embeddings.masked_fill((weights <= 0)[..., None], -torch.inf).amax(dim=1)


def average(embeddings: Tensor, weights: Tensor) -> Tensor:
    """The mean by weights."""
    return (embeddings * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)


FIXED = {"first": first, "max": maximum, "avg": average}


class Aggregator(nn.Module):
    """[B, N, D] → [B, D]: ``first``, ``max``, ``avg`` or ``self_attention`` over the set."""

    def __init__(self, kind: str, dim: int, depth=0, heads=1, width=0, pooling_heads=1):
        """`kind`, `dim` and, for self-attention, its sizes, as in ``aggregator.json``."""
        super().__init__()
        self.kind = kind
        if kind == "self_attention":
            self.blocks = nn.ModuleList([SetBlock(dim, heads, width) for _ in range(depth)])
            self.pool = AttentionPooling(dim, pooling_heads)
        elif kind not in FIXED:
            raise ValueError(f"unknown kind {kind!r}")

    def forward(self, embeddings: Tensor, weights: Tensor | None = None) -> Tensor:
        """[B, N, D] → [B, D]; each set needs at least one photo with a weight above 0."""
        if weights is None:
            weights = torch.ones(embeddings.shape[:2], dtype=embeddings.dtype)
        if self.kind in FIXED:
            return FIXED[self.kind](embeddings, weights)
        seen = embeddings
        for block in self.blocks:
            seen = block(seen, weights)
        return self.pool(seen, embeddings, weights)


def load(config: str | Path) -> Aggregator:
    """Loads ``aggregator.json`` and, if there is one, the ``.safetensors`` in the same folder."""
    aggregator = Aggregator(**json.loads(Path(config).read_text()))
    file = Path(config).with_suffix(".safetensors")
    aggregator.load_state_dict(load_file(file) if file.exists() else {})
    return aggregator.eval()
