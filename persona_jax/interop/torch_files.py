"""Tensor files: safetensors, and PyTorch's own format.

The latter are pickles. torch loads them with ``weights_only``, which executes no code from the
file.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from persona_jax.errors import UserError
from persona_jax.interop.tensors import TensorFiles, Tensors, only_floats
from persona_jax.runtime import checksums, untrusted


def open_tensors(file: Path) -> Tensors:
    """The tensors of a file: safetensors by its suffix, else PyTorch's own format.

    Raises:
      UserError: it cannot be read, or does not match the checksums in its folder.
    """
    checksums.verify(file.parent, [file.name], "fetch or export it again")
    named = file.suffix.lower() == ".safetensors"
    return TensorFiles([file], str(file)) if named else StateDict(file)


class StateDict:
    """A PyTorch state dict as :class:`persona_jax.interop.tensors.Tensors`.

    Names in nested dicts are joined by dots. Tensors are read on demand.
    """

    def __init__(self, file: Path):
        """Opens `file`. UserError: torch is missing, or the file is not a state dict."""
        try:
            import torch
        except ImportError as error:
            raise UserError(
                f"{file}: reading a PyTorch file needs torch; pip install torch, or give the same "
                "tensors as .safetensors"
            ) from error
        self.where = str(file)
        try:
            untrusted.regular(file)
            zipped = _is_stored_zip(file)
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
            _refuse_trainers(file, state)
            self._tensors = dict(_flat(state))
            self.shapes = {name: tuple(x.shape) for name, x in self._tensors.items()}
            expanded = [
                name
                for name, x in self._tensors.items()
                if x.numel() * x.element_size() > x.untyped_storage().nbytes()
            ]
        except pickle.UnpicklingError as error:
            raise UserError(f"{file}: holds more than tensors, which could run code") from error
        except (OSError, RuntimeError, ValueError, EOFError, AttributeError, TypeError) as error:
            raise UserError(f"{file}: not a readable state dict ({_one_line(error)})") from error
        except (LookupError, ArithmeticError, AssertionError, RecursionError) as error:  # damaged
            raise UserError(f"{file}: not a readable state dict ({error!r:.200})") from error
        if expanded:
            raise UserError(
                f"{file}: {expanded[0]} is {self.shapes[expanded[0]]}, more than the file holds "
                "(an expanded view); save a contiguous copy, or .safetensors"
            )

    def read(self, name: str) -> np.ndarray:
        """A tensor in torch's layout."""
        import torch

        tensor = self._tensors[name]
        if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16
            tensor = tensor.float()
        return only_floats(tensor.numpy(), f"{self.where}: {name}")


def _is_stored_zip(file: Path) -> bool:
    """Whether a file is a zip archive, as torch writes now; older files are plain pickles.

    Raises:
      ValueError: the archive is compressed, which torch never does, and might unpack to any size.
    """
    try:
        if not zipfile.is_zipfile(file):  # raises for multi-disk archives
            return False
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(str(error)) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its content is compressed, which torch does not do")
    if sum(member.file_size for member in members) > file.stat().st_size:
        raise ValueError("it declares more bytes than it has")
    return True


_TRAINERS = ("state_dict", "optimizer", "optimizer_states", "optimizer_state_dict", "global_step")


def _refuse_trainers(file: Path, state: Any) -> None:
    """Raises UserError for a trainer's checkpoint, which holds more than weights."""
    keys = [key for key in _TRAINERS if isinstance(state, Mapping) and key in state]
    if keys:
        raise UserError(
            f"{file}: a trainer's whole checkpoint (it has {', '.join(keys)}); save the weights "
            "alone, as .safetensors"
        )


def _flat(state: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
