"""FaceNet: Inception-ResNet-v1, from a face to a unit vector of 512 numbers.

Modules have facenet-pytorch's names, so a parameter's path is its name in those weights.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from persona_jax.models.inception import ConvNorm, FrozenNorm, Layer, Map, chain, halve, max_pool

SIDE = 160  # pixels
DIM = 512


class Residual(nn.Module):
    """Parallel branches of convolutions with a skip: relu(x + scale · W[branches])."""

    branches: tuple[tuple[Layer, ...], ...]
    scale: float
    relu: bool = True

    @nn.compact
    def __call__(self, x: Map) -> Map:
        """[B, h, w, C] → [B, h, w, C]."""
        parts = jnp.concatenate([chain(x, *layers) for layers in self.branches], axis=-1)
        back = nn.Conv(x.shape[-1], (1, 1), precision=jax.lax.Precision.HIGHEST, name="conv2d")(
            parts
        )
        x = x + self.scale * back
        return nn.relu(x) if self.relu else x


BLOCK35 = (
    (("branch0", 32, 1),),
    (("branch1.0", 32, 1), ("branch1.1", 32, 3)),
    (("branch2.0", 32, 1), ("branch2.1", 32, 3), ("branch2.2", 32, 3)),
)
BLOCK17 = (
    (("branch0", 128, 1),),
    (("branch1.0", 128, 1), ("branch1.1", 128, (1, 7)), ("branch1.2", 128, (7, 1))),
)
BLOCK8 = (
    (("branch0", 192, 1),),
    (("branch1.0", 192, 1), ("branch1.1", 192, (1, 3)), ("branch1.2", 192, (3, 1))),
)


class Mixed6a(nn.Module):
    """17×17 → 8×8."""

    @nn.compact
    def __call__(self, x: Map) -> Map:
        """[B, 17, 17, 256] → [B, 8, 8, 896]."""
        deep = chain(x, ("branch1.0", 192, 1), ("branch1.1", 192, 3))
        branches = [halve(x, "branch0", 384), halve(deep, "branch1.2", 256), max_pool(x)]
        return jnp.concatenate(branches, axis=-1)


class Mixed7a(nn.Module):
    """8×8 → 3×3."""

    @nn.compact
    def __call__(self, x: Map) -> Map:
        """[B, 8, 8, 896] → [B, 3, 3, 1792]."""
        deep = chain(x, ("branch2.0", 256, 1), ("branch2.1", 256, 3))
        branches = [
            halve(chain(x, ("branch0.0", 256, 1)), "branch0.1", 384),
            halve(chain(x, ("branch1.0", 256, 1)), "branch1.1", 256),
            halve(deep, "branch2.2", 256),
            max_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class FaceNet(nn.Module):
    """Face → embedding.

    Input: RGB as (level − 127.5) / 128, `[B, 160, 160, 3]`, one face that fills the image. Output:
    unit vectors `[B, 512]`; photos of the same person are close.

    Source: Schroff et al. 2015, "FaceNet"; Szegedy et al. 2017, "Inception-v4, Inception-ResNet";
    the layout of facenet-pytorch.
    """

    @nn.compact
    def __call__(self, faces: Float[Array, "B 160 160 3"]) -> Float[Array, "B 512"]:
        """[B, 160, 160, 3] → [B, 512]."""
        x = halve(faces, "conv2d_1a", 32)
        x = ConvNorm(32, 3, padding="VALID", name="conv2d_2a")(x)
        x = max_pool(chain(x, ("conv2d_2b", 64, 3)))
        x = chain(x, ("conv2d_3b", 80, 1))
        x = ConvNorm(192, 3, padding="VALID", name="conv2d_4a")(x)
        x = halve(x, "conv2d_4b", 256)
        for i in range(5):
            x = Residual(BLOCK35, 0.17, name=f"repeat_1.{i}")(x)
        x = Mixed6a(name="mixed_6a")(x)
        for i in range(10):
            x = Residual(BLOCK17, 0.10, name=f"repeat_2.{i}")(x)
        x = Mixed7a(name="mixed_7a")(x)
        for i in range(5):
            x = Residual(BLOCK8, 0.20, name=f"repeat_3.{i}")(x)
        x = Residual(BLOCK8, 1.0, relu=False, name="block8")(x).mean(axis=(1, 2))
        dense = nn.Dense(
            DIM, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="last_linear"
        )
        x = FrozenNorm(name="last_bn")(dense(x))
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
