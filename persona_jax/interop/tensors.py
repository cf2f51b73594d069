"""Parameter trees ↔ safetensors files with torch's names and layouts.

Flax modules in this package have torch's names, dots included. So a tensor's name is its path
joined by dots with the last part renamed, and conversion is a rename and a transpose. Reading is
strict: every tensor must be expected, and every expected one present.
"""

import re
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

from persona_jax.errors import UserError, listed
from persona_jax.runtime import files, memory, untrusted

_WEIGHTS = {"kernel", "scale", "embedding"}
# Integer types are allowed for the position_ids in old files, which are ignored.
_READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32")


def torch_name(path: tuple[str, ...]) -> str:
    """Torch's name of a parameter: ``("conv_in", "kernel")`` → ``conv_in.weight``."""
    return ".".join((*path[:-1], "weight") if path[-1] in _WEIGHTS else path)


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Torch's shape of the parameter at `path` with Flax shape `shape`."""
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
      where: the source, for errors.
      shapes: ``{published name: shape}``.
    """

    where: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """A tensor in torch's layout."""


class TensorFiles:
    """The tensors of one or several safetensors files, read one at a time.

    The file is opened for every tensor, so that only one tensor at a time is mapped into memory.

    Attributes:
      where: the files, for errors.
      shapes: ``{published name: shape}``.
    """

    def __init__(self, files: Iterable[Path], where: str):
        """Reads the headers of `files`. UserError names a damaged file."""
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
        """A tensor in torch's layout."""
        with _open(self._file[name]) as handle:
            return only_floats(handle.get_tensor(name), f"{self._file[name]}: {name}")


def only_floats(array: np.ndarray, where: str) -> np.ndarray:
    """Returns `array`. Raises UserError if it is not floating point.

    An integer scalar is accepted, since kohya's α may be one.
    """
    scalar = array.ndim == 0 and jnp.issubdtype(array.dtype, jnp.integer)
    if not scalar and not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{where} has type {array.dtype}, not a float; weights must be floats")
    return array


def _open(file: Path) -> Any:
    try:
        untrusted.regular(file)
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: not a readable safetensors file ({error}); fetch or save it again"
        ) from error


STEMS = ("diffusion_pytorch_model", "model")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a tower's folder: a single file, or the shards that its index names.

    Files of a variant (``model.fp16.safetensors``) are taken if there are no others.

    Raises:
      UserError: there are none, or only several variants, or shards are missing.
    """
    for stem in STEMS:
        if paths := _weights(folder, f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            return paths
    variants = _variants(folder)
    if len(variants) > 1:
        raise UserError(
            f"{folder}: weights of the variants {listed(sorted(variants))}, and none without; "
            "rename the ones to read, without the variant"
        )
    for variant in variants:
        for stem in STEMS:
            names = f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json"
            if paths := _weights(folder, *names):
                return paths
    others = sorted(x.name for x in folder.glob("*") if x.suffix in (".bin", ".ckpt", ".msgpack"))
    hint = f"; there is {listed(others)}: save it as safetensors (diffusers does)"
    raise UserError(
        f"{folder}: no diffusion_pytorch_model.safetensors or model.safetensors "
        f"(or their .index.json){hint if others else '; weights are read from safetensors'}"
    )


def _variants(folder: Path) -> set[str]:
    """Variants of weight files in a folder, by diffusers' names, such as ``fp16``."""
    stems = "|".join(STEMS)
    shapes = rf"(?:{stems})\.(?:(\w+)\.safetensors|safetensors\.index\.(\w+)\.json)"
    matches = (re.fullmatch(shapes, path.name) for path in folder.glob("*"))
    return {match[1] or match[2] for match in matches if match}


def _weights(folder: Path, single: str, index: str) -> list[Path]:
    if (folder / single).exists():
        return [folder / single]
    if not (folder / index).exists():
        return []
    shards = _shards(folder / index)
    if missing := [shard for shard in shards if not (folder / shard).exists()]:
        raise UserError(f"{folder / index}: shards {listed(missing)} are missing; fetch them")
    return [folder / shard for shard in shards]


def _shards(index: Path) -> list[str]:
    try:
        shards = sorted(set(untrusted.read_json(index)["weight_map"].values()))
    except (OSError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a readable index of shards ({error!r:.200})") from error
    for shard in shards:
        files.name_below(index.parent, shard, f"{index}: shard")
    return shards


def load_tree(
    abstract: Mapping,
    files: Tensors,
    *,
    rename: Callable[[str], str | None] = lambda name: name,
    dtype: DTypeLike | None = None,
    sharding: jax.sharding.Sharding | Mapping | None = None,
) -> dict:
    """Reads a parameter tree from files, tensor by tensor, directly to its dtype and devices.

    Args:
      abstract: the expected tree, with ``shape`` at its leaves (from ``jax.eval_shape``).
      files: the tensors.
      rename: published name → expected name, or None for a tensor to ignore.
      dtype: of the result; None keeps the stored one.
      sharding: for all leaves, or a tree of shardings; None puts them on the default device.

    Returns:
      The tree of device arrays.

    Raises:
      UserError: tensors are missing, unexpected, misshapen or there twice (the error names the
        first of each, its details all), or the file is of a known other kind, which is named.
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
        # A 1×1 convolution in place of the expected dense layer (old VAE attention).
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
        files.shapes,
        missing=sorted(set(names) - set(published)),
        unexpected=sorted(set(published) - set(names)),
        misshapen=misshapen,
        twice=twice,
    )
    if isinstance(sharding, Mapping):
        shardings = traverse_util.flatten_dict(dict(sharding))
    else:
        shardings = dict.fromkeys(expected, sharding)
    out, read = {}, 0
    for name, path in names.items():
        array = files.read(published[name])
        if name in squeezable:
            array = array[..., 0, 0]
        array = from_torch(path, array).astype(dtype or array.dtype, copy=False)
        out[path] = _put(np.ascontiguousarray(array), shardings.get(path))
        read += array.nbytes
        if read > memory.LARGE:
            memory.give_back()
            read = 0
    return traverse_util.unflatten_dict(out)


def _put(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _refuse(where: str, names: Iterable[str], **problems: list[str]) -> None:
    problems = {kind: lines for kind, lines in problems.items() if lines}
    if problems:
        text = "; ".join(
            f"{len(lines)} {kind}: {listed(lines)}" for kind, lines in problems.items()
        )
        raise UserError(
            f"{where}: {foreign_kind(names) or f'the tensors do not fit; {text}'}",
            [f"{kind}: {line}" for kind, lines in problems.items() for line in lines],
        )


_FOREIGN = {
    "_orig_mod.": "saved from a model that torch.compile had wrapped (names start with _orig_mod.);"
    " save its _orig_mod, or take the prefix off the names",
    "module.": "saved from a model that DistributedDataParallel had wrapped (names start with "
    "module.); save its module, or take the prefix off the names",
    "model.diffusion_model.": "a checkpoint in Stability's single-file layout; open it with "
    "diffusers (StableDiffusionPipeline.from_single_file) and save_pretrained a folder",
    "image_proj_model.": "a raw checkpoint of IP-Adapter's trainer; rename image_proj_model. to "
    "image_proj. and adapter_modules. to ip_adapter., and leave unet. out",
    "adapter_modules.": "a raw checkpoint of IP-Adapter's trainer; rename image_proj_model. to "
    "image_proj. and adapter_modules. to ip_adapter., and leave unet. out",
    "state_dict.": "a trainer's whole checkpoint; save what is under state_dict alone",
    "optimizer": "a trainer's whole checkpoint, with its optimizer; save the weights alone",
    "base_model.model.": "a LoRA in PEFT's layout; load it as a LoRA",
    "lora_unet_": "a LoRA in kohya's layout; load it as a LoRA",
}


def foreign_kind(names: Iterable[str]) -> str:
    """Describes a known kind of file that cannot be read, by its tensors' names; "" if unknown."""
    for name in names:
        for prefix, description in _FOREIGN.items():
            if name.startswith(prefix):
                return f"{description} ({name:.80})"
    return ""


def save_tree(params: Mapping, file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a parameter tree as a safetensors file with torch's names and layouts.

    Args:
      params: the tree.
      file: where to write.
      metadata: texts for the file's header.

    Raises:
      OSError: the file cannot be written.
    """
    flat = traverse_util.flatten_dict(dict(params))
    tensors = {
        # Not ascontiguousarray, which turns a scalar into a vector.
        torch_name(path): np.asarray(to_torch(path, np.asarray(leaf)), order="C")
        for path, leaf in flat.items()
    }
    save_tensors(tensors, file, metadata)


def save_tensors(
    tensors: Mapping[str, np.ndarray], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes named tensors as a safetensors file. Raises OSError if it cannot be written."""
    # transformers refuses files without "format".
    about = {"format": "pt", **(metadata or {})}
    with files.whole_file(file) as part, files.as_os_error(file, SafetensorError):
        save_file(dict(tensors), part, metadata=about)
