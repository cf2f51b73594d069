"""Orbax checkpoints of what is learned: trainable tree, its average, optimiser state and step.

One folder a step, written in the background and renamed when whole:

    DIR/<step>/params  ema  opt_state    orbax trees
    DIR/<step>/meta                      JSON: every array's shape and dtype, the fingerprint
    DIR/<step>/checksums.json            of all these files, verified when they are read

The optimiser state lies apart, so that sampling reads only the tree it needs.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from persona_jax.errors import UserError
from persona_jax.interop import orbax
from persona_jax.runtime import checksums, finite

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
        self._stack = contextlib.ExitStack()
        orbax.hush()
        with self._writing("folder could not be prepared"):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._plain = self._stack.enter_context(orbax.plainly_named(self.directory))
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                async_options=ocp.AsyncOptions(
                    barrier_sync_fn=orbax.barrier, post_finalization_callback=self._write_checksums
                ),
            )
            self._manager = ocp.CheckpointManager(self._plain, options=options)

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
        Raises UserError if the state is poisoned (:func:`poison`); here or in the next call, if the
        disk does not take it. The checkpoints before stay as they are.
        """
        trees = _trees(state)
        if reason := poison(trees):
            raise UserError(
                f"step {step}: {reason}; stopped, and that state is not saved: lower "
                "config.optimizer.learning_rate or lengthen the warm-up, then run the same command "
                "again"
            )
        meta = {"arrays": _describe(trees), "fingerprint": self.fingerprint}
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        self.wait()
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
            here = jax.process_index() or self._last is None or self._last in _steps(self.directory)
            if not here:
                raise FileNotFoundError(f"{self.directory / str(self._last)} is not there")

    def close(self) -> None:
        """Wait, then let go of the folder."""
        try:
            self.wait()
        finally:
            with self._stack, self._writing("folder could not be closed"):
                self._manager.close()

    def _write_checksums(self) -> None:
        """Called in process 0 when all files are written and the folder has not got its name."""
        name = f"{self._last}.orbax-checkpoint-tmp"
        (folder,) = (path for path in self._plain.iterdir() if path.name.startswith(name))
        checksums.write(folder, [*TREES, "meta"])

    def restore(self, state: Any) -> Any:
        """Return the newest checkpoint that can be read, as a state like ``state``; None if empty.

        state: a train state of arrays or jax.ShapeDtypeStructs with shardings; each array comes
        back with the sharding given here, whatever mesh it was saved from. A damaged checkpoint
        is set aside (renamed) with a line on stderr, and the one before it read.

        Raises UserError if the checkpoint is of another configuration, may not be read, or all are
        damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        wanted = jax.tree.map(_abstract, _trees(state))
        for step in steps:
            trees, reason = None, self._fault(step, list(wanted))
            if _everywhere(not reason):  # reading is done together, or by nobody
                try:
                    trees = self._read(step, wanted)
                    if reason := poison(trees):
                        trees = None
                except UserError:
                    raise
                except Exception as error:  # orbax and tensorstore raise many kinds
                    trees, reason = None, orbax.one_line(error)
            if _everywhere(trees is not None):
                device_step = jax.device_put(np.int32(step), state.step.sharding)
                return state.replace(step=device_step, **trees)
            if not reason:
                reason = "another process could not read it"
            self.set_aside(step, f"damaged ({reason})", "trying the one before")
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

    def _fault(self, step: int, trees: list[str]) -> str | None:
        """What this process finds wrong with its share of a checkpoint's files."""
        share = jax.process_index(), jax.process_count()
        return _fault(self.directory / str(step), trees, share)

    def set_aside(self, step: int, reason: str, then: str) -> None:
        """Move a checkpoint that is not to be used into DIR.damaged; say why, and what comes next.

        Every process calls it. Raises UserError if it cannot be moved.
        """
        self._last = None
        aside = self.directory.parent / f"{self.directory.name}.damaged" / str(step)
        if jax.process_index() == 0:
            number = 1
            while aside.exists():
                aside = aside.with_name(f"{step}.{number}")
                number += 1
            with self._writing(f"of step {step} is {reason}, and could not be moved away"):
                aside.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(aside)
            line = f"{self.directory / str(step)}: {reason}; moved to {aside}, {then}"
            print(line, file=sys.stderr)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint set aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk shows as OSError, ValueError or XlaRuntimeError
            raise UserError(
                f"{self.directory}: checkpoint {what}: {orbax.one_line(error)}; earlier "
                "ones are intact: make room or mend the folder, then run the same command again"
            ) from error


def newest_step(directory: str | Path) -> int | None:
    """Return the step of the newest whole checkpoint under ``directory``; None if there is none."""
    steps = _steps(Path(directory).absolute())
    return steps[0] if steps else None


def load_params(directory: str | Path, which: str = "params") -> Any:
    """Return the newest readable tree of parameters (see :func:`load_newest`)."""
    return load_newest(directory, which)[1]


def load_newest(directory: str | Path, which: str = "params") -> tuple[int, Any]:
    """Return the step of the newest readable checkpoint, and its tree of parameters as nested
    dicts of numpy arrays.

    which: "params", or "ema" (its running average, where the run kept one). Needs no model, no
    mesh and not the devices it was saved from; may be called while training goes on.

    Raises UserError if there is no checkpoint, no such tree in it, or all are damaged.
    """
    directory = Path(directory).absolute()

    def read(folder: Path) -> Any:
        if not (folder / which).exists() and (folder / "params").exists():
            raise UserError(f"{folder}: holds no {which!r}; train with it on, or use 'params'")
        return orbax.read_numpy(folder / which)

    return _newest(directory, which, read)


def read_fingerprint(directory: str | Path) -> dict[str, Any]:
    """What was trained, as the newest readable checkpoint says (see :class:`Checkpoints`).

    Raises UserError if there is no checkpoint, or all are damaged.
    """

    def read(folder: Path) -> dict[str, Any]:
        found = json.loads((folder / "meta/metadata").read_text())["fingerprint"]
        if not isinstance(found, dict):
            raise ValueError("does not say what was trained")
        return found

    return _newest(Path(directory).absolute(), "meta", read)[1]


def _newest(directory: Path, item: str, read: Callable[[Path], Any]) -> tuple[int, Any]:
    """The step of the newest checkpoint whose `item` is whole, and what `read` makes of it."""
    orbax.hush()
    steps = _steps(directory)
    if not steps:
        raise UserError(f"{directory}: no checkpoint here; train first, or check the folder's name")
    for step in steps:
        folder = directory / str(step)
        reason = _fault(folder, [item])
        try:
            if not reason:
                found = read(folder)
                if item not in TREES or not (reason := poison({item: found})):
                    return step, found
        except UserError:
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds
            reason = orbax.one_line(error)
        print(f"{folder}: damaged ({reason}), trying the one before", file=sys.stderr)
    raise UserError(f"{directory}: no checkpoint can be read; train again")


def _fault(folder: Path, trees: list[str], share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the files of some trees of a checkpoint; None where nothing is.

    Raises UserError where they may not be read, which is no damage.
    """
    try:
        return checksums.fault(folder, [*trees, "meta"], share)
    except OSError as error:
        raise UserError(
            f"{folder}: checkpoint cannot be read ({error.strerror}); mend that, and run the same "
            "command again"
        ) from error


def _steps(directory: Path) -> list[int]:
    """Steps of whole checkpoints, newest first (unfinished ones carry another name)."""
    try:
        names = [path.name for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{directory}: cannot be read ({error.strerror})") from error
    return sorted((int(n) for n in names if n.isdecimal() and n.isascii()), reverse=True)


def poison(trees: Mapping[str, Any]) -> str | None:
    """Names a number that neither training nor sampling recovers from; None where there is none:
    in parameters and averages what is not finite or beyond float16, in which they are exported; in
    the optimiser's state what is not finite."""
    for name, tree in sorted(trees.items(), key=lambda item: TREES.index(item[0])):
        limit = np.finfo(np.float32 if name == "opt_state" else np.float16).max
        if found := finite.beyond({name: tree}, float(limit)):
            return found
    return None


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
