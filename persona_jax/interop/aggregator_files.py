"""Aggregators as files that PyTorch users can read without this package or JAX."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from persona_jax.errors import UserError
from persona_jax.interop import folders, tensors
from persona_jax.models import aggregators
from persona_jax.models.aggregators import Aggregator
from persona_jax.runtime import checksums, finite


def save_aggregator(aggregator: Aggregator, params: Mapping, dim: int, folder: Path) -> None:
    """Writes an aggregator's files.

    ``aggregator.json`` holds its settings. If it pools, ``aggregator.py`` is a copy of
    :mod:`persona_jax.interop.torch_aggregator`. If it has parameters, ``aggregator.safetensors``
    holds them, float32.

    Args:
      aggregator: to save.
      params: its parameters.
      dim: D of the embeddings that it reads.
      folder: where to write.

    Raises:
      UserError: a kind that exists for comparisons only.
    """
    kind = aggregators.known_kind(aggregator.kind)
    if not kind.exported:
        raise UserError(
            f"aggregator.kind={aggregator.kind} is a control for comparisons, and cannot be "
            "exported"
        )
    settings = {"kind": aggregator.kind, "dim": dim}
    if aggregator.module is not None:
        settings |= {name: getattr(aggregator.module, name) for name in kind.sizes}
        tree = jax.tree.map(lambda x: np.asarray(x, np.float32), dict(params))
        tensors.save_tree(tree, folder / "aggregator.safetensors")
    folders.write_json(folder / "aggregator.json", settings)
    if kind.layout == "plain":
        shutil.copy(Path(__file__).with_name("torch_aggregator.py"), folder / "aggregator.py")


def load_aggregator(folder: Path, dim: int) -> tuple[Aggregator, dict]:
    """Reads the files of :func:`save_aggregator`: the aggregator and its parameters.

    Args:
      folder: holds the files.
      dim: D of the image encoder's embeddings.

    Raises:
      UserError: the files are missing, damaged, for another dimension, or do not fit.
    """
    names = ["aggregator.json", "aggregator.safetensors"]
    checksums.verify(folder, names, "export it again")
    settings = folders.read_json(folder / "aggregator.json")
    name = settings.get("kind")
    if settings.get("dim") != dim:
        raise UserError(
            f"{folder}: for embeddings of {settings.get('dim')} dimensions, but the image encoder "
            f"has {dim}"
        )
    sizes = aggregators.known_kind(str(name)).sizes
    if missing := [size for size in sizes if not isinstance(settings.get(size), int)]:
        raise UserError(f"{folder}/aggregator.json: no {', '.join(missing)}")
    aggregator = aggregators.build(str(name), settings)
    abstract = jax.eval_shape(lambda: aggregator.init(jax.random.key(0), dim))
    if not abstract:
        return aggregator, {}
    file = folder / "aggregator.safetensors"
    files = tensors.TensorFiles([file], str(file))
    params = tensors.load_tree(abstract, files, dtype=jnp.float32)
    if huge := finite.beyond(params, float(np.finfo(np.float16).max)):
        raise UserError(f"{file}: {huge}, which no aggregator has; export it again")
    return aggregator, params
