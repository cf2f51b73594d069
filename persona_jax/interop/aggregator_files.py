"""An aggregator as files that PyTorch users read without this package or JAX."""

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
    """Writes ``aggregator.json`` and, where it pools, ``aggregator.py`` (a copy of
    :mod:`persona_jax.interop.torch_aggregator`) and, where it has learnt anything,
    ``aggregator.safetensors``, float32.

    Raises:
      UserError: a kind that is there for comparisons only.
    """
    kind = aggregators.known_kind(aggregator.kind)
    if not kind.exported:
        raise UserError(
            f"aggregator.kind={aggregator.kind} is there to compare with, and is not exported"
        )
    settings = {"kind": aggregator.kind, "dim": dim}
    if aggregator.module is not None:
        settings |= {name: getattr(aggregator.module, name) for name in kind.sizes}
        whole = jax.tree.map(lambda x: np.asarray(x, np.float32), dict(params))
        tensors.save_tree(whole, folder / "aggregator.safetensors")
    folders.write_json(folder / "aggregator.json", settings)
    if kind.layout == "plain":
        shutil.copy(Path(__file__).with_name("torch_aggregator.py"), folder / "aggregator.py")


def load_aggregator(folder: Path, dim: int) -> tuple[Aggregator, dict]:
    """What :func:`save_aggregator` wrote: the aggregator and its parameters.

    Raises:
      UserError: not there, of another dimension than `dim`, or tensors that do not fit.
    """
    names = ["aggregator.json", "aggregator.safetensors"]
    checksums.verify(folder, names, "export it again")
    settings = folders.read_json(folder / "aggregator.json")
    name = settings.get("kind")
    if settings.get("dim") != dim:
        raise UserError(
            f"{folder}: reads embeddings of {settings.get('dim')} numbers, but the image encoder "
            f"gives {dim}"
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
