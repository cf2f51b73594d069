"""Low-rank updates: zero at initialisation, W + scale · A · B after training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from persona_jax.models import lora
from persona_jax.models.unet import cross_attention_layers
from persona_jax.pipelines import pipeline


@pytest.fixture(scope="module")
def unet():
    return pipeline.load("tiny", only=("unet",), dtype=jnp.float32, param_dtype=jnp.float32).unet


def flat(tree) -> dict[str, np.ndarray]:
    return {".".join(k): np.asarray(v) for k, v in traverse_util.flatten_dict(tree).items()}


def test_every_attention_projection_has_one_and_nothing_else(unet):
    names = set(lora.init(jax.random.key(0), unet.params, 4))
    cross = cross_attention_layers(unet.module.config)
    both = [layer[:-1] + which for layer in cross for which in "12"]
    assert names == {f"{layer}.{name}" for layer in both for name in lora.PROJECTIONS}


def test_a_fresh_one_changes_nothing(unet):
    merged = flat(lora.merge(unet.params, lora.init(jax.random.key(0), unet.params, 4)))
    before = flat(unet.params)
    assert merged.keys() == before.keys()
    assert all(np.array_equal(merged[name], before[name]) for name in before)


def test_a_learnt_one_adds_its_product(unet):
    update = lora.init(jax.random.key(0), unet.params, 2)
    update = jax.tree.map(lambda x: x + 0.1, update)
    before, merged = flat(unet.params), flat(lora.merge(unet.params, update, 0.5))
    for name, kernel in before.items():
        change = update.get(name.removesuffix(".kernel")) if name.endswith(".kernel") else None
        want = kernel
        if change:
            want = kernel + 0.5 * change["lora_A"]["kernel"] @ change["lora_B"]["kernel"]
        np.testing.assert_allclose(merged[name], want, rtol=1e-6, atol=1e-6)


def test_a_fresh_lora_has_a_gradient(unet):
    """Two zero factors would have no gradient; if one is random, the other has one."""
    update = lora.init(jax.random.key(0), unet.params, 2)
    loss = lambda u: sum(jnp.sum(x**2) for x in jax.tree.leaves(lora.merge(unet.params, u)))  # noqa: E731
    gradient = jax.grad(loss)(update)
    assert all(np.abs(g["lora_B"]["kernel"]).max() > 0 for g in gradient.values())


def test_wrong_ranks_and_strangers_are_refused(unet):
    with pytest.raises(ValueError, match="rank 0"):
        lora.init(jax.random.key(0), unet.params, 0)
    one = {"kernel": jnp.ones((1, 1))}
    stranger = {"mid_block.nothing.to_q": {"lora_A": one, "lora_B": one}}
    with pytest.raises(KeyError, match=r"mid_block\.nothing"):
        lora.merge(unet.params, stranger)
