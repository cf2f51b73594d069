"""Aggregators: every statement of docs/design.md, "Sets and masks"."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from persona_jax.errors import UserError
from persona_jax.models.aggregators import (
    FIXED,
    LEARNT,
    Aggregator,
    AverageMLP,
    SelfAttentionAggregator,
    agreement,
    build,
    weighted_softmax,
)
from persona_jax.models.aggregators import KINDS as KNOWN

B, N, D = 3, 9, 16
MODULE = SelfAttentionAggregator(depth=2, heads=2, width=8, pooling_heads=4)
MODULES = {"self_attention": MODULE, "avg_mlp": AverageMLP(depth=2, width=8)}
KINDS = [*FIXED, *LEARNT]


def make(kind: str) -> Aggregator:
    return Aggregator(kind, MODULES.get(kind))


@functools.cache
def start(kind: str) -> dict:
    return jax.jit(lambda key: make(kind).init(key, D))(jax.random.key(0))


@functools.cache
def learnt(kind: str) -> dict:
    """Parameters away from their initial values, at which self-attention is the average."""
    leaves, tree = jax.tree.flatten(start(kind))
    keys = jax.random.split(jax.random.key(1), len(leaves) + 1)
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=False)]
    return jax.tree.unflatten(tree, moved)


def compiled(kind: str, params=None):
    params = learnt(kind) if params is None else params
    return jax.jit(lambda x, w: make(kind).apply(params, x, w))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def apply(kind):
    """Applies one compiled function, which serves all sets up to N photos."""
    return compiled(kind)


def photos(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, N, D))


def weights(*sets: list[float]) -> jax.Array:
    rows = np.zeros((B, N), np.float32)
    for row, given in zip(rows, sets, strict=True):
        row[: len(given)] = given
    return jnp.asarray(rows)


SETS = weights([1, 1, 1, 1], [1], [1, 2, 0.5])


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def reversed_sets(x, w):
    """Reverses the order of every row, so that padding comes first."""
    return x[:, ::-1], w[:, ::-1]


def test_order_does_not_matter_but_to_first(kind, apply):
    x = photos()
    forth, back = apply(x, SETS), apply(*reversed_sets(x, SETS))
    if kind == "first":
        close(forth, x[:, 0])
        close(back, x[jnp.arange(B), jnp.array([3, 0, 2])])
    else:
        close(forth, back)


def test_padding_is_ignored(apply):
    x = photos()
    garbage = jnp.where(SETS[..., None] > 0, x, 1e3 * photos(1))
    np.testing.assert_array_equal(apply(x, SETS), apply(garbage, SETS))


def test_one_program_for_sets_of_any_size(kind):
    apply = compiled(kind)
    x = photos()
    out = [apply(x, weights(*[[1] * n] * B)) for n in range(1, N + 1)]
    assert apply._cache_size() == 1
    close(out[3], apply(x[:, :4], jnp.ones((B, 4))))  # equal to the result without padding


def test_weight_zero_removes_a_photo(kind, apply):
    """Also in the middle: the result is that of the other photos alone."""
    x = photos()
    without = jnp.concatenate([x[:, :1], x[:, 2:], x[:, :1]], axis=1)
    removed = apply(x, weights(*[[1, 0, 1, 1]] * B))
    close(removed, apply(without, weights(*[[1, 1, 1]] * B)))
    different = x.at[:, 1].add(100.0)
    np.testing.assert_array_equal(apply(different, weights(*[[1, 0, 1, 1]] * B)), removed)


def test_weight_two_is_listing_twice(apply):
    """For first and max, neither weight 2 nor listing twice changes anything."""
    x = photos()
    twice = jnp.concatenate([x[:, :2], x[:, 1:]], axis=1)[:, :N]
    close(apply(x, weights(*[[1, 2, 1]] * B)), apply(twice, weights(*[[1, 1, 1, 1]] * B)))


def test_the_scale_of_all_weights_does_not_matter(apply):
    close(apply(photos(), SETS), apply(photos(), 3 * SETS))


def test_max_ignores_the_size_of_weights():
    apply, x = compiled("max"), photos()
    expected = np.max(x[:, :3], axis=1)
    np.testing.assert_array_equal(apply(x, weights(*[[1, 1, 1]] * B)), expected)
    np.testing.assert_array_equal(apply(x, weights(*[[0.1, 7, 2]] * B)), expected)


def test_first_ignores_all_but_the_first():
    apply, x = compiled("first"), photos()
    chosen = apply(x, weights([1, 1], [0.2, 5], [0, 0, 1]))
    np.testing.assert_array_equal(chosen, jnp.stack([x[0, 0], x[1, 0], x[2, 2]]))


def test_average_is_the_weighted_mean():
    x = photos()
    expected = np.stack([np.average(x[i], axis=0, weights=SETS[i]) for i in range(B)])
    close(compiled("avg")(x, SETS), expected)


@pytest.mark.parametrize("n", [1, 3])
def test_the_empty_set_is_exactly_zero(kind, n):
    """Exactly +0, also beside rows that are not empty, and with finite gradients."""
    x = -1.0 - jnp.abs(photos()[:, :n])
    w = jnp.array([[0.0], [1.0], [0.0]]) * jnp.ones((B, n))
    out = np.asarray(compiled(kind)(x, w))
    assert out[[0, 2]].tobytes() == bytes(out[[0, 2]].nbytes)
    assert np.abs(out[1]).min() > 0

    def total(params, x):
        return (make(kind).apply(params, x, w) ** 2).sum()

    gradients = jax.jit(jax.grad(total, (0, 1)))(learnt(kind), x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_rows_do_not_mix(apply):
    x = photos()
    other = x.at[0].set(5.0)
    before, after = apply(x, SETS), apply(other, SETS.at[0].set(1.0))
    np.testing.assert_array_equal(before[1:], after[1:])
    assert not np.allclose(before[0], after[0])


@pytest.mark.parametrize("width", [8, 128])
def test_the_mlp_has_as_many_parameters_and_starts_as_the_average(width):
    dim, key = 256, jax.random.key(0)
    settings = {"depth": 2, "width": width}
    sizes = {
        kind: sum(x.size for x in jax.tree.leaves(Aggregator(kind, module).init(key, dim)))
        for kind, module in (
            ("avg_mlp", AverageMLP(**settings)),
            ("self_attention", SelfAttentionAggregator(**settings, heads=8)),
        )
    }
    assert abs(sizes["avg_mlp"] / sizes["self_attention"] - 1) < 0.02
    x, w = photos(), jnp.ones((B, N))
    np.testing.assert_allclose(
        compiled("avg_mlp", start("avg_mlp"))(x, w), compiled("avg")(x, w), atol=1e-6
    )


def test_self_attention_starts_as_the_average():
    apply = compiled("self_attention", start("self_attention"))
    for x in (photos(), 100 * photos(1), photos(2) + 50):
        np.testing.assert_allclose(apply(x, SETS), compiled("avg")(x, SETS), rtol=1e-5, atol=1e-5)


def test_self_attention_moves_in_every_parameter():
    """At first only query, consensus and pooled values have a gradient, after a few steps all."""
    aggregator, params = make("self_attention"), start("self_attention")
    target = photos(7)[:, 0]

    @jax.jit
    def gradient(params):
        return jax.grad(lambda p: ((aggregator.apply(p, photos(), SETS) - target) ** 2).mean())(
            params
        )

    def moving(params) -> set[str]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params))
            # Rounding errors of exact zeros do not count as a gradient.
            if jnp.abs(leaf).max() > 1e-7
        }

    everything = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    assert moving(params) == {"pool/query", "pool/consensus", "pool/to_v/kernel"}
    optimizer = optax.sgd(0.5)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(gradient(params), state)
        params = optax.apply_updates(params, updates)
    assert moving(params) == everything


def test_nothing_but_the_photos_themselves_is_pooled():
    """Whatever the blocks' parameters, a set of equal photos gives the same as one of them."""
    params = learnt("self_attention")
    x = jnp.repeat(photos()[:, :1], N, axis=1)
    pooled, _ = MODULE.apply({"params": params}, x, SETS)
    close(pooled, x[:, 0] @ params["pool"]["to_v"]["kernel"])


def test_pooling_heads_may_each_trust_another_photo():
    x, w = photos(), SETS
    _, shares = jax.jit(MODULE.apply)({"params": learnt("self_attention")}, x, w)
    assert shares.shape == (B, MODULE.pooling_heads, N)
    close(shares.sum(axis=-1), np.ones((B, MODULE.pooling_heads)))
    assert np.all(np.asarray(shares)[np.broadcast_to(w[:, None] == 0, shares.shape)] == 0)
    assert np.asarray(shares)[0].std(axis=0).max() > 1e-3


def test_agreement_is_the_mean_cosine_to_the_set():
    x = np.asarray(photos())
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    for b, w in enumerate(np.asarray(SETS)):
        cosine = unit[b] @ unit[b].T
        expected = [np.average(cosine[i], weights=w) for i in range(N)]
        close(agreement(photos(), SETS)[b], expected)


def test_photos_of_another_person_are_outvoted():
    """Three of nine photos show another person; with trust in agreement their share is about 0."""
    keys = jax.random.split(jax.random.key(5), 3)
    person, other = (jax.random.normal(key, (B, 1, D)) for key in keys[:2])
    x = 0.3 * jax.random.normal(keys[2], (B, N, D)) + jnp.concatenate(
        [jnp.repeat(person, 6, axis=1), jnp.repeat(other, 3, axis=1)], axis=1
    )
    params = jax.tree.map(lambda leaf: leaf, start("self_attention"))
    params["pool"]["consensus"] = jnp.ones(MODULE.pooling_heads)
    _, shares = MODULE.apply({"params": params}, x, jnp.ones((B, N)))
    assert shares[..., 6:].sum(axis=-1).max() < 0.05


def test_weighted_softmax_is_a_softmax_with_log_weights():
    logits = 30 * jax.random.normal(jax.random.key(0), (2, 3, 1, 5))
    w = jnp.array([[1, 2, 0.5, 1, 3], [0, 1, 1, 0, 4.0]])
    expected = jax.nn.softmax(logits + jnp.log(w)[:, None, None], axis=-1)
    close(weighted_softmax(logits, w), expected)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pooling_heads": 3}, "3 pooling heads do not divide D=16"),
        ({"heads": 3, "width": 8}, "3 heads do not divide width=8"),
    ],
)
def test_heads_that_do_not_divide_are_refused(settings, named):
    aggregator = Aggregator("self_attention", SelfAttentionAggregator(**settings))
    with pytest.raises(UserError, match=named):
        jax.eval_shape(lambda key: aggregator.init(key, D), jax.random.key(0))


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match=f"median.*known: {', '.join(KNOWN)}"):
        Aggregator("median")
    with pytest.raises(UserError, match="median"):
        build("median", {})
    with pytest.raises(UserError, match="its module is missing"):
        Aggregator("self_attention")


def test_kinds_are_built_from_their_entries():
    sizes = {"depth": 1, "heads": 2, "width": 8, "pooling_heads": 4}
    for name, kind in KNOWN.items():
        found = build(name, sizes)
        assert found.kind == name
        assert (found.module is None) == (kind.network is None)
        assert all(getattr(found.module, size) == sizes[size] for size in kind.sizes)
        assert sum((kind.pool is not None, kind.network is not None, kind.layout == "Plus")) == 1
