"""dlib's face recognition ResNet: an identity measure, and an image encoder for the adapter.

The network of dlib's `dnn_face_recognition_ex`, trained with a metric loss on faces of 150×150
pixels: 29 convolutions, each followed by a per-channel affine map (folded batch normalisation), in
residual blocks without projections. Modules have the names of face-api.js'
`face_recognition_model`, so a parameter's path is its name in that manifest.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SIDE = 150  # pixels, the only input size the weights were trained for
DIM = 128

# As in dlib's input_rgb_image_sized: subtract the channel means, then divide by 256.
MEAN_RGB = (122.782, 117.001, 104.298)

# (name, channels, whether it halves the map), in the order of the forward pass.
BLOCKS = (
    *((f"conv32_{i}", 32, False) for i in (1, 2, 3)),
    ("conv64_down", 64, True),
    *((f"conv64_{i}", 64, False) for i in (1, 2, 3)),
    ("conv128_down", 128, True),
    *((f"conv128_{i}", 128, False) for i in (1, 2)),
    ("conv256_down", 256, True),
    *((f"conv256_{i}", 256, False) for i in (1, 2)),
    ("conv256_down_out", 256, True),
)


class Scale(nn.Module):
    """Per-channel `x · weights + biases`."""

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Scale and shift each channel."""
        weights = self.param("weights", nn.initializers.ones, x.shape[-1:])
        biases = self.param("biases", nn.initializers.zeros, x.shape[-1:])
        return x * weights + biases


class ConvScale(nn.Module):
    """A convolution and its affine map. As in dlib, only stride 1 is padded."""

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C2"]:
        """Convolve, then scale; no activation."""
        x = nn.Conv(
            self.features,
            (self.size, self.size),
            strides=self.stride,
            padding="SAME" if self.stride == 1 else "VALID",
            precision=jax.lax.Precision.HIGHEST,  # the same result on every device
            name="conv",
        )(x)
        return Scale(name="scale")(x)


class Residual(nn.Module):
    """Two convolutions and a skip: the input, or its 2×2 average where `down` halves the map."""

    features: int
    down: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C2"]:
        """Return relu(skip + branch)."""
        branch = nn.relu(ConvScale(self.features, stride=2 if self.down else 1, name="conv1")(x))
        branch = ConvScale(self.features, name="conv2")(branch)
        skip = nn.avg_pool(x, (2, 2), (2, 2), "VALID") if self.down else x
        return nn.relu(add_padded(skip, branch))


def add_padded(
    a: Float[Array, "B h1 w1 C1"], b: Float[Array, "B h2 w2 C2"]
) -> Float[Array, "B h w C"]:
    """Add two maps after padding both with zeros (below, right, last channels) to one shape.

    As dlib's `add_prev`: in a halving block the skip has fewer channels, and the unpadded strided
    convolution of an even-sized map is one row and one column short.
    """
    shape = [max(sizes) for sizes in zip(a.shape, b.shape, strict=True)]

    def grow(x):
        return jnp.pad(x, [(0, want - have) for have, want in zip(x.shape, shape, strict=True)])

    return grow(a) + grow(b)


class FaceResNet(nn.Module):
    """Aligned face crop → embedding.

    Input: RGB, 0…255, `[B, 150, 150, 3]`, one face that fills most of the image. Output:
    `[B, 128]`, not normalised. dlib takes two photos closer than 0.6 (Euclidean) as the same
    person.

    Source: D. King, dlib `dnn_face_recognition_ex.cpp`; He et al. 2016, ResNet-34 with fewer
    layers and half the filters.
    """

    @nn.compact
    def __call__(self, images: Float[Array, "B 150 150 3"]) -> Float[Array, "B 128"]:
        """[B, 150, 150, 3] → [B, 128]."""
        x = (images - jnp.asarray(MEAN_RGB, images.dtype)) / 256.0
        x = nn.relu(ConvScale(32, size=7, stride=2, name="conv32_down")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "VALID")
        for name, features, down in BLOCKS:
            x = Residual(features, down, name=name)(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(DIM, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")(x)
