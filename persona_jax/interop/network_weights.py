"""Weights of the measuring networks, Inception v3 and FaceNet, from the files they are known by.

Both are state dicts of PyTorch. Those files are pickles: torch reads them with ``weights_only``,
which makes tensors and runs nothing. safetensors with the same names is read without torch.
"""

import pickle
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from persona_jax.errors import UserError
from persona_jax.interop.tensors import TensorFiles, load_tree
from persona_jax.models import facenet, inception


class StateDict:
    """A PyTorch state dict, as :class:`persona_jax.interop.tensors.Tensors`."""

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
            self._tensors = {str(k): v.numpy() for k, v in state.items()}
        except (OSError, RuntimeError, ValueError, EOFError, AttributeError, TypeError) as error:
            raise UserError(f"{file}: not a readable state dict ({_one_line(error)})") from error
        except pickle.UnpicklingError as error:
            raise UserError(f"{file}: holds more than tensors, and is not read for that") from error
        self.where = str(file)
        self.shapes = {name: tuple(array.shape) for name, array in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor in torch's layout."""
        return self._tensors[name]


def load_inception(file: str | Path) -> dict:
    """:class:`persona_jax.models.inception.InceptionV3`'s parameters, float32.

    Raises:
      UserError: not readable, or not those tensors: all that differ are named.
    """
    return _load(inception.InceptionV3(), inception.SIDE, Path(file), passed_over=("fc.bias",))


def load_facenet(file: str | Path) -> dict:
    """:class:`persona_jax.models.facenet.FaceNet`'s parameters, float32.

    The classifier of the people it was trained on is passed over.

    Raises:
      UserError: not readable, or not those tensors: all that differ are named.
    """
    passed_over = ("logits.weight", "logits.bias")
    return _load(facenet.FaceNet(), facenet.SIDE, Path(file), passed_over)


def _load(module: nn.Module, side: int, file: Path, passed_over: tuple[str, ...]) -> dict:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    files = TensorFiles([file], str(file)) if file.suffix == ".safetensors" else StateDict(file)
    blank = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), blank)["params"]
    return load_tree(abstract, files, rename=_rename(passed_over), dtype=jnp.float32)


def _rename(passed_over: tuple[str, ...]) -> Callable[[str], str | None]:
    def rename(name: str) -> str | None:
        return None if name in passed_over or name.endswith(".num_batches_tracked") else name

    return rename


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
