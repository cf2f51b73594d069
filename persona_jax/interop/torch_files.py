"""Files of tensors, PyTorch's own among them.

Those are pickles: torch reads them with ``weights_only``, which makes tensors and runs nothing.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from persona_jax.errors import UserError
from persona_jax.interop.tensors import TensorFiles, Tensors, only_floats
from persona_jax.runtime import checksums, outside


def open_tensors(file: Path) -> Tensors:
    """The tensors of one file: safetensors, or anything else as torch's own.

    Raises:
      UserError: it cannot be read, or is not as the checksums beside it say.
    """
    checksums.verify(file.parent, [file.name], "fetch or export it again")
    named = file.suffix.lower() == ".safetensors"
    return TensorFiles([file], str(file)) if named else StateDict(file)


class StateDict:
    """A PyTorch state dict, as :class:`persona_jax.interop.tensors.Tensors`; of nested ones, the
    names are joined by dots. Tensors are read when they are asked for, not before."""

    def __init__(self, file: Path):
        """Reads what `file` holds; UserError where torch is missing or it is no state dict."""
        try:
            import torch
        except ImportError as error:
            raise UserError(
                f"{file}: reading a PyTorch file takes torch; pip install torch, or give the same "
                "tensors as .safetensors"
            ) from error
        self.where = str(file)
        try:
            outside.regular(file)
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
            raise UserError(f"{file}: holds more than tensors, and is not read for that") from error
        except (OSError, RuntimeError, ValueError, EOFError, AttributeError, TypeError) as error:
            raise UserError(f"{file}: not a readable state dict ({_one_line(error)})") from error
        except (LookupError, ArithmeticError, AssertionError, RecursionError) as error:  # damaged
            raise UserError(f"{file}: not a readable state dict ({error!r:.200})") from error
        if expanded:
            raise UserError(
                f"{file}: {expanded[0]} is {self.shapes[expanded[0]]}, more than the file holds of "
                "it; save it again as it is, or as .safetensors"
            )

    def read(self, name: str) -> np.ndarray:
        """One tensor in torch's layout."""
        import torch

        tensor = self._tensors[name]
        if tensor.dtype == torch.bfloat16:  # numpy has none
            tensor = tensor.float()
        return only_floats(tensor.numpy(), f"{self.where}: {name}")


def _is_stored_zip(file: Path) -> bool:
    """Whether a file is a zip archive, as torch writes them; older ones are plain pickles.

    Raises:
      ValueError: one whose content is compressed, and might be of any size; torch never does so.
    """
    try:
        if not zipfile.is_zipfile(file):  # which raises, of archives of several disks
            return False
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(str(error)) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its content is compressed, which torch does not do")
    if sum(member.file_size for member in members) > file.stat().st_size:
        raise ValueError("it says that it holds more than it does")
    return True


_TRAINERS = ("state_dict", "optimizer", "optimizer_states", "optimizer_state_dict", "global_step")


def _refuse_trainers(file: Path, state: Any) -> None:
    """A trainer's checkpoint holds more than weights."""
    found = [key for key in _TRAINERS if isinstance(state, Mapping) and key in state]
    if found:
        raise UserError(
            f"{file}: a trainer's whole checkpoint (it has {', '.join(found)}); save the weights "
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
