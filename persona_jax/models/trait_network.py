"""A small convolutional network that reads named numbers off a picture."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from persona_jax.models.layers import group_norm

Heads = tuple[tuple[str, int], ...]


class TraitNetwork(nn.Module):
    """Strided residual convolutions, one dense layer of features, a linear head per question.

    Places matter (where is the mole?), so the last map is flattened, not pooled.

    Attributes:
      heads: (name, how many numbers) of each question.
      widths: channels after each halving.
      features: length of the penultimate layer, which also serves as features for FID.
    """

    heads: Heads
    widths: tuple[int, ...] = (32, 64, 96, 128)
    features: int = 256

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "B S S 3"]
    ) -> tuple[Float[Array, "B F"], dict[str, Float[Array, "B _"]]]:
        """Pictures in [−1, 1] → features ``[B, F]``, and the heads' raw answers by name."""
        x = pictures
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=2, padding=1, name=f"down_{i}")(x)
            y = nn.silu(group_norm(8, 1e-5, None, f"norm_{i}")(x))
            x = x + nn.Conv(width, (3, 3), padding=1, name=f"conv_{i}")(y)
        x = nn.silu(group_norm(8, 1e-5, None, "norm_out")(x))
        features = nn.silu(nn.Dense(self.features, name="features")(x.reshape(len(x), -1)))
        return features, {n: nn.Dense(k, name=f"head_{n}")(features) for n, k in self.heads}


def initialise(module: TraitNetwork, key: Array, size: int) -> dict:
    """Random float32 parameters for pictures of `size` pixels."""
    return module.init(key, jnp.zeros((1, size, size, 3)))["params"]
