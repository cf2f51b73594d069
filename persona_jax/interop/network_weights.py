"""Weights of the evaluation networks, Inception v3 and FaceNet, from their published files.

Both are PyTorch state dicts. safetensors with the same names can be read without torch.
"""

from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from persona_jax.errors import UserError
from persona_jax.interop.tensors import load_tree
from persona_jax.interop.torch_files import open_tensors
from persona_jax.models import facenet, inception


def load_inception(file: str | Path) -> dict:
    """Parameters of :class:`persona_jax.models.inception.InceptionV3`, float32.

    Raises:
      UserError: the file cannot be read, or tensors do not fit (named).
    """
    return _load(inception.InceptionV3(), inception.SIDE, Path(file), ignored=("fc.bias",))


def load_facenet(file: str | Path) -> dict:
    """Parameters of :class:`persona_jax.models.facenet.FaceNet`, float32.

    The classification layer over its training identities is ignored.

    Raises:
      UserError: the file cannot be read, or tensors do not fit (named).
    """
    ignored = ("logits.weight", "logits.bias")
    return _load(facenet.FaceNet(), facenet.SIDE, Path(file), ignored)


def _load(module: nn.Module, side: int, file: Path, ignored: tuple[str, ...]) -> dict:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    blank = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), blank)["params"]
    return load_tree(abstract, open_tensors(file), rename=_rename(ignored), dtype=jnp.float32)


def _rename(ignored: tuple[str, ...]) -> Callable[[str], str | None]:
    def rename(name: str) -> str | None:
        return None if name in ignored or name.endswith(".num_batches_tracked") else name

    return rename
