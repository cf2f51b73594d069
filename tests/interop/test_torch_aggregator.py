"""The PyTorch aggregator equals the Flax one, loaded from the files that an export writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_models import normal, relative

from persona_jax.interop import torch_aggregator
from persona_jax.interop.aggregator_files import save_aggregator
from persona_jax.models.aggregators import KINDS, Aggregator, AverageMLP, build

DIM = 16
SIZES = {"depth": 2, "heads": 2, "width": 24, "pooling_heads": 4}


def make(kind: str) -> tuple[Aggregator, dict]:
    """Returns an aggregator with noise on its parameters, as zeros and ones would hide errors."""
    aggregator = build(kind, SIZES)
    params = aggregator.init(jax.random.key(0), DIM)
    leaves, tree = jax.tree.flatten(params)
    random = [x + 0.3 * normal(*x.shape, seed=i) for i, x in enumerate(leaves)]
    return aggregator, jax.tree.unflatten(tree, random)


POOLED = [name for name, kind in KINDS.items() if kind.exported and kind.layout == "plain"]


@pytest.mark.parametrize("kind", POOLED)
def test_both_worlds_agree(kind, tmp_path):
    aggregator, params = make(kind)
    save_aggregator(aggregator, params, DIM, tmp_path)
    theirs = torch_aggregator.load(tmp_path / "aggregator.json")
    for count in (1, 3, 9):
        x, weights = normal(2, count, DIM, seed=count), np.ones((2, count), np.float32)
        weights[1, -1] = 2.0
        if count > 1:
            weights[0, 0] = 0.0
        ours = aggregator.apply(params, jnp.asarray(x), jnp.asarray(weights))
        with torch.no_grad():
            exported = theirs(torch.from_numpy(x), torch.from_numpy(weights))
            plain = theirs(torch.from_numpy(x))
        assert relative(ours, exported) < 1e-5
        assert (
            relative(aggregator.apply(params, jnp.asarray(x), jnp.ones_like(weights)), plain) < 1e-5
        )


def test_what_exists_for_comparison_only_is_not_exported(tmp_path):
    aggregator = Aggregator("avg_mlp", AverageMLP())
    with pytest.raises(Exception, match="avg_mlp"):
        save_aggregator(aggregator, {}, DIM, tmp_path)
