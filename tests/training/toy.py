"""A small regression with noise, trained by the tests in their process or in another.

python toy.py WORKDIR '{"steps": 20, …}' trains it; the last line printed reports the outcome.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax.runtime import command_line
from persona_jax.runtime.mesh import initialize_distributed, make_mesh, place, shard_params
from persona_jax.training.loop import fit
from persona_jax.training.state import init_state, make_optimizer, make_step

BATCH = 16


def config(**changes):
    values = {
        "learning_rate": 1e-2, "warmup_steps": 3, "weight_decay": 0.01, "clip_norm": 1.0,
        "muon": 0.0,
        "b1": 0.9, "b2": 0.999, "schedule": "cosine", "steps": 20,
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


def params(seed=0):
    random = np.random.default_rng(seed)

    def draw(*shape):
        return random.normal(0, 0.3, shape).astype(np.float32)

    return {
        "down_blocks.0": {"to_k": {"kernel": draw(8, 64), "bias": draw(64)}},
        "out": {"kernel": draw(64, 4), "scale": np.ones(4, np.float32)},
    }


def frozen():
    return {"tower": np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)}


def loss_fn(params, frozen, batch, step):
    """Returns the mean loss; each example draws its own noise from (step, index)."""

    def noise(index):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), index)
        return jax.random.normal(key, (8,))

    x = batch["x"] @ frozen["tower"] + 0.1 * jax.vmap(noise)(batch["index"])
    layer = params["down_blocks.0"]["to_k"]
    hidden = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    out = hidden @ params["out"]["kernel"] * params["out"]["scale"]
    loss = jnp.mean(jnp.square(out - batch["y"]))
    return loss, {"size": jnp.mean(jnp.abs(out))}


def batch(step, process=0, processes=1):
    """Returns the step's batch, or the part p::P of it that a process loads."""
    random = np.random.default_rng([7, step])
    x = random.normal(size=(BATCH, 8)).astype(np.float32)
    y = np.sin(x[:, :4])
    index = np.arange(BATCH, dtype=np.int32) + step * BATCH
    whole = {"x": x, "y": y, "index": index}
    return {name: array[process::processes] for name, array in whole.items()}


def batches_from(start, nan_at=None, wait=0.0):
    step = start
    while True:
        time.sleep(wait)
        part = batch(step, jax.process_index(), jax.process_count())
        if step + 1 == nan_at:
            part["x"] = part["x"] * np.nan
        yield part
        step += 1


def train(workdir, *, steps=20, save_every=4, fsdp=1, ema=None, accumulate=1, kill_at=None,
          nan_at=None, wait=0.0, log_every=1, width=None, fingerprint=None):  # fmt: skip
    mesh = make_mesh(fsdp=fsdp)
    optimizer = make_optimizer(config(steps=steps))
    start = params()
    if width:
        start["out"]["kernel"] = np.zeros((width, 4), np.float32)
    state = init_state(start, optimizer, mesh, ema=ema is not None)
    step_fn = make_step(loss_fn, optimizer, mesh, accumulate=accumulate, ema_decay=ema)
    towers = place(frozen(), shard_params(mesh, frozen()))

    def kill(step, _):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return fit(
        state, step_fn, towers, lambda n: batches_from(n, nan_at, wait), steps=steps,
        workdir=workdir, mesh=mesh, save_every=save_every, log_every=log_every,
        callbacks=[(1, kill)] if kill_at else [], fingerprint=fingerprint,
    )  # fmt: skip


def main(arguments):
    jax.config.update("jax_default_matmul_precision", "highest")
    initialize_distributed()
    state = train(arguments.workdir, **json.loads(arguments.options))
    if jax.process_index() == 0:
        leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state, state.ema))
        arrays = {
            jax.tree_util.keystr(path): np.asarray(leaf)
            for path, leaf in leaves
            if leaf.is_fully_addressable
        }
        np.savez(Path(arguments.workdir) / "final.npz", **arrays)
    print("finished")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("options")
    command_line.run_with_arguments(parser, main, sys.argv)
