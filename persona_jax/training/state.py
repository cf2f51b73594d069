"""The train state, its optimiser, and the one compiled training step."""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from persona_jax.errors import UserError
from persona_jax.runtime.compilation import compiler_options
from persona_jax.runtime.mesh import (
    batch_sharding,
    place,
    replicated,
    shard_params,
    traced_for,
)

LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
StepFn = Callable[[Any, Any, Any], tuple["TrainState", dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """What training changes: everything here is saved, nothing else is.

    step: int32 scalar, steps done. params: the trainable tree. opt_state: optax's state, float32.
    ema: float32 running average of params, or None where it is off.
    """

    step: Any  # an array, or its shape or sharding, as all of these
    params: Any
    opt_state: Any
    ema: Any = None


def make_schedule(config: Any) -> Callable[[Any], jax.Array]:
    """Return the learning rate as a function of the number of updates done.

    Linear warm-up over config.warmup_steps updates to config.learning_rate (the first update
    already moves), then config.schedule: "constant", or "cosine" to zero at config.steps.
    """
    warmup, steps, peak = config.warmup_steps, config.steps, config.learning_rate
    if config.schedule not in ("constant", "cosine"):
        raise UserError(
            f"config.schedule: found {config.schedule!r}, expected 'constant' or 'cosine'"
        )

    def schedule(count: Any) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rate = peak * jnp.minimum(1.0, (count + 1) / max(warmup, 1))
        if config.schedule == "constant":
            return rate
        progress = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return rate * 0.5 * (1 + jnp.cos(jnp.pi * progress))

    return schedule


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter 2019; decay scaled by the learning rate, as in torch), or
    Muon (Jordan et al. 2024, as in optax) for kernels and NAdam for the rest.

    config: learning_rate, warmup_steps, schedule, steps (see :func:`make_schedule`), b1, b2,
    weight_decay (AdamW: on arrays of two or more axes, so not on biases and norm scales; Muon: on
    kernels), clip_norm (global norm of the gradient; 0 for none), muon (root mean square of a
    kernel's update, in learning rates; 0 for AdamW).
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()

    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda array: array.ndim >= 2, params)

    if config.muon:
        direction = optax.contrib.muon(
            1.0,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            consistent_rms=config.muon,
            muon_weight_dimension_numbers=_kernel_matrices,
        )
    else:
        direction = optax.chain(
            optax.scale_by_adam(b1=config.b1, b2=config.b2),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale(-1.0),
        )
    # inject_hyperparams keeps the rate in the state, where make_step finds it for the log.
    rate = optax.inject_hyperparams(lambda learning_rate: optax.scale(learning_rate))
    return optax.chain(clip, direction, rate(learning_rate=make_schedule(config)))


def _kernel_matrices(params: Any) -> Any:
    """Which axes of each kernel are a matrix's rows, and which its columns; None for the rest."""

    def matrix(path: Any, array: Any) -> Any:
        if path[-1].key != "kernel" or array.ndim < 2:
            return None
        *into, out = range(array.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(into), (out,))

    return jax.tree_util.tree_map_with_path(matrix, params)


def fresh_state(
    params: Any, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """Return the state at step 0; under jax.eval_shape, its shapes. params: the trainable tree,
    copied."""
    params = jax.tree.map(jnp.copy, params)
    full = _float32(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(full),
        ema=jax.tree.map(jnp.copy, full) if ema else None,
    )


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool = False,
) -> TrainState:
    """Return the state at step 0, each array made where it will live.

    params: the trainable tree (arrays, the same in every process; copied, so that donating the
    state leaves them alone), or a function without arguments that makes it.
    """

    def create(params: Any) -> TrainState:
        return fresh_state(params, optimizer, ema=ema)

    if callable(params):
        make, args = lambda: create(params()), ()
    else:
        make, args = create, (place(params, shard_params(mesh, params)),)
    shardings = shard_params(mesh, jax.eval_shape(make, *args))
    return jax.jit(make, out_shardings=shardings)(*args)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    accumulate: int = 1,
    ema_decay: float | None = None,
) -> StepFn:
    """Return the jitted step (state, frozen, batch) -> (state, metrics); state is donated.

    loss_fn(params, frozen, batch, step) -> (loss, metrics): loss is the mean over the examples it
    is given, metrics are scalars, step counts from 0. accumulate: the batch is worked through in
    that many parts; gradient, loss and metrics are the means over the parts, so those of the whole
    batch. ema_decay: the state's ema follows with min(ema_decay, (1 + step) / (10 + step)).

    metrics: the loss function's, and loss, grad_norm (before clipping) and learning_rate (where
    the optimiser is :func:`make_optimizer`'s). A loss or gradient that is not finite shows as a
    loss or grad_norm that is not finite. Raises UserError on tracing if the batch does not divide.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict]:
        parts = _split(batch, accumulate, mesh)

        def add(total: Any, part: Any) -> tuple[Any, Any]:
            with traced_for(mesh):
                (loss, metrics), grads = gradient(state.params, frozen, part, state.step)
            total = jax.tree.map(lambda a, b: a + b / accumulate, total, _float32(grads))
            return total, {**metrics, "loss": loss}

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
        if accumulate == 1:
            grads, metrics = add(zeros, batch)
        else:
            grads, metrics = jax.lax.scan(add, zeros, parts)
            metrics = jax.tree.map(lambda value: value.mean(axis=0), metrics)

        full = _float32(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, full)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        for _, injected in optax.tree_utils.tree_get_all_with_path(opt_state, "hyperparams"):
            # The optimiser of several people has a rate for each, all the same.
            metrics["learning_rate"] = jnp.mean(injected["learning_rate"])
        ema = state.ema
        if ema_decay is not None:
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda a, p: a * decay + p * (1 - decay), ema, _float32(params))
        new = TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return jax.lax.with_sharding_constraint(new, shard_params(mesh, new)), metrics

    return jax.jit(
        step,
        in_shardings=(None, None, batch_sharding(mesh)),
        out_shardings=(None, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )


def _split(batch: Any, parts: int, mesh: Mesh) -> Any:
    """[B, …] -> [parts, B / parts, …], part k holding examples k, k + parts, …

    Strided, because then each device finds its share of every part in its share of the batch.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % (parts * mesh.size):
        raise UserError(
            f"batch of {size}: must be a multiple of accumulate x devices = {parts} x {mesh.size}"
        )
    split = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(size // parts, parts, *x.shape[1:]), 1, 0), batch
    )
    sharding = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(None, *batch_sharding(mesh).spec)
    )
    return jax.lax.with_sharding_constraint(split, sharding)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
