"""Recomputation in the backward pass changes only the memory used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models

from persona_jax.models import towers
from persona_jax.models.attention import Source, project_keys_values
from persona_jax.models.unet import REMAT, text_kernels
from persona_jax.runtime.compilation import compiler_options


@pytest.fixture(scope="module")
def gradients() -> dict:
    """(gradient, number of stored values) by kind of recomputation."""
    unet = towers.build("unet", torch_models.TINY_UNET)
    params = towers.initialise(unet, jax.random.key(0))
    z = jax.random.normal(jax.random.key(1), (4, 8, 8, 4))
    text = jax.random.normal(jax.random.key(2), (4, 5, 16))

    def gradient(remat):
        module = unet.clone(remat=remat)

        def loss(params, text):
            source = Source(*project_keys_values(text_kernels(params, module.config), text))
            t = jnp.array([3, 500, 20, 999])
            return (module.apply({"params": params}, z, t, (source,)) ** 2).mean()

        kept = jax.eval_shape(lambda *inputs: jax.vjp(loss, *inputs)[1], params, text)
        return jax.jit(jax.grad(loss, (0, 1)))(params, text), sum(
            leaf.size for leaf in jax.tree.leaves(kept)
        )

    return {remat: gradient(remat) for remat in REMAT}


@pytest.mark.parametrize("remat", REMAT[1:])
def test_the_gradient_is_the_same(gradients, remat):
    expected, there = gradients["none"][0], gradients[remat][0]
    assert jax.tree.structure(expected) == jax.tree.structure(there)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_recomputation_stores_fewer_values(gradients):
    none, transformers, blocks = (gradients[remat][1] for remat in REMAT)
    assert transformers < 0.7 * none
    assert blocks < 0.7 * transformers


def test_what_is_computed_again_is_not_kept_on_a_cpu_either():
    """XLA for CPUs needs :func:`persona_jax.runtime.compilation.compiler_options` for this."""
    kernels = [jnp.ones((256, 256)) for _ in range(8)]

    def loss(x, kernels):
        for kernel in kernels:
            x = jax.checkpoint(lambda x, kernel: jnp.tanh(jnp.sin(x @ kernel)) * x)(x, kernel)
        return x.sum()

    def temporaries(options):
        program = jax.jit(jax.grad(loss), compiler_options=options)
        compiled = program.lower(kernels[0], kernels).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled(kernels[0], kernels)

    (usual, expected), (ours, actual) = temporaries(None), temporaries(compiler_options())
    assert ours < 0.6 * usual
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
