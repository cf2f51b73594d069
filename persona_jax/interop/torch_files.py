"""Files of tensors, PyTorch's own among them.

Those are pickles: torch reads them with ``weights_only``, which makes tensors and runs nothing.
"""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from persona_jax.errors import UserError
from persona_jax.interop.tensors import TensorFiles, Tensors


def open_tensors(file: Path) -> Tensors:
    """The tensors of one file: safetensors, or anything else as torch's own."""
    named = file.suffix.lower() == ".safetensors"
    return TensorFiles([file], str(file)) if named else StateDict(file)


class StateDict:
    """A PyTorch state dict, as :class:`persona_jax.interop.tensors.Tensors`; of nested ones, the
    names are joined by dots."""

    def __init__(self, file: Path):
        """Reads `file`; UserError where torch is missing or the file is no state dict."""
        try:
            import torch
        except ImportError as error:
            raise UserError(
                f"{file}: reading a PyTorch file takes torch; pip install torch, or give the same "
                "tensors as .safetensors"
            ) from error
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            _refuse_trainers(file, state)
            # (numpy knows no bfloat16)
            self._tensors = {
                name: (x.float() if x.dtype == torch.bfloat16 else x).numpy()
                for name, x in _flat(state)
            }
        except pickle.UnpicklingError as error:
            raise UserError(f"{file}: holds more than tensors, and is not read for that") from error
        except (OSError, RuntimeError, ValueError, EOFError, AttributeError, TypeError) as error:
            raise UserError(f"{file}: not a readable state dict ({_one_line(error)})") from error
        except (KeyError, IndexError, OverflowError) as error:  # damaged inside
            raise UserError(f"{file}: not a readable state dict ({error!r:.200})") from error
        self.where = str(file)
        self.shapes = {name: tuple(array.shape) for name, array in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor in torch's layout."""
        return self._tensors[name]


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
