import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from jax.sharding import Mesh

from persona_jax.errors import UserError
from persona_jax.runtime import mesh as mesh_of
from persona_jax.runtime.mesh import make_mesh, place, put_batch, replicated, shard_params
from persona_jax.training.state import init_state, make_optimizer, make_schedule, make_step


def one_device():
    axes = (jax.sharding.AxisType.Auto,) * 2
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"), axis_types=axes)


def run(mesh, steps=3, config=None, ema=None, **options):
    optimizer = make_optimizer(config or toy.config())
    state = init_state(toy.params(), optimizer, mesh, ema=ema is not None)
    step = make_step(toy.loss_fn, optimizer, mesh, ema_decay=ema, **options)
    frozen = place(toy.frozen(), shard_params(mesh, toy.frozen()))
    metrics = []
    for n in range(steps):
        batch = toy.batch(n)
        if mesh.size == 1:
            batch = jax.device_put(batch, replicated(mesh))
        else:
            batch = put_batch(mesh, batch)
        state, values = step(state, frozen, batch)
        metrics.append(jax.device_get(values))
    return state, metrics, step


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
def test_meshes_agree_with_a_single_device(shape, monkeypatch):
    monkeypatch.setattr(mesh_of, "SMALL", 256)  # the toy's arrays are small
    alone, one, _ = run(one_device())
    state, many, step = run(make_mesh(*shape))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys() == {"loss", "size", "grad_norm", "learning_rate"}
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    assert step._cache_size() == 1  # shardings out are shardings in: no second compilation
    kernel = state.params["down_blocks.0"]["to_k"]["kernel"]
    moment = optax.tree_utils.tree_get(state.opt_state, "mu")["down_blocks.0"]["to_k"]["kernel"]
    assert kernel.sharding == moment.sharding
    assert kernel.addressable_shards[0].data.shape == (8, 64 // shape[1])


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_whole_batch(parts):
    mesh = make_mesh(2, 4) if parts == 2 else one_device()
    whole, metrics, _ = run(mesh)
    state, accumulated, _ = run(mesh, accumulate=parts)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    for a, b in zip(metrics, accumulated, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    with pytest.raises(UserError, match="batch of 16: must be a multiple"):
        run(mesh, accumulate=3)


def test_adamw_equals_torch():
    torch = pytest.importorskip("torch")
    config = toy.config(warmup_steps=4, weight_decay=0.1, clip_norm=0.5, steps=12)
    weights = toy.params()
    tensors = jax.tree.map(lambda x: torch.tensor(x, requires_grad=True), weights)
    flat = jax.tree.leaves(tensors)
    groups = [
        {"params": [t for t in flat if t.ndim >= 2], "weight_decay": 0.1},
        {"params": [t for t in flat if t.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999))
    rates = torch.optim.lr_scheduler.SequentialLR(
        reference,
        [
            torch.optim.lr_scheduler.LinearLR(reference, 1 / 4, 1.0, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=8),
        ],
        milestones=[4],
    )
    optimizer = make_optimizer(config)
    opt_state = optimizer.init(weights)
    for step in range(12):
        grads = toy.params(100 + step)
        for tensor, grad in zip(flat, jax.tree.leaves(grads), strict=True):
            tensor.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_(flat, 0.5)
        rate = reference.param_groups[0]["lr"]
        np.testing.assert_allclose(make_schedule(config)(step), rate, rtol=1e-5, atol=1e-9)
        reference.step()
        rates.step()
        updates, opt_state = optimizer.update(grads, opt_state, weights)
        weights = optax.apply_updates(weights, updates)
    for ours, theirs in zip(jax.tree.leaves(weights), flat, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_nadam():
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.normal(0, 0.3, shape).astype(np.float32)

    weights, grads = (
        {
            "conv": {"kernel": draw(3, 3, 8, 16), "bias": draw(16)},
            "table": {"embedding": draw(9, 4)},
        }
        for _ in range(2)
    )
    values = {"weight_decay": 0.0, "clip_norm": 0.0, "warmup_steps": 0, "schedule": "constant"}
    optimizer = make_optimizer(toy.config(muon=0.6, **values))
    step, _ = optimizer.update(grads, optimizer.init(weights), weights)
    nadam = optax.nadam(1e-2, b1=0.9, b2=0.999)
    rest, _ = nadam.update(grads, nadam.init(weights), weights)
    np.testing.assert_allclose(step["table"]["embedding"], rest["table"]["embedding"], rtol=1e-5)
    np.testing.assert_allclose(step["conv"]["bias"], rest["conv"]["bias"], rtol=1e-5)
    # The first step follows the nearest matrix with orthogonal rows (approximate by Newton-Schulz).
    rows, _, columns = np.linalg.svd(grads["conv"]["kernel"].reshape(72, 16), full_matrices=False)
    nearest = -1e-2 * 0.6 * np.sqrt(72) * rows @ columns
    update = np.asarray(step["conv"]["kernel"]).reshape(72, 16)
    np.testing.assert_allclose(np.sqrt((update**2).mean()), 1e-2 * 0.6, rtol=0.2)
    assert (update * nearest).sum() / np.linalg.norm(update) / np.linalg.norm(nearest) > 0.97


def test_ema_follows_with_a_corrected_decay():
    mesh = one_device()
    optimizer = make_optimizer(toy.config())
    state = init_state(toy.params(), optimizer, mesh, ema=True)
    step = make_step(toy.loss_fn, optimizer, mesh, ema_decay=0.15)
    average = toy.params()
    for n in range(4):
        state, _ = step(state, toy.frozen(), toy.batch(n))
        decay = min(0.15, (1 + n) / (10 + n))
        average = jax.tree.map(
            lambda a, p, d=decay: a * d + np.asarray(p) * (1 - d), average, state.params
        )
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_init_leaves_the_callers_arrays_alone_and_takes_a_function():
    mesh = make_mesh()
    optimizer = make_optimizer(toy.config())
    mine = jax.tree.map(jnp.asarray, toy.params())
    state = init_state(mine, optimizer, mesh, ema=True)
    made = init_state(lambda: jax.tree.map(jnp.asarray, toy.params()), optimizer, mesh, ema=True)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(made), strict=True):
        np.testing.assert_array_equal(a, b)
    step = make_step(toy.loss_fn, optimizer, mesh, ema_decay=0.9)
    frozen = place(toy.frozen(), replicated(mesh))
    step(state, frozen, put_batch(mesh, toy.batch(0)))
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.ema)))  # donated
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(toy.params()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_parameters_keep_a_float32_optimiser():
    mesh = one_device()
    optimizer = make_optimizer(toy.config())
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.params())
    state = init_state(half, optimizer, mesh, ema=True)
    step = make_step(toy.loss_fn, optimizer, mesh, ema_decay=0.9)
    state, _ = step(state, toy.frozen(), toy.batch(0))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    floats = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {x.dtype for x in [*floats, *jax.tree.leaves(state.ema)]} == {jnp.dtype(jnp.float32)}


def test_a_step_that_goes_wrong_says_so_in_its_metrics():
    mesh = one_device()
    optimizer = make_optimizer(toy.config())
    step = make_step(toy.loss_fn, optimizer, mesh)
    batch = toy.batch(0)
    batch["x"][3] = np.nan
    _, metrics = step(init_state(toy.params(), optimizer, mesh), toy.frozen(), batch)
    assert not np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])


def test_unknown_schedule():
    with pytest.raises(UserError, match=r"config\.schedule: found 'linear'"):
        make_optimizer(toy.config(schedule="linear"))
