"""Inception v3 of 2015, on whose features FID and IS are defined.

It differs from torchvision's: average pools exclude padding from the mean, the last block uses a
max pool, and there are 1,008 classes. Modules have the names of pytorch-fid's and torch-fidelity's
weights, so a parameter's path is its name there.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SIDE = 299  # pixels
FEATURES, CLASSES = 2048, 1008

Map = Float[Array, "B _h _w _C"]
# A convolution that keeps the size: name, channels, kernel (one side for both, or height, width).
Layer = tuple[str, int, int | tuple[int, int]]


class FrozenNorm(nn.Module):
    """Batch normalisation with fixed statistics, those of its training."""

    epsilon: float = 1e-3  # TensorFlow's default

    @nn.compact
    def __call__(self, x: Float[Array, "B *n C"]) -> Float[Array, "B *n C"]:
        """(x − mean) / √(variance + ε) · scale + bias, by channel."""
        width = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        mean = self.param("running_mean", nn.initializers.zeros, width)
        variance = self.param("running_var", nn.initializers.ones, width)
        return (x - mean) * (scale * jax.lax.rsqrt(variance + self.epsilon)) + bias


class ConvNorm(nn.Module):
    """Convolution, fixed batch normalisation, ReLU; padding is "SAME" or "VALID"."""

    features: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Map) -> Map:
        """[B, h, w, C] → [B, h, w, features], smaller where strided or unpadded."""
        kernel = self.kernel if isinstance(self.kernel, tuple) else (self.kernel, self.kernel)
        x = nn.Conv(
            self.features,
            kernel,
            strides=self.stride,
            padding=self.padding,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,  # the same result on every device
            name="conv",
        )(x)
        return nn.relu(FrozenNorm(name="bn")(x))


def chain(x: Map, *layers: Layer) -> Map:
    """Applies the convolutions `layers` one after the other."""
    for name, features, kernel in layers:
        x = ConvNorm(features, kernel, name=name)(x)
    return x


def halve(x: Map, name: str, features: int) -> Map:
    """A 3×3 convolution of stride 2, without padding."""
    return ConvNorm(features, 3, stride=2, padding="VALID", name=name)(x)


def max_pool(x: Map) -> Map:
    """A 3×3 max pool of stride 2, without padding."""
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def _mean_around(x: Map) -> Map:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


class InceptionA(nn.Module):
    """At 35×35: branches of 1×1, 5×5, two 3×3, and a pool projected to `pooled` channels."""

    pooled: int

    @nn.compact
    def __call__(self, x: Map) -> Map:
        """[B, 35, 35, C] → [B, 35, 35, 224 + pooled]."""
        branches = [
            chain(x, ("branch1x1", 64, 1)),
            chain(x, ("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
            chain(
                x, ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)
            ),
            chain(_mean_around(x), ("branch_pool", self.pooled, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionB(nn.Module):
    """35×35 → 17×17."""

    @nn.compact
    def __call__(self, x: Map) -> Map:
        """[B, 35, 35, C] → [B, 17, 17, 480 + C]."""
        deep = chain(x, ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3))
        branches = [halve(x, "branch3x3", 384), halve(deep, "branch3x3dbl_3", 96), max_pool(x)]
        return jnp.concatenate(branches, axis=-1)


class InceptionC(nn.Module):
    """At 17×17: 7×7 factorised into 1×7 and 7×1, with `inner` channels between."""

    inner: int

    @nn.compact
    def __call__(self, x: Map) -> Map:
        """[B, 17, 17, C] → [B, 17, 17, 768]."""
        inner = self.inner
        branches = [
            chain(x, ("branch1x1", 192, 1)),
            chain(
                x,
                ("branch7x7_1", inner, 1),
                ("branch7x7_2", inner, (1, 7)),
                ("branch7x7_3", 192, (7, 1)),
            ),
            chain(
                x,
                ("branch7x7dbl_1", inner, 1),
                ("branch7x7dbl_2", inner, (7, 1)),
                ("branch7x7dbl_3", inner, (1, 7)),
                ("branch7x7dbl_4", inner, (7, 1)),
                ("branch7x7dbl_5", 192, (1, 7)),
            ),
            chain(_mean_around(x), ("branch_pool", 192, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionD(nn.Module):
    """17×17 → 8×8."""

    @nn.compact
    def __call__(self, x: Map) -> Map:
        """[B, 17, 17, C] → [B, 8, 8, 512 + C]."""
        plain = chain(x, ("branch3x3_1", 192, 1))
        deep = chain(
            x,
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
        )
        branches = [
            halve(plain, "branch3x3_2", 320),
            halve(deep, "branch7x7x3_4", 192),
            max_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionE(nn.Module):
    """At 8×8: 3×3 as parallel 1×3 and 3×1; an average pool, or a max pool in the last block."""

    last: bool

    @nn.compact
    def __call__(self, x: Map) -> Map:
        """[B, 8, 8, C] → [B, 8, 8, 2048]."""
        plain = chain(x, ("branch3x3_1", 384, 1))
        deep = chain(x, ("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3))
        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.last else _mean_around(x)
        branches = [
            chain(x, ("branch1x1", 320, 1)),
            chain(plain, ("branch3x3_2a", 384, (1, 3))),
            chain(plain, ("branch3x3_2b", 384, (3, 1))),
            chain(deep, ("branch3x3dbl_3a", 384, (1, 3))),
            chain(deep, ("branch3x3dbl_3b", 384, (3, 1))),
            chain(pooled, ("branch_pool", 192, 1)),
        ]
        return jnp.concatenate(branches, axis=-1)


class InceptionV3(nn.Module):
    """Images → features for FID and KID, and logits for IS.

    Input: 299 px, (level − 128) / 128, so in [−1, 1]. Output: 2,048 features of the last average
    pool, and 1,008 logits without bias, as IS uses them.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture"; the graph
    inception-2015-12-05 as implemented in torch-fidelity.
    """

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "B 299 299 3"]
    ) -> tuple[Float[Array, "B 2048"], Float[Array, "B 1008"]]:
        """[B, 299, 299, 3] → features [B, 2048] and logits [B, 1008]."""
        x = ConvNorm(32, 3, stride=2, padding="VALID", name="Conv2d_1a_3x3")(pictures)
        x = ConvNorm(32, 3, padding="VALID", name="Conv2d_2a_3x3")(x)
        x = max_pool(chain(x, ("Conv2d_2b_3x3", 64, 3)))
        x = chain(x, ("Conv2d_3b_1x1", 80, 1))
        x = max_pool(ConvNorm(192, 3, padding="VALID", name="Conv2d_4a_3x3")(x))
        for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = InceptionA(pooled, name=name)(x)
        x = InceptionB(name="Mixed_6a")(x)
        for name, inner in (
            ("Mixed_6b", 128),
            ("Mixed_6c", 160),
            ("Mixed_6d", 160),
            ("Mixed_6e", 192),
        ):
            x = InceptionC(inner, name=name)(x)
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(False, name="Mixed_7b")(x)
        x = InceptionE(True, name="Mixed_7c")(x)
        features = x.mean(axis=(1, 2))
        head = nn.Dense(CLASSES, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")
        return features, head(features)
