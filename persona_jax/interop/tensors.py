"""Parameter trees ↔ safetensors files in torch's names and layouts. Strict both ways.

Flax modules here carry torch's names, dots included, so a tensor's name is its path joined by
dots with the last part renamed, and conversion is a rename and a transpose.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from persona_jax.errors import UserError
from persona_jax.runtime import files as files_of
from persona_jax.runtime import memory, outside

_WEIGHTS = {"kernel", "scale", "embedding"}
# Integers for the position_ids of old files, which are passed over.
_READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32")


def torch_name(path: tuple[str, ...]) -> str:
    """Torch's name of the parameter at `path`: ``("conv_in", "kernel")`` → ``conv_in.weight``."""
    return ".".join((*path[:-1], "weight") if path[-1] in _WEIGHTS else path)


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Torch's shape of a parameter of Flax shape `shape`."""
    if path[-1] != "kernel":
        return tuple(shape)
    return (shape[1], shape[0]) if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])


def to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """Flax layout → torch layout: ``[in, out]`` → ``[out, in]``, HWIO → OIHW."""
    if path[-1] != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """Torch layout → Flax layout; the inverse of :func:`to_torch`."""
    if path[-1] != "kernel":
        return array
    return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)


@runtime_checkable
class Tensors(Protocol):
    """Named tensors in torch's layout, read one at a time.

    Attributes:
      where: what to call their source in an error.
      shapes: ``{published name: shape}``.
    """

    where: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """One tensor."""


class TensorFiles:
    """The tensors of one or several safetensors files, read one at a time.

    A file is opened anew for every tensor, so that no more of it stays mapped into memory than
    the tensor at hand.

    Attributes:
      where: what to call these files in an error.
      shapes: ``{published name: shape}``.
    """

    def __init__(self, files: Iterable[Path], where: str):
        """Reads the headers of `files`; UserError names a damaged one."""
        self.where = where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, Path] = {}
        for file in files:
            with _open(file) as handle:
                for name in handle.keys():  # noqa: SIM118 (not a mapping)
                    part = handle.get_slice(name)
                    if part.get_dtype() not in _READABLE:
                        raise UserError(f"{file}: {name} has type {part.get_dtype()}, not a float")
                    self.shapes[name] = tuple(part.get_shape())
                    self._file[name] = file

    def read(self, name: str) -> np.ndarray:
        """One tensor in torch's layout."""
        with _open(self._file[name]) as handle:
            return only_floats(handle.get_tensor(name), f"{self._file[name]}: {name}")


def only_floats(array: np.ndarray, where: str) -> np.ndarray:
    """The array. Raises UserError where it is not of floating point, as weights are."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{where} has type {array.dtype}, not a float; weights are read from those")
    return array


def _open(file: Path) -> Any:
    try:
        outside.regular(file)
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: not a readable safetensors file ({error}); fetch or save it again"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a tower's folder: one file, or the shards its index names."""
    for stem in ("diffusion_pytorch_model", "model"):
        single = folder / f"{stem}.safetensors"
        index = folder / f"{stem}.safetensors.index.json"
        if single.exists():
            return [single]
        if index.exists():
            shards = _shards(index)
            missing = [shard for shard in shards if not (folder / shard).exists()]
            if missing:
                raise UserError(f"{index}: shards {', '.join(missing)} are missing; fetch them")
            return [folder / shard for shard in shards]
    raise UserError(
        f"{folder}: no diffusion_pytorch_model.safetensors or model.safetensors "
        "(or their .index.json); weights are read from safetensors"
    )


def _shards(index: Path) -> list[str]:
    try:
        shards = sorted(set(outside.read_json(index)["weight_map"].values()))
    except (OSError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a readable index of shards ({error!r:.200})") from error
    for shard in shards:
        files_of.name_below(index.parent, shard, f"{index}: shard")
    return shards


def load_tree(
    abstract: Mapping,
    files: Tensors,
    *,
    rename: Callable[[str], str | None] = lambda name: name,
    dtype: DTypeLike | None = None,
    sharding: jax.sharding.Sharding | Mapping | None = None,
) -> dict:
    """A parameter tree from files; every tensor straight to its dtype and devices.

    Args:
      abstract: the tree expected, with ``shape`` at its leaves (from ``jax.eval_shape``).
      files: the tensors.
      rename: published name → the name expected here, or None for a tensor to pass over.
      dtype: of the result; None keeps the stored one.
      sharding: for all leaves, or a tree of them; None puts them on the default device.

    Returns:
      The tree of device arrays.

    Raises:
      UserError: one message naming every missing, unexpected, misshapen and doubled tensor.
    """
    expected = traverse_util.flatten_dict(dict(abstract))
    published: dict[str, str] = {}
    twice = []
    for source in files.shapes:
        name = rename(source)
        if name in published:
            twice.append(f"{name} as {published[name]} and {source}")
        elif name is not None:
            published[name] = source
    names = {torch_name(path): path for path in expected}
    squeezable = {
        name
        for name, source in published.items()
        # A 1×1 convolution published where a dense layer is expected (old VAE attention).
        if name in names
        and files.shapes[source] == (*torch_shape(names[name], expected[names[name]].shape), 1, 1)
    }
    misshapen = [
        f"{name} {files.shapes[published[name]]} instead of {shape}"
        for name, path in names.items()
        if name in published and name not in squeezable
        if files.shapes[published[name]] != (shape := torch_shape(path, expected[path].shape))
    ]
    _refuse(
        files.where,
        missing=sorted(set(names) - set(published)),
        unexpected=sorted(set(published) - set(names)),
        misshapen=misshapen,
        twice=twice,
    )
    shardings = traverse_util.flatten_dict(dict(sharding)) if isinstance(sharding, Mapping) else {}
    out, read = {}, 0
    for name, path in names.items():
        array = files.read(published[name])
        if name in squeezable:
            array = array[..., 0, 0]
        array = from_torch(path, array).astype(dtype or array.dtype, copy=False)
        where = shardings.get(path) if shardings else sharding
        out[path] = _put(np.ascontiguousarray(array), where)
        read += array.nbytes
        if read > memory.LARGE:
            memory.give_back()
            read = 0
    return traverse_util.unflatten_dict(out)


def _put(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _refuse(where: str, **problems: list[str]) -> None:
    found = [
        f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items() if names
    ]
    if found:
        raise UserError(f"{where}: the tensors do not fit; " + "; ".join(found))


def save_tree(params: Mapping, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a parameter tree as one safetensors file in torch's names and layouts.

    metadata: texts to keep in the file's header.
    """
    flat = traverse_util.flatten_dict(dict(params))
    tensors = {
        # (ascontiguousarray would make a vector of a scalar)
        torch_name(path): np.asarray(to_torch(path, np.asarray(leaf)), order="C")
        for path, leaf in flat.items()
    }
    save_tensors(tensors, file, metadata)


def save_tensors(
    tensors: Mapping[str, np.ndarray], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes named tensors as one safetensors file. Raises OSError where the disk does not take
    it."""
    # transformers refuses a file that does not say whose layout it has.
    about = {"format": "pt", **(metadata or {})}
    with files_of.whole_file(file) as part, files_of.as_os_error(file, SafetensorError):
        save_file(dict(tensors), part, metadata=about)
