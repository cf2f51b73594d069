"""The training state, the optimiser, and the compiled training step."""

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
    """Everything that training changes and that checkpoints save.

    Each field may also hold shapes or shardings in place of arrays.

    Attributes:
      step: steps done, int32 scalar.
      params: the trainable tree.
      opt_state: optax's state, float32.
      ema: float32 exponential moving average of params, or None if it is off.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any = None


def make_schedule(config: Any) -> Callable[[Any], jax.Array]:
    """The learning rate as a function of the number of updates done.

    Args:
      config: learning_rate, reached by a linear warm-up over warmup_steps updates (the first update
        already has a rate above 0); schedule after it, "constant", or "cosine" to zero at steps.

    Raises:
      UserError: an unknown schedule.
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
    """AdamW, or Muon for kernels with NAdam for the other parameters.

    Args:
      config: learning_rate, warmup_steps, schedule and steps (see :func:`make_schedule`); b1, b2;
        weight_decay, times the learning rate as in torch (AdamW: of arrays with two or more axes,
        so not of biases and norm scales; Muon: of kernels); clip_norm, the largest global norm of
        the gradient (0 does not clip); muon, the root mean square of a kernel's update in units of
        the learning rate (0 selects AdamW).

    Source: Loshchilov & Hutter 2019 (AdamW); Jordan et al. 2024 (Muon), as in optax.
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
    # inject_hyperparams stores the rate in the state, from which make_step reads it for the log.
    rate = optax.inject_hyperparams(lambda learning_rate: optax.scale(learning_rate))
    return optax.chain(clip, direction, rate(learning_rate=make_schedule(config)))


def _kernel_matrices(params: Any) -> Any:
    """Axes of each kernel that form the rows and the columns of a matrix; None for other arrays."""

    def matrix(path: Any, array: Any) -> Any:
        if path[-1].key != "kernel" or array.ndim < 2:
            return None
        *into, out = range(array.ndim)
        return optax.contrib.MuonDimensionNumbers(tuple(into), (out,))

    return jax.tree_util.tree_map_with_path(matrix, params)


def fresh_state(
    params: Any, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """The state at step 0; under jax.eval_shape, its shapes.

    Args:
      params: the trainable tree, which is copied.
      optimizer: from :func:`make_optimizer`.
      ema: whether to keep a moving average of the parameters.
    """
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
    """The state at step 0, created directly with its sharding.

    Args:
      params: the trainable tree (arrays, the same in every process; they are copied, so donating
        the state does not delete them), or a function without arguments that makes it.
      optimizer: from :func:`make_optimizer`.
      mesh: devices to place it on.
      ema: whether to keep a moving average of the parameters.
    """

    def create(params: Any) -> TrainState:
        return fresh_state(params, optimizer, ema=ema)

    make: Callable[..., TrainState]
    args: tuple[Any, ...]
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
    """The jitted training step.

    Args:
      loss_fn: (params, frozen, batch, step) -> (loss, metrics). loss is the mean over the batch,
        metrics are scalars, step counts from 0.
      optimizer: from :func:`make_optimizer`.
      mesh: devices to train on.
      accumulate: number of parts that the batch is processed in. Gradient, loss and metrics are the
        means over the parts, and so over the batch.
      ema_decay: decay of the state's ema, which is min(ema_decay, (1 + step) / (10 + step)); None
        leaves the ema unchanged.
      rules: see :func:`persona_jax.runtime.mesh.shard_params`; must be the same in init_state.

    Returns:
      (state, frozen, batch) -> (state, metrics). The state given is donated. To the loss function's
      metrics it adds loss, grad_norm (before clipping; like the loss it is not finite if the
      gradient is not) and, for an optimiser from :func:`make_optimizer`, learning_rate. Tracing
      raises UserError if the batch does not divide.
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
            # Fine-tuning several people at once has one rate per person, all equal.
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

    With this stride, a device's share of every part lies in its share of the batch, so that no
    example moves between devices.
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
