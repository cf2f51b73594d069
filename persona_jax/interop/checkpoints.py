"""Orbax checkpoints of the training state: trainable tree, its average, optimiser state, step.

One folder per step, written in the background and renamed when complete:

    DIR/<step>/params  ema  opt_state    orbax trees
    DIR/<step>/meta                      JSON: every array's shape and dtype, the fingerprint
    DIR/<step>/checksums.json            of all these files, verified on reading

The trees are separate, so that sampling reads only the one it needs.
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
LISTED = 12  # number of differences named in an error


class Checkpoints:
    """The newest checkpoints of one run. A context manager; else call close().

    Args:
      directory: holds one folder per checkpoint.
      keep: number of checkpoints to keep.
      fingerprint: plain values that identify what is trained (method, widths, …). They are saved,
        and a checkpoint with another fingerprint is refused.
    """

    def __init__(
        self, directory: str | Path, keep: int = 2, fingerprint: Mapping[str, Any] | None = None
    ):
        """Create or open the folder, and remove what interrupted saves have left."""
        self.directory = Path(directory).absolute()
        self.fingerprint = dict(fingerprint or {})
        self._last: int | None = None
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
        # An error while closing must not replace the one that is being raised.
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext():
            self.close()

    def save(self, step: int, state: Any) -> None:
        """Save the state (fields params, opt_state, ema or None) as that of ``step``.

        Returns when the arrays are copied off the devices, so that the state may be donated next.

        Raises:
          UserError: the state has unusable numbers (:func:`poison`), or, here or in the next call,
            it cannot be written. Earlier checkpoints are not changed.
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
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Wait until everything saved is on the disk. Raises UserError if it cannot be written."""
        with self._writing(f"of step {self._last} could not be written"):
            self._manager.wait_until_finished()
            done = jax.process_index() or self._last is None or self._last in _steps(self.directory)
            if not done:
                raise FileNotFoundError(f"{self.directory / str(self._last)} is not there")

    def close(self) -> None:
        """Wait for pending saves, then release the folder."""
        try:
            self.wait()
        finally:
            with self._stack, self._writing("folder could not be closed"):
                self._manager.close()

    def _write_checksums(self) -> None:
        """Called in process 0 when all files are written, before the folder gets its final name."""
        name = f"{self._last}.orbax-checkpoint-tmp"
        (folder,) = (path for path in self._plain.iterdir() if path.name.startswith(name))
        checksums.write(folder, [*TREES, "meta"])

    def restore(self, state: Any) -> Any:
        """Read the newest readable checkpoint.

        A damaged checkpoint is set aside (moved, with a line on stderr) and the one before is read.

        Args:
          state: a training state of arrays or jax.ShapeDtypeStructs with shardings. The arrays read
            get these shardings, whatever mesh they were saved from.

        Returns:
          A state like ``state``, or None if there is no checkpoint.

        Raises:
          UserError: the checkpoint is of another configuration or may not be read, or all are
            damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        wanted = jax.tree.map(_abstract, _trees(state))
        for step in steps:
            trees, reason = None, self._fault(step, list(wanted))
            if _everywhere(not reason):  # all processes read, or none
                try:
                    trees = self._read(step, wanted)
                    if reason := poison(trees):
                        trees = None
                except UserError:
                    raise
                except Exception as error:  # orbax and tensorstore raise many kinds
                    trees, reason = None, orbax.one_line(error)
            if _everywhere(trees is not None):
                assert trees is not None  # "everywhere" includes this process
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
        saved = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        differences = _differences(saved["meta"]["arrays"], _describe(wanted)) + [
            f"{key}: saved {saved['meta']['fingerprint'].get(key)!r}, now {value!r}"
            for key, value in self.fingerprint.items()
            if saved["meta"]["fingerprint"].get(key) != value
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
        """The fault in this process's share of a checkpoint's files, or None."""
        share = jax.process_index(), jax.process_count()
        return _fault(self.directory / str(step), trees, share)

    def set_aside(self, step: int, reason: str, then: str) -> None:
        """Move an unusable checkpoint into DIR.damaged and print a line on stderr.

        All processes must call it.

        Args:
          step: of the checkpoint.
          reason: why it is unusable.
          then: what happens next.

        Raises:
          UserError: it cannot be moved.
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
                "ones are intact: make room or repair the folder, then run the same command again"
            ) from error


def newest_step(directory: str | Path) -> int | None:
    """The step of the newest complete checkpoint under ``directory``; None if there is none."""
    steps = _steps(Path(directory).absolute())
    return steps[0] if steps else None


def load_params(directory: str | Path, which: str = "params") -> Any:
    """The newest readable tree of parameters; see :func:`load_newest`."""
    return load_newest(directory, which)[1]


def load_newest(directory: str | Path, which: str = "params") -> tuple[int, Any]:
    """The step and the parameters of the newest readable checkpoint.

    It needs no model, no mesh, and not the devices that it was saved from. It may be called during
    training.

    Args:
      directory: of the checkpoints.
      which: "params", or "ema" (their moving average, if the run kept one).

    Returns:
      The step, and nested dicts of numpy arrays.

    Raises:
      UserError: there is no checkpoint, it has no such tree, or all are damaged.
    """
    directory = Path(directory).absolute()

    def read(folder: Path) -> Any:
        if not (folder / which).exists() and (folder / "params").exists():
            raise UserError(f"{folder}: holds no {which!r}; train with it on, or use 'params'")
        return orbax.read_numpy(folder / which)

    return _newest(directory, which, read)


def read_fingerprint(directory: str | Path) -> dict[str, Any]:
    """The fingerprint in the newest readable checkpoint (see :class:`Checkpoints`).

    Raises:
      UserError: there is no checkpoint, or all are damaged.
    """

    def read(folder: Path) -> dict[str, Any]:
        fingerprint = json.loads((folder / "meta/metadata").read_text())["fingerprint"]
        if not isinstance(fingerprint, dict):
            raise ValueError("has no fingerprint")
        return fingerprint

    return _newest(Path(directory).absolute(), "meta", read)[1]


def _newest(directory: Path, item: str, read: Callable[[Path], Any]) -> tuple[int, Any]:
    """The step of the newest checkpoint whose `item` is readable, and the result of `read`."""
    orbax.hush()
    steps = _steps(directory)
    if not steps:
        raise UserError(f"{directory}: no checkpoint here; train first, or check the folder's name")
    for step in steps:
        folder = directory / str(step)
        reason = _fault(folder, [item])
        try:
            if not reason:
                content = read(folder)
                if item not in TREES or not (reason := poison({item: content})):
                    return step, content
        except UserError:
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds
            reason = orbax.one_line(error)
        print(f"{folder}: damaged ({reason}), trying the one before", file=sys.stderr)
    raise UserError(f"{directory}: no checkpoint can be read; train again")


def _fault(folder: Path, trees: list[str], share: tuple[int, int] = (0, 1)) -> str | None:
    """The fault in the files of some trees of a checkpoint; None if they are intact.

    Raises:
      UserError: they may not be read, which does not count as damage.
    """
    try:
        return checksums.fault(folder, [*trees, "meta"], share)
    except OSError as error:
        raise UserError(
            f"{folder}: checkpoint cannot be read ({error.strerror}); fix that, and run the same "
            "command again"
        ) from error


def _steps(directory: Path) -> list[int]:
    """Steps of complete checkpoints, newest first (incomplete ones have another name)."""
    try:
        names = [path.name for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{directory}: cannot be read ({error.strerror})") from error
    return sorted((int(n) for n in names if n.isdecimal() and n.isascii()), reverse=True)


def poison(trees: Mapping[str, Any]) -> str | None:
    """Names a number that neither training nor sampling can recover from; None if there is none.

    In parameters and their average, these are numbers that are not finite or exceed float16, in
    which they are exported; in the optimiser's state, numbers that are not finite.
    """
    for name, tree in sorted(trees.items(), key=lambda item: TREES.index(item[0])):
        limit = np.finfo(np.float32 if name == "opt_state" else np.float16).max
        if fault := finite.beyond({name: tree}, float(limit)):
            return fault
    return None


def _trees(state: Any) -> dict[str, Any]:
    """The trees of a state that have arrays (an optimiser's state may have none)."""
    return {name: getattr(state, name) for name in TREES if jax.tree.leaves(getattr(state, name))}


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _describe(trees: dict[str, Any]) -> dict[str, str]:
    """Dtype and shape of every array: {"params.a.b": "float32[3,4]"}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
    }


def _differences(saved: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Lists the differences, the trainable tree's before those of its copies in the optimiser."""
    lines = [f"missing {name}" for name in wanted.keys() - saved.keys()]
    lines += [f"unexpected {name}" for name in saved.keys() - wanted.keys()]
    lines += [
        f"{name}: saved {saved[name]}, expected {wanted[name]}"
        for name in wanted.keys() & saved.keys()
        if saved[name] != wanted[name]
    ]
    return sorted(lines, key=lambda line: ("opt_state." in line, "ema." in line, line))


def _everywhere(fine: bool) -> bool:
    """Whether `fine` is true in every process."""
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.array(fine))))
