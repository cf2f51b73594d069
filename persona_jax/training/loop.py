"""The training loop: runs steps, logs, saves, stops on signals, resumes."""

import contextlib
import fcntl
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from persona_jax.errors import UserError
from persona_jax.interop.checkpoints import Checkpoints
from persona_jax.runtime import buckets, files, finite
from persona_jax.runtime.mesh import batch_sharding, put_batch, replicated
from persona_jax.training.events import EventFile
from persona_jax.training.state import StepFn, TrainState

Callback = tuple[int, Callable[[int, TrainState], None]]


class NotFinite(UserError):
    """The loss or the gradient of a step is not finite."""

    def __init__(self, step: int, what: str):
        """`step` counts from 1; `what` names the number and its value."""
        self.step = step
        super().__init__(
            f"step {step}: {what}; stopped, and that state is not saved: lower "
            "config.optimizer.learning_rate or lengthen the warm-up"
        )


def fit(
    state: TrainState,
    step_fn: StepFn,
    frozen: Any,
    batches_from: Callable[[int], Iterator[Any]],
    *,
    steps: int,
    workdir: str | Path,
    mesh: Mesh,
    save_every: int,
    log_every: int,
    callbacks: Sequence[Callback] = (),
    fingerprint: Mapping[str, Any] | None = None,
) -> TrainState:
    """Train until ``steps`` steps are done, from the newest checkpoint in workdir if there is one.

    Writes workdir/checkpoints, metrics.jsonl (one line per log_every steps, means over them) and
    tensorboard. SIGTERM and SIGINT finish the step, save, and raise SystemExit(128 + signal).

    Args:
      state: from :func:`persona_jax.training.state.init_state`; its arrays are donated.
      step_fn: from :func:`persona_jax.training.state.make_step`.
      frozen: weights that are not trained, placed on the mesh (see
        :func:`persona_jax.runtime.mesh.place`).
      batches_from: batches_from(n) iterates over numpy batches from step n (from 0) on, of this
        process's examples ``[B / processes, …]``; it must give the same batches in every run.
      steps: total number of steps.
      workdir: run folder.
      mesh: devices to train on.
      save_every: steps between checkpoints; 0 saves at the end only.
      log_every: steps between lines of the log.
      keep: number of checkpoints to keep.
      callbacks: (every, f) calls f(step, state) in every process after each ``every`` steps and at
        the end; an ``every`` of 0 is at the end only.
      fingerprint: see :class:`persona_jax.interop.checkpoints.Checkpoints`.

    Returns:
      The state after the last step.

    Raises:
      UserError: the loss or gradient is not finite, or a parameter is too large (that state is not
        saved, and if the step right after a checkpoint fails, that checkpoint is set aside);
        another run uses workdir; the checkpoint is of another configuration; or the disk is full.
    """
    workdir = Path(workdir)
    with (
        locked(workdir),
        Checkpoints(workdir / "checkpoints", fingerprint=fingerprint) as checkpoints,
        _diagnosed(checkpoints, frozen, batches_from),
    ):
        state = _resume(checkpoints, state)
        start = int(state.step)
        with _Log(workdir, start, steps, log_every) as log, _stop_signals() as signals:
            run = _dispatch(state, step_fn, frozen, batches_from, start, steps, mesh, signals)
            unread, stop = None, False
            for step, state, metrics in run:
                if unread:
                    stop = log.read(*unread)
                unread = (step, metrics)
                save = stop or step == steps or (save_every > 0 and step % save_every == 0)
                due = [f for every, f in callbacks if every and step % every == 0 and step < steps]
                if not (save or due):
                    continue
                log.read(*unread)  # waits for this step, and raises if it is not finite
                unread = None
                if save:
                    checkpoints.save(step, state)
                if stop and step < steps:
                    checkpoints.wait()
                    number = signals[0] if signals else signal.SIGTERM
                    log.say(f"{signal.Signals(number).name}: saved at step {step} of {steps}")
                    raise SystemExit(128 + number)
                for callback in due:
                    callback(step, state)
                log.restart_clock()
        if checkpoints.latest() is None:  # steps=0
            checkpoints.save(start, state)
        checkpoints.wait()
        for _, callback in callbacks:
            callback(int(state.step), state)
    return state


def _dispatch(
    state: TrainState,
    step_fn: StepFn,
    frozen: Any,
    batches_from: Callable[[int], Iterator[Any]],
    start: int,
    steps: int,
    mesh: Mesh,
    signals: list[int],
) -> Iterator[tuple[int, TrainState, dict[str, jax.Array]]]:
    """Yield (steps done, state, metrics) of each step without waiting for its arrays.

    The caller reads the metrics of a step only after it has asked for the next one. So the device
    is never idle, and the next batch is copied meanwhile.

    Two metrics are added: "examples", the batch size, and "stop", 1 if any process has received a
    signal. "stop" is computed on the mesh, so that all processes stop at the same step.
    """
    if start >= steps:
        return
    batches = iter(batches_from(start))
    any_of = jax.jit(jnp.max, out_shardings=replicated(mesh))
    batch = _next_batch(mesh, batches, start)
    for step in range(start, steps):
        stop = np.full(jax.local_device_count(), float(bool(signals)), np.float32)
        stop = jax.make_array_from_process_local_data(batch_sharding(mesh), stop)
        # The first call traces, which may copy constants to the device. Later calls must not copy.
        with jax.transfer_guard("allow" if step == start else "disallow"):
            state, metrics = step_fn(state, frozen, batch)
            metrics = {**metrics, "stop": any_of(stop)}
        metrics["examples"] = jax.tree.leaves(batch)[0].shape[0]
        if step + 1 < steps:
            batch = _next_batch(mesh, batches, step + 1)
        yield step + 1, state, metrics


def _next_batch(mesh: Mesh, batches: Iterator[Any], step: int) -> Any:
    try:
        return put_batch(mesh, next(batches))
    except StopIteration:
        raise UserError(f"the data ended before step {step}; it has to repeat") from None


@contextlib.contextmanager
def _diagnosed(
    checkpoints: Checkpoints, frozen: Any, batches_from: Callable[[int], Iterator[Any]]
) -> Iterator[None]:
    """Names the cause when a step is not finite: its batch, the frozen weights, or neither.

    If it is neither, and the step followed a checkpoint directly, that checkpoint is set aside, so
    that the same command resumes from the one before.
    """
    try:
        yield
    except NotFinite as error:
        bad = finite.beyond({"batch": next(batches_from(error.step - 1)), "frozen": frozen})
        if _in_any_process(bool(bad)):
            raise UserError(
                f"step {error.step}: {bad or 'data of another process is not finite'}; stopped, "
                "and that state is not saved: the data or the weights are damaged; fetch or make "
                "them again"
            ) from error
        checkpoints.wait()
        if checkpoints.latest() == error.step - 1:
            reason = "the step after it is not finite"
            checkpoints.set_aside(error.step - 1, reason, "so the next run starts before it")
        raise


def _in_any_process(what: bool) -> bool:
    if jax.process_count() == 1:
        return what
    return bool(np.any(multihost_utils.process_allgather(np.array(what))))


def _resume(checkpoints: Checkpoints, state: TrainState) -> TrainState:
    if checkpoints.latest() is None:
        return state
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    # Two states may not fit into memory. The first step would have donated the initial one anyway.
    jax.tree.map(lambda x: x.delete(), state)
    restored = checkpoints.restore(like)
    if jax.process_index() == 0:
        print(f"resuming at step {int(restored.step)}", file=sys.stderr)
    return restored


class _Log:
    """metrics.jsonl, TensorBoard files and the progress bar. Only process 0 writes them."""

    def __init__(self, workdir: Path, start: int, steps: int, every: int):
        self._every, self._steps = max(every, 1), steps
        self._values: list[dict[str, float]] = []
        self._timed = 0  # examples since the clock started, which is after the first step
        self._clock: float | None = None
        self._main = jax.process_index() == 0
        if not self._main or start >= steps:
            self._main = False
            return
        self._path = workdir / "metrics.jsonl"
        _drop_beyond(self._path, start)
        self._file = self._path.open("a")
        self._board = EventFile(workdir / "tensorboard", start + 1)
        slow = 0.1 if sys.stderr.isatty() else 30.0  # s; fewer lines in a log file
        self._bar = tqdm(total=steps, initial=start, mininterval=slow, dynamic_ncols=True)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            self._bar.close()
            with contextlib.suppress(OSError):  # a full disk was reported already
                self._board.close()
            with contextlib.suppress(OSError):
                self._file.close()

    def read(self, step: int, metrics: dict[str, Any]) -> bool:
        """Wait for the metrics of a step and log them; return whether to stop (see _dispatch).

        Raises:
          NotFinite: the loss or the gradient is not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        examples, stop = int(values.pop("examples")), values.pop("stop")
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values.get(name, 0.0)):
                raise NotFinite(step, f"{name} is {values[name]}")
        if self._main:
            self._add(step, values, examples)
        return bool(stop)

    def _add(self, step: int, values: dict[str, float], examples: int) -> None:
        self._values.append(values)
        now = time.perf_counter()
        if self._clock is None:
            self._clock = now
        else:
            self._timed += examples
        elapsed = now - self._clock
        rate = {"examples_per_second": self._timed / elapsed} if self._timed else {}
        rate_text = {name: f"{value:.1f}" for name, value in rate.items()}
        self._bar.set_postfix({"loss": f"{values['loss']:.4f}"} | rate_text, refresh=False)
        self._bar.update(1)
        if step % self._every and step != self._steps:
            return
        means = {name: float(np.mean([v[name] for v in self._values])) for name in values}
        line = means | rate
        try:
            self._file.write(json.dumps({"step": step} | line) + "\n")
            self._file.flush()
            self._board.add(step, line)
        except OSError as error:
            raise UserError(
                f"{self._path}: {error.strerror}; make room, then run the same command again"
            ) from error
        self._values = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restart the clock of examples/s, to exclude time that was not training."""
        self._clock, self._timed = time.perf_counter(), 0

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._main:
            tqdm.write(text, file=sys.stderr)


def _drop_beyond(path: Path, step: int) -> None:
    """Delete the lines of metrics.jsonl after ``step``, and an incomplete last line."""
    if not path.exists():
        return

    def kept(line: str) -> bool:
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, LookupError, TypeError):
            return False

    lines = [line for line in path.read_text(errors="replace").splitlines() if kept(line)]
    with files.whole_file(path) as part:
        part.write_text("".join(line + "\n" for line in lines))


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list. A second signal has its previous effect."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before: dict[int, Callable[[int, FrameType | None], Any] | int] = {}

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        # None: a handler not set by Python (JAX's preemption notice), which cannot be restored.
        before[number] = signal.signal(number, note) or signal.SIG_DFL
    try:
        yield received
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Lock workdir for this run. The lock is released when the process ends, even if killed.

    Raises:
      UserError: another run holds it, or the folder can't be written.
    """
    if jax.process_count() > 1 and (url := buckets.bucket_of(workdir)):
        raise UserError(
            f"workdir {url}: several processes write one checkpoint, which takes a shared "
            "file system; mount the bucket (gcsfuse, s3fs) and give that folder",
            argument="workdir",
        )
    with contextlib.ExitStack() as stack:
        free = True
        if jax.process_index() == 0:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((workdir / ".lock").open("w"))
            except OSError as error:
                raise UserError(
                    f"workdir {workdir}: {error.strerror}; choose another", argument="workdir"
                ) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                free = False
        if jax.process_count() > 1:
            free = bool(multihost_utils.broadcast_one_to_all(np.array(free)))
        if not free:
            raise UserError(
                f"workdir {workdir}: another run is using it; choose another", argument="workdir"
            )
        yield
