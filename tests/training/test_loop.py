import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from tensorboardX.proto import event_pb2

from persona_jax.errors import UserError
from persona_jax.interop.checkpoints import Checkpoints

TOY = Path(__file__).with_name("toy.py")


def start(workdir, environment=None, devices=8, **options):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, TOY, workdir, json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | (environment or {}),
    )


def finish(process, timeout=120):
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


def board(workdir):
    """Returns {step: loss} as TensorBoard shows it: a restart discards later entries."""
    values = {}
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                values = {step: value for step, value in values.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "loss":
                    values[event.step] = np.float32(value.simple_value)
    return values


def same(one, other):
    one, other = np.load(one / "final.npz"), np.load(other / "final.npz")
    assert one.files == other.files
    assert one.files
    for name in one.files:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_killed_and_started_again_is_bit_for_bit_the_same(tmp_path):
    options = {"steps": 20, "save_every": 4, "fsdp": 2, "ema": 0.99, "accumulate": 2}
    whole = start(tmp_path / "whole", **options)
    broken = start(tmp_path / "broken", kill_at=11, **options)
    code, out, err = finish(whole)
    assert (code, out) == (0, "finished\n"), err
    code, _, err = finish(broken)
    assert code == -signal.SIGKILL, err
    assert len(lines(tmp_path / "broken")) >= 11
    code, out, err = finish(start(tmp_path / "broken", **options))
    assert (code, out) == (0, "finished\n"), err
    assert "resuming at step 8" in err or "resuming at step 4" in err
    same(tmp_path / "whole", tmp_path / "broken")
    one, other = lines(tmp_path / "whole"), lines(tmp_path / "broken")
    assert [line["step"] for line in other] == list(range(1, 21))
    assert [line["loss"] for line in one] == [line["loss"] for line in other]
    assert saved(tmp_path / "broken") == [16, 20]
    assert board(tmp_path / "broken") == {line["step"]: np.float32(line["loss"]) for line in one}


def test_two_processes_of_four_devices_equal_one_of_eight(tmp_path):
    one = start(tmp_path / "one", steps=6, fsdp=2)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    two = [
        start(tmp_path / "two", shared | {"JAX_PROCESS_ID": str(n)}, 4, steps=6, fsdp=2)
        for n in range(2)
    ]
    for process in [one, *two]:
        code, out, err = finish(process)
        assert code == 0, err
        assert "finished" in out
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a["step"] == b["step"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    # One process resumes from the checkpoint of two.
    state = toy.train(tmp_path / "two", steps=6, fsdp=4)
    alone = toy.train(tmp_path / "one", steps=6)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_exits(tmp_path, processes):
    options = {"steps": 100_000, "save_every": 0, "wait": 0.01}
    shared = {}
    if processes == 2:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            shared["JAX_COORDINATOR_ADDRESS"] = f"localhost:{free.getsockname()[1]}"
        shared["JAX_NUM_PROCESSES"] = "2"
    started = [
        start(tmp_path, shared | ({"JAX_PROCESS_ID": str(n)} if shared else {}), 4, **options)
        for n in range(processes)
    ]
    deadline = time.monotonic() + 60
    log = tmp_path / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.05)
    started[-1].send_signal(signal.SIGTERM)  # one gets the signal, all stop
    results = [finish(process, 60) for process in started]
    assert [code for code, _, _ in results] == [143] * processes, results
    step = lines(tmp_path)[-1]["step"]
    assert saved(tmp_path) == [step]
    assert f"SIGTERM: saved at step {step} of 100000" in results[0][2]
    assert "Traceback" not in results[0][2]


def test_not_a_number_stops_at_the_step_and_is_not_saved(tmp_path):
    with pytest.raises(UserError, match=r"step 7: batch\.x is not finite"):
        toy.train(tmp_path, steps=20, save_every=1, nan_at=7)
    assert saved(tmp_path) == [5, 6]  # it was not their fault


def fit(workdir, *, rate=1e-2, frozen=None, steps=6):
    """Trains with save_every=1, another learning rate or other frozen weights."""
    mesh, towers = toy.make_mesh(), frozen or toy.frozen()
    optimizer = toy.make_optimizer(toy.config(learning_rate=rate, warmup_steps=0))
    return toy.fit(
        toy.init_state(toy.params(), optimizer, mesh),
        toy.make_step(toy.loss_fn, optimizer, mesh),
        toy.place(towers, toy.shard_params(mesh, towers)),
        toy.batches_from, steps=steps, workdir=workdir, mesh=mesh, save_every=1, log_every=1,
    )  # fmt: skip


@pytest.mark.parametrize("rate", [1e30, 1e6, np.nan])
def test_a_poisoned_state_is_not_saved_and_the_remedy_works(tmp_path, rate):
    with pytest.raises(
        UserError, match=r"step 1: params\.\S+ (has a number|is not finite).*learning_rate"
    ):
        fit(tmp_path, rate=rate)
    assert saved(tmp_path) == []
    assert int(fit(tmp_path).step) == 6


def test_a_checkpoint_that_the_next_step_fails_from_is_set_aside(tmp_path, capfd):
    """Falls back two steps, as far as there are checkpoints."""
    fit(tmp_path, steps=1)
    with Checkpoints(tmp_path / "checkpoints", 9) as checkpoints:
        state = checkpoints.restore(toy.init_state(
            toy.params(), toy.make_optimizer(toy.config()), toy.make_mesh()
        ))  # fmt: skip
        # Finite numbers within float16 that give a loss that is not finite.
        scale = jax.numpy.full_like(state.params["out"]["scale"], 6e4)
        kernel = jax.numpy.full_like(state.params["out"]["kernel"], 6e4)
        bad = state.replace(params=state.params | {"out": {"kernel": kernel, "scale": scale}})
        for step in (2, 3):
            checkpoints.save(step, bad)
    for step in (3, 2):
        with pytest.raises(UserError, match=f"step {step + 1}: grad_norm is inf"):
            fit(tmp_path)
        assert (
            f"checkpoints/{step}: the step after it is not finite; moved" in capfd.readouterr().err
        )
    assert int(fit(tmp_path).step) == 6


def test_frozen_weights_that_are_not_finite_are_named(tmp_path):
    with pytest.raises(UserError, match=r"step 1: frozen\.tower is not finite"):
        fit(tmp_path, frozen={"tower": toy.frozen()["tower"] * np.nan})


def test_a_second_run_on_the_same_workdir_is_refused(tmp_path):
    first = start(tmp_path, steps=100_000, wait=0.01)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(UserError, match="another run is using it"):
            toy.train(tmp_path)
    finally:
        first.kill()
        finish(first)
    toy.train(tmp_path, steps=4)  # the lock ended with the process


def test_callbacks_and_windows(tmp_path):
    called = []
    mesh = toy.make_mesh()
    optimizer = toy.make_optimizer(toy.config(steps=10))
    arguments = (
        toy.make_step(toy.loss_fn, optimizer, mesh),
        toy.place(toy.frozen(), toy.shard_params(mesh, toy.frozen())),
        toy.batches_from,
    )

    def note(name):
        return lambda step, state: called.append((name, step, int(state.step)))

    options = {"steps": 10, "workdir": tmp_path, "mesh": mesh, "save_every": 100, "log_every": 4}
    callbacks = [(4, note("a")), (5, note("b")), (0, note("end"))]
    state = toy.init_state(toy.params(), optimizer, mesh)
    toy.fit(state, *arguments, **options, callbacks=callbacks)
    assert called == [
        ("a", 4, 4), ("b", 5, 5), ("a", 8, 8), ("a", 10, 10), ("b", 10, 10), ("end", 10, 10),
    ]  # fmt: skip
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 10]
    assert lines(tmp_path)[1]["examples_per_second"] > 0
    toy.train(tmp_path / "each", steps=10, save_every=100)
    each = [line["loss"] for line in lines(tmp_path / "each")]
    for line, window in zip(lines(tmp_path), (each[:4], each[4:8], each[8:]), strict=True):
        np.testing.assert_allclose(line["loss"], np.mean(window), rtol=1e-6)
    # A finished run, started again, calls only the last callbacks.
    called.clear()
    state = toy.init_state(toy.params(), optimizer, mesh)
    toy.fit(state, *arguments, **options, callbacks=callbacks)
    assert called == [("a", 10, 10), ("b", 10, 10), ("end", 10, 10)]
    assert len(lines(tmp_path)) == 3


def test_another_configuration_is_refused(tmp_path):
    toy.train(tmp_path, steps=2, fingerprint={"method": "avg"})
    with pytest.raises(UserError, match=r"params\.out\.kernel: saved float32\[64,4\], expected"):
        toy.train(tmp_path, steps=4, width=32)
    with pytest.raises(UserError, match="method: saved 'avg', now 'sa'"):
        toy.train(tmp_path, steps=4, fingerprint={"method": "sa"})
    with pytest.raises(UserError, match=r"missing ema\.down_blocks\.0\.to_k\.bias"):
        toy.train(tmp_path, steps=4, ema=0.9)


def test_data_that_ends_is_named(tmp_path):
    mesh = toy.make_mesh()
    optimizer = toy.make_optimizer(toy.config())
    with pytest.raises(UserError, match="the data ended before step 2"):
        toy.fit(
            toy.init_state(toy.params(), optimizer, mesh),
            toy.make_step(toy.loss_fn, optimizer, mesh),
            toy.place(toy.frozen(), toy.shard_params(mesh, toy.frozen())),
            lambda start: iter([toy.batch(0), toy.batch(1)]),
            steps=5, workdir=tmp_path, mesh=mesh, save_every=0, log_every=1,
        )  # fmt: skip
