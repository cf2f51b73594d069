"""The attention function compared with torch's, in all its implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from jax.experimental.pallas import tpu as pallas

from persona_jax.models import attention as module
from persona_jax.models.attention import (
    CrossAttention,
    LayerSource,
    Source,
    attention,
    merge_heads,
    project_keys_values,
    split_heads,
)
from persona_jax.runtime.mesh import batch_sharding, make_mesh, traced_for


def drawn(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def qkv(queries: int, keys: int, heads: int = 2, dim: int = 8):
    return (
        drawn(0, 1, queries, heads, dim),
        drawn(1, 1, keys, heads, dim),
        drawn(2, 1, keys, heads, dim),
    )


def torchs(q, k, v, bias=None) -> np.ndarray:
    q, k, v = (torch.tensor(np.array(x)).transpose(1, 2) for x in (q, k, v))
    mask = None if bias is None else torch.tensor(np.array(bias))[:, None, None, :]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).numpy()


@pytest.mark.parametrize("bias", [False, True])
def test_short_sequences(bias):
    q, k, v = qkv(7, 5)
    bias = jnp.array([[0.0, 1.0, -2.0, 0.5, -1e9]]) if bias else None
    assert torch_models.relative(attention(q, k, v, bias), torchs(q, k, v, bias)) < 1e-6


@pytest.mark.parametrize(("queries", "keys"), [(2048, 512), (1500, 700)])
def test_long_sequences_are_computed_in_chunks(queries, keys, monkeypatch):
    """The implementation for CPUs, with lengths that 1,024 does and does not divide."""
    calls = []
    chunked = module._chunked_attention

    def counted(*args, **more):
        calls.append(1)
        return chunked(*args, **more)

    monkeypatch.setattr(module, "_chunked_attention", counted)
    q, k, v = qkv(queries, keys)
    assert queries * keys >= module._LONG
    assert torch_models.relative(jax.jit(attention)(q, k, v), torchs(q, k, v)) < 1e-6
    assert calls


def test_chunks_have_the_same_gradient():
    q, k, v = qkv(2048, 512, heads=1, dim=4)

    def total(function):
        return jax.jit(jax.grad(lambda q, k, v: (function(q, k, v) ** 2).sum(), (0, 1, 2)))(q, k, v)

    for a, b in zip(total(attention), total(jax.nn.dot_product_attention), strict=True):
        assert torch_models.relative(a, np.asarray(b)) < 1e-5


def test_half_precision_keeps_softmax_in_float32():
    """With logits near 60, a bfloat16 softmax would be wrong by several per cent."""
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(6, 300))
    q *= 12
    ours = attention(q, k, v)
    assert ours.dtype == jnp.bfloat16
    exact = torchs(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert torch_models.relative(ours.astype(jnp.float32), exact) < 1e-2


def test_a_bias_of_log_two_is_a_key_listed_twice():
    q, k, v = qkv(4, 3)
    twice = [jnp.concatenate([x, x[:, :1]], axis=1) for x in (k, v)]
    bias = jnp.log(jnp.array([[2.0, 1.0, 1.0]]))
    np.testing.assert_allclose(attention(q, k, v, bias), attention(q, *twice), atol=1e-6)


def test_a_large_negative_bias_hides_a_key():
    q, k, v = qkv(4, 3)
    bias = jnp.array([[0.0, 0.0, -1e9]])
    np.testing.assert_allclose(
        attention(q, k, v, bias), attention(q, k[:, :2], v[:, :2]), atol=1e-6
    )


def test_heads():
    x = drawn(0, 2, 3, 8)
    assert split_heads(x, 4).shape == (2, 3, 4, 2)
    np.testing.assert_array_equal(split_heads(x, 4)[0, 0, 1], x[0, 0, 2:4])
    np.testing.assert_array_equal(merge_heads(split_heads(x, 4)), x)


def test_projection_of_keys_and_values():
    kernels = {"a": {"to_k": {"kernel": drawn(0, 4, 6)}, "to_v": {"kernel": drawn(1, 4, 6)}}}
    tokens = drawn(2, 1, 3, 4)
    keys, values = project_keys_values(kernels, tokens)
    np.testing.assert_allclose(keys["a"], tokens @ kernels["a"]["to_k"]["kernel"], atol=1e-6)
    np.testing.assert_allclose(values["a"], tokens @ kernels["a"]["to_v"]["kernel"], atol=1e-6)
    half, _ = project_keys_values(kernels, tokens.astype(jnp.bfloat16))
    assert half["a"].dtype == jnp.bfloat16


X = drawn(9, 2, 4, 8)
LAYER = CrossAttention(heads=2, source_dim=6)
PARAMS = LAYER.init(jax.random.key(0), X, ())


def a_source(seed: int, scale, length: int = 5) -> LayerSource:
    return LayerSource(drawn(seed, 2, length, 8), drawn(seed + 1, 2, length, 8), None, scale)


def read(*sources: LayerSource) -> jax.Array:
    bias = PARAMS["params"]["to_out.0"]["bias"]
    return LAYER.apply(PARAMS, X, sources) - bias


def test_sources_add_up():
    """Z = Σ_s λ_s Attn(Q, K_s, V_s), before the linear output layer."""
    a, b = a_source(1, 1.0), a_source(3, 0.5, length=3)
    np.testing.assert_allclose(read(a, b), read(a) + read(b), atol=1e-5)
    np.testing.assert_allclose(read(b), 0.5 * read(b._replace(scale=1.0)), atol=1e-5)
    np.testing.assert_array_equal(read(a, b._replace(scale=0.0)), read(a))
    np.testing.assert_array_equal(read(), 0 * read(a))


@pytest.mark.parametrize(
    "scale",
    [0.5, jnp.array(0.5), jnp.array([[0.2], [0.7]]), jnp.linspace(0, 1, 4), drawn(5, 2, 4)],
    ids=["number", "scalar", "per picture", "region", "region per picture"],
)
def test_scale_broadcasts_to_pictures_and_places(scale):
    """λ multiplies the attention's output at each position."""
    whole = LAYER.bind(PARAMS)
    source = a_source(1, scale)
    q = split_heads(X @ PARAMS["params"]["to_q"]["kernel"], 2)
    attended = torchs(q, *(split_heads(a, 2) for a in source[:2])).reshape(2, 4, 8)
    expected = np.broadcast_to(scale, (2, 4))[..., None] * attended
    out = PARAMS["params"]["to_out.0"]
    np.testing.assert_allclose(
        whole(X, (source,)), expected @ out["kernel"] + out["bias"], atol=1e-5
    )


def test_a_source_may_have_another_scale_in_each_layer():
    source = Source({"a": X, "b": X}, {"a": X, "b": X}, None, {"a": 0.0, "b": jnp.ones(4)})
    assert source.at("a").scale == 0.0
    assert source.at("b").scale.shape == (4,)
    assert Source({"a": X}, {"a": X}).at("a").scale == 1.0


@pytest.mark.parametrize(
    ("takes", "dtype", "dim", "bias"),
    [
        (True, "bfloat16", 40, False),
        (True, "float16", 128, False),
        (False, "float32", 40, False),
        (False, "bfloat16", 20, False),
        (False, "bfloat16", 160, False),  # SD 1.5's deepest blocks: only on Hopper
        (False, "bfloat16", 512, False),  # the VAE's one head
        (False, "bfloat16", 40, True),
    ],
)
def test_what_goes_to_cudnn(takes, dtype, dim, bias, monkeypatch):
    q = jnp.zeros((1, 4, 2, dim), dtype)
    bias = jnp.zeros((1, 4)) if bias else None
    assert not module._cudnn_takes(q, bias)
    monkeypatch.setattr(module, "_ampere_or_later", lambda: True)
    assert module._cudnn_takes(q, bias) == takes


@pytest.mark.parametrize(
    ("capability", "it_is"), [("7.5", 0), ("8.0", 1), ("12.0", 1), ("gfx9", 0)]
)
def test_graphics_cards_from_ampere_on(capability, it_is, monkeypatch):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert module._ampere_or_later() == it_is


@pytest.fixture
def on_a_tpu(monkeypatch):
    monkeypatch.setattr(module, "platform", lambda: "tpu")


def lowered_for_tpu(devices: int, *shape: int) -> str:
    """Returns the program lowered for a TPU: attention and its gradient on a mesh."""
    mesh = make_mesh(devices=jax.devices()[:devices])
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def gradient(q, k, v):
        with traced_for(mesh):
            return jax.grad(lambda *qkv: attention(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(
                q, k, v
            )

    program = jax.jit(gradient, in_shardings=None if shape[0] % devices else batch_sharding(mesh))
    return jax.export.export(program, platforms=["tpu"])(x, x, x).mlir_module()


@pytest.mark.usefixtures("on_a_tpu")
@pytest.mark.parametrize(
    ("length", "dim", "devices"), [(4096, 40, 4), (1024, 80, 1), (4096, 64, 2)]
)
def test_a_tpu_gets_the_kernel_for_long_sequences(length, dim, devices):
    # One kernel for the forward pass, two for the gradient.
    assert lowered_for_tpu(devices, 4, length, 2, dim).count("tpu_custom_call") == 3


@pytest.mark.usefixtures("on_a_tpu")
@pytest.mark.parametrize(
    ("batch", "length", "dim"), [(4, 1024, 512), (4, 1600, 40), (3, 1024, 40), (4, 256, 160)]
)
def test_a_tpu_does_without_where_the_kernel_or_the_batch_does_not_fit(batch, length, dim):
    assert "tpu_custom_call" not in lowered_for_tpu(4, batch, length, 1, dim)


@pytest.mark.usefixtures("on_a_tpu")
def test_the_kernel_is_not_shared_out_where_nobody_says_how():
    assert jax.device_count() > 1
    x = jax.ShapeDtypeStruct((4, 1024, 1, 40), jnp.bfloat16)
    text = jax.export.export(jax.jit(attention), platforms=["tpu"])(x, x, x).mlir_module()
    assert "tpu_custom_call" not in text


def test_the_tpu_kernel_is_attention_and_so_is_its_gradient():
    """The kernel runs in Pallas' interpreter in place of a TPU."""
    q, k, v, weights = (drawn(seed, 2, 1024, 2, 40) for seed in range(4))

    def of(kernel):
        def loss(q, k, v):
            out = kernel(q, k, v)
            return (out * weights).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    with pallas.force_tpu_interpret_mode():
        gradients = jax.tree.map(np.asarray, of(module._flash_attention))
    expected = of(lambda q, k, v: module._softmax_attention(q, k, v, None))
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
