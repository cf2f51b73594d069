"""Orbax checkpoints of what is learned: trainable tree, its average, optimiser state and step.

One folder a step, written in the background and renamed when whole:

    DIR/<step>/params  ema  opt_state    orbax trees
    DIR/<step>/meta                      JSON: every array's shape and dtype, the fingerprint

The optimiser state lies apart, so that sampling reads only the tree it needs.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from persona_jax.errors import UserError

TREES = ("params", "ema", "opt_state")
LISTED = 12  # differences named in one error


class Checkpoints:
    """The checkpoints of one run, newest ``keep`` of them.

    fingerprint: plain values that say what was trained (method, widths, …); they are saved, and a
    checkpoint whose fingerprint differs is refused. Use as a context manager, or close() it.
    """

    def __init__(
        self, directory: str | Path, keep: int = 2, fingerprint: Mapping[str, Any] | None = None
    ):
        """Open the folder, made where absent; leftovers of interrupted saves are removed."""
        self.directory = Path(directory).absolute()
        self.fingerprint = dict(fingerprint or {})
        self._last = None
        _hush()
        with self._writing("folder could not be prepared"):
            self.directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, async_options=ocp.AsyncOptions(barrier_sync_fn=_barrier)
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        """Return itself."""
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Close."""
        # An error on its way out must not be hidden by one of closing.
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext():
            self.close()

    def save(self, step: int, state: Any) -> None:
        """Save the state (fields params, opt_state, ema or None) as that of ``step``.

        Returns once the arrays are copied off the devices, so the state may be donated next.
        Raises UserError, here or in the next call, if the disk does not take it; the checkpoints
        before stay as they are.
        """
        trees = _trees(state)
        meta = {"arrays": _describe(trees), "fingerprint": self.fingerprint}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        with self._writing(f"of step {self._last} could not be written"):
            self._manager.wait_until_finished()
        self._last = step
        with self._writing(f"of step {step} could not be written"):
            self._manager.save(
                step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)), force=True
            )

    def latest(self) -> int | None:
        """Return the newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Return when everything saved is on the disk. Raises UserError if it could not be."""
        with self._writing(f"of step {self._last} could not be written"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, then let go of the folder."""
        try:
            self.wait()
        finally:
            with self._writing("folder could not be closed"):
                self._manager.close()

    def restore(self, state: Any) -> Any:
        """Return the newest checkpoint that can be read, as a state like ``state``; None if empty.

        state: a train state of arrays or jax.ShapeDtypeStructs with shardings; each array comes
        back with the sharding given here, whatever mesh it was saved from. A damaged checkpoint
        is set aside (renamed) with a line on stderr, and the one before it read.

        Raises UserError if the checkpoint is of another configuration, or all are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        wanted = jax.tree.map(_abstract, _trees(state))
        for step in steps:
            try:
                trees = self._read(step, wanted)
            except UserError:
                raise
            except Exception as error:  # orbax and tensorstore raise many kinds
                trees, reason = None, _one_line(error)
            if _everywhere(trees is not None):
                device_step = jax.device_put(np.int32(step), state.step.sharding)
                return state.replace(step=device_step, **trees)
            if trees is not None:
                reason = "another process could not read it"
            self._set_aside(step, reason)
        if steps:
            raise UserError(
                f"{self.directory}: no checkpoint can be read; remove the folder to start over"
            )
        return None

    def _read(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        differences = _differences(found["meta"]["arrays"], _describe(wanted)) + [
            f"{key}: saved {found['meta']['fingerprint'].get(key)!r}, now {value!r}"
            for key, value in self.fingerprint.items()
            if found["meta"]["fingerprint"].get(key) != value
        ]
        if differences:
            more = len(differences) - LISTED
            listed = differences[:LISTED] + ([f"and {more} more"] if more > 0 else [])
            raise UserError(
                f"{self.directory / str(step)}: checkpoint of another configuration "
                f"({'; '.join(listed)}); use another workdir or the configuration it was made with"
            )
        items = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in wanted}

    def _set_aside(self, step: int, reason: str) -> None:
        aside = self.directory.parent / f"{self.directory.name}.damaged" / str(step)
        if jax.process_index() == 0:
            print(
                f"{self.directory / str(step)}: damaged ({reason}); moved to {aside}, "
                "trying the one before",
                file=sys.stderr,
            )
            number = 1
            while aside.exists():
                aside = aside.with_name(f"{step}.{number}")
                number += 1
            aside.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint set aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk shows as OSError, ValueError or XlaRuntimeError
            raise UserError(
                f"{self.directory}: checkpoint {what}: {_one_line(error)}; earlier "
                "ones are intact: make room or mend the folder, then run the same command again"
            ) from error


def newest_step(directory: str | Path) -> int | None:
    """Return the step of the newest whole checkpoint under ``directory``; None if there is none."""
    steps = _steps(Path(directory).absolute())
    return steps[0] if steps else None


def load_params(directory: str | Path, which: str = "params") -> Any:
    """Return the newest readable tree of parameters as nested dicts of numpy arrays.

    which: "params", or "ema" (its running average, where the run kept one). Needs no model, no
    mesh and not the devices it was saved from; may be called while training goes on.

    Raises UserError if there is no checkpoint, no such tree in it, or all are damaged.
    """
    _hush()
    directory = Path(directory).absolute()
    steps = _steps(directory)
    if not steps:
        raise UserError(f"{directory}: no checkpoint here; train first, or check the folder's name")
    for step in steps:
        folder = directory / str(step)
        if not (folder / which).exists() and (folder / "params").exists():
            raise UserError(f"{folder}: holds no {which!r}; train with it on, or use 'params'")
        try:
            return _read_numpy(folder / which)
        except Exception as error:
            print(f"{folder}: damaged ({_one_line(error)}), trying the one before", file=sys.stderr)
    raise UserError(f"{directory}: no checkpoint can be read; train again")


def read_fingerprint(directory: str | Path) -> dict[str, Any]:
    """What was trained, as the newest checkpoint says (see :class:`Checkpoints`).

    Raises UserError if there is no checkpoint, or it does not say.
    """
    directory = Path(directory).absolute()
    steps = _steps(directory)
    if not steps:
        raise UserError(f"{directory}: no checkpoint here; train first, or check the folder's name")
    try:
        return json.loads((directory / str(steps[0]) / "meta/metadata").read_text())["fingerprint"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}/{steps[0]}: does not say what was trained") from error


def _steps(directory: Path) -> list[int]:
    """Steps of whole checkpoints, newest first (unfinished ones carry another name)."""
    if not directory.is_dir():
        return []
    return sorted((int(p.name) for p in directory.iterdir() if p.name.isdecimal()), reverse=True)


def _read_numpy(folder: Path) -> Any:
    handler = ocp.PyTreeCheckpointHandler()
    try:
        names = jax.tree.map(lambda _: "", handler.metadata(folder).tree)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        return handler.restore(folder, args=ocp.args.PyTreeRestore(names, restore_args=as_numpy))
    finally:
        handler.close()


def _trees(state: Any) -> dict[str, Any]:
    """The parts of a state that hold arrays (an optimiser may keep nothing)."""
    return {name: getattr(state, name) for name in TREES if jax.tree.leaves(getattr(state, name))}


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _describe(trees: dict[str, Any]) -> dict[str, str]:
    """{"params.a.b": "float32[3,4]"} for every array."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
    }


def _differences(saved: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Name what differs, the trainable tree's own names before the optimiser's copies of them."""
    lines = [f"missing {name}" for name in wanted.keys() - saved.keys()]
    lines += [f"unexpected {name}" for name in saved.keys() - wanted.keys()]
    lines += [
        f"{name}: saved {saved[name]}, expected {wanted[name]}"
        for name in wanted.keys() & saved.keys()
        if saved[name] != wanted[name]
    ]
    return sorted(lines, key=lambda line: ("opt_state." in line, "ema." in line, line))


def _everywhere(fine: bool) -> bool:
    """Whether every process says yes."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.array(fine))))


def _barrier(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier between processes, but one whose writing has failed does not wait there.

    The others wait elsewhere for what it could not write, all of them for minutes; so it raises
    what went wrong, ends, and whoever started the processes ends the others.
    """
    if error := sys.exc_info()[1]:
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _hush() -> None:
    """Keep a failed read or write to the one line of the exception it also raises.

    Orbax's threads log its traceback once more, and tensorstore's, finding the event loop gone,
    print that as an exception nobody can catch.
    """
    logger = logging.getLogger("absl")
    if _not_orbax in logger.filters:
        return
    logger.addFilter(_not_orbax)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _one_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    # Tensorstore begins with what it was doing and ends with why it could not.
    return text if len(text) <= 240 else f"{text[:80]} … {text[-150:]}"
