"""What a network sees in pictures: features and class logits, the ground of FID, KID and IS.

The same numbers come out however many devices share the work: every device looks at pieces of a
fixed size, so that each picture meets the same compiled program.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

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
    """A function from pictures ``[P, S, S, 3]`` to the tree of rows ``[P, …]`` that
    ``apply(params, pictures)`` gives for each, as numpy arrays, whole in every process.

    prepare: done to the pictures on the host, a part at a time, before the devices see them.

    The pictures are the same in every process, and all processes must ask together.
    """
    params = place(params, replicated(mesh))
    spec = batch_sharding(mesh).spec

    def pieces(params: Mapping, pictures: Array) -> Any:
        split = pictures.reshape(-1, PIECE, *pictures.shape[1:])
        rows = jax.lax.map(lambda piece: apply(params, piece), split)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

    shared = jax.jit(
        jax.shard_map(pieces, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec)
    )

    def look(pictures: np.ndarray) -> Any:
        if len(pictures) == 0:
            raise UserError("no pictures to look at; paint some, or name a folder that has some")
        whole, parts = PIECE * mesh.size, []
        for start in range(0, len(pictures), whole * ROUND):
            part = prepare(pictures[start : start + whole * ROUND])
            missing = -len(part) % whole
            filled = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
            rows = to_host(shared(params, place(filled, batch_sharding(mesh))))
            parts.append(jax.tree.map(operator.itemgetter(slice(len(part))), rows))
        return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

    return look


def inception_pass(
    params: Mapping, mesh: Mesh, resize: str
) -> Callable[
    [UInt8[np.ndarray, "P S S 3"]], tuple[Float[np.ndarray, "P F"], Float[np.ndarray, "P K"]]
]:
    """Inception v3's features ``[P, 2048]`` and logits without bias ``[P, 1008]`` of pictures.

    resize, to 299 pixels: "legacy", bilinear without antialiasing from corner to corner, as
    TensorFlow 1 and torch-fidelity do; or "clean", Pillow's bicubic, antialiased, on floats, as
    clean-fid does (Parmar et al. 2022). Figures of the two do not compare.
    """
    if resize not in ("legacy", "clean"):
        raise UserError(f"resize={resize!r}; known: legacy, clean")
    network = InceptionV3()

    def apply(params: Mapping, pictures: Array) -> tuple[Array, Array]:
        pictures = pictures.astype(jnp.float32)
        if resize == "legacy":
            pictures = resize_legacy(pictures)
        return network.apply({"params": params}, (pictures - 128.0) / 128.0)

    if resize == "legacy":
        return make_pass(apply, params, mesh)
    return make_pass(apply, params, mesh, prepare=resize_clean)


def resize_legacy(pictures: Float[Array, "B h w 3"], side: int = SIDE) -> Float[Array, "B s s 3"]:
    """Bilinear, output pixel i taken at i · (input size / output size), without antialiasing."""

    def weights(size: int) -> np.ndarray:
        place = np.arange(side) * np.float32(size / side)
        low = place.astype(np.int64)
        share = (place - low).astype(np.float32)
        out = np.zeros((side, size), np.float32)
        np.add.at(out, (np.arange(side), low), 1 - share)
        np.add.at(out, (np.arange(side), np.minimum(low + 1, size - 1)), share)
        return out

    _, height, width, _ = pictures.shape
    return jnp.einsum(
        "yh,xw,bhwc->byxc",
        weights(height),
        weights(width),
        pictures,
        precision=jax.lax.Precision.HIGHEST,
    )


def resize_clean(pictures: UInt8[np.ndarray, "P h w 3"], side: int = SIDE) -> np.ndarray:
    """Pillow's bicubic on each channel as floats, 0 to 255 and a little beyond ``[P, s, s, 3]``."""

    def plane(values: np.ndarray) -> np.ndarray:
        image = Image.fromarray(values.astype(np.float32), mode="F")
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))

    return np.stack(
        [np.stack([plane(picture[..., c]) for c in range(3)], axis=-1) for picture in pictures]
    )
