"""Weights of the measuring networks, Inception v3 and FaceNet, from the files they are known by.

Both are state dicts of PyTorch; safetensors with the same names is read without torch.
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
    blank = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), blank)["params"]
    return load_tree(abstract, open_tensors(file), rename=_rename(passed_over), dtype=jnp.float32)


def _rename(passed_over: tuple[str, ...]) -> Callable[[str], str | None]:
    def rename(name: str) -> str | None:
        return None if name in passed_over or name.endswith(".num_batches_tracked") else name

    return rename
