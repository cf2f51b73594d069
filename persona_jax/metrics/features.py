"""Features and class logits of images, the inputs of FID, KID and IS.

The results do not depend on the number of devices: every device processes pieces of a fixed size,
so that each image goes through the same compiled program.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, UInt8
from PIL import Image

from persona_jax.errors import UserError
from persona_jax.models.inception import SIDE, InceptionV3
from persona_jax.runtime.mesh import batch_sharding, place, replicated, to_host

PIECE = 8
ROUND = 8  # pieces of each device between two trips to the host


def make_pass(
    apply: Callable[[Mapping, Array], Any],
    params: Mapping,
    mesh: Mesh,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda pictures: pictures,
) -> Callable[[np.ndarray], Any]:
    """Makes a function that applies a network to any number of images, over all devices.

    Args:
      apply: (params, images) → a tree of rows ``[P, …]``, one per image.
      params: of the network.
      mesh: of the devices that share the images.
      prepare: preprocessing on the host, applied to a part of the images at a time.

    Returns:
      A function from images ``[P, S, S, 3]`` to the tree of `apply` as numpy arrays, complete in
      every process. All processes must call it together with the same images. It raises UserError
      for zero images.
    """
    params = place(params, replicated(mesh))
    spec = batch_sharding(mesh).spec

    def pieces(params: Mapping, pictures: Array) -> Any:
        split = pictures.reshape(-1, PIECE, *pictures.shape[1:])
        rows = jax.lax.map(lambda piece: apply(params, piece), split)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

    sharded_apply = jax.jit(
        jax.shard_map(pieces, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec)
    )

    def look(pictures: np.ndarray) -> Any:
        if len(pictures) == 0:
            raise UserError("no images; generate some, or name a folder that contains some")
        group_size, parts = PIECE * mesh.size, []
        for start in range(0, len(pictures), group_size * ROUND):
            part = prepare(pictures[start : start + group_size * ROUND])
            missing = -len(part) % group_size
            padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
            rows = to_host(sharded_apply(params, place(padded, batch_sharding(mesh))))
            parts.append(jax.tree.map(operator.itemgetter(slice(len(part))), rows))
        return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

    return look


def inception_pass(
    params: Mapping, mesh: Mesh, resize: str
) -> Callable[
    [UInt8[np.ndarray, "P S S 3"]], tuple[Float[np.ndarray, "P F"], Float[np.ndarray, "P K"]]
]:
    """Makes a function for Inception v3's features and logits of images.

    Args:
      params: of :class:`persona_jax.models.inception.InceptionV3`.
      mesh: of the devices that share the images.
      resize: to 299 pixels. "legacy" is bilinear without antialiasing from corner to corner, as in
        TensorFlow 1 and torch-fidelity; "clean" is Pillow's antialiased bicubic on floats, as in
        clean-fid (Parmar et al. 2022). Metrics of the two are not comparable.

    Returns:
      A function from images ``[P, S, S, 3]`` to features ``[P, 2048]`` and logits without bias
      ``[P, 1008]``; see :func:`make_pass`.

    Raises:
      UserError: `resize` is unknown.
    """
    if resize not in ("legacy", "clean"):
        raise UserError(f"resize={resize!r}; known: legacy, clean")
    network = InceptionV3()

    def apply(params: Mapping, pictures: Array) -> tuple[Array, Array]:
        pictures = pictures.astype(jnp.float32)
        if resize == "legacy":
            pictures = resize_legacy(pictures)
        out = network.apply({"params": params}, (pictures - 128.0) / 128.0)
        # apply returns another tuple where collections are mutable
        return cast(tuple[Array, Array], out)

    if resize == "legacy":
        return make_pass(apply, params, mesh)
    return make_pass(apply, params, mesh, prepare=resize_clean)


def resize_legacy(pictures: Float[Array, "B h w 3"], side: int = SIDE) -> Float[Array, "B s s 3"]:
    """Bilinear without antialiasing: output pixel i is sampled at i · (input / output size)."""

    def weights(size: int) -> np.ndarray:
        positions = np.arange(side) * np.float32(size / side)
        low = positions.astype(np.int64)
        share = (positions - low).astype(np.float32)
        matrix = np.zeros((side, size), np.float32)
        np.add.at(matrix, (np.arange(side), low), 1 - share)
        np.add.at(matrix, (np.arange(side), np.minimum(low + 1, size - 1)), share)
        return matrix

    _, height, width, _ = pictures.shape
    return jnp.einsum(
        "yh,xw,bhwc->byxc",
        weights(height),
        weights(width),
        pictures,
        precision=jax.lax.Precision.HIGHEST,
    )


def resize_clean(pictures: UInt8[np.ndarray, "P h w 3"], side: int = SIDE) -> np.ndarray:
    """Pillow's bicubic on each channel as floats ``[P, s, s, 3]``, 0 to 255 and slightly beyond."""

    def plane(values: np.ndarray) -> np.ndarray:
        image = Image.fromarray(values.astype(np.float32), mode="F")
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))

    return np.stack(
        [np.stack([plane(picture[..., c]) for c in range(3)], axis=-1) for picture in pictures]
    )
