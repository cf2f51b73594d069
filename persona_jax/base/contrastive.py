"""Losses of the base's CLIP pair: captions, looks, and photos of one person drawn together."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


def caption_loss(
    images: Float[Array, "B D"],
    texts: Float[Array, "B D"],
    same: Bool[Array, "B B"],
    scale: Float[Array, ""],
) -> Float[Array, ""]:
    """CLIP's symmetric cross-entropy (Radford et al. 2021), where `same` captions are all right.

    images, texts: unit rows. same: which captions of the batch read alike. scale: 1/temperature.
    """
    logits = scale * images @ texts.T
    target = same / same.sum(axis=1, keepdims=True)
    both = [-(target * jax.nn.log_softmax(x, axis=1)).sum(axis=1) for x in (logits, logits.T)]
    return 0.5 * (both[0] + both[1]).mean()


def opposites_loss(
    images: Float[Array, "P D"],
    texts: Float[Array, "K 2 D"],
    which: Int[Array, "P K"],
    scale: Float[Array, ""],
) -> Float[Array, ""]:
    """CLIP's zero-shot choice between two sentences, as a loss: cross-entropy of the true one, over
    all pairs that say something about the photo. log 2 is guessing.

    images, texts: unit rows. which: 0, 1, or −1 where neither is true. scale: 1/temperature.
    """
    logits = scale * jnp.einsum("pd,knd->pkn", images, texts)
    true = jnp.take_along_axis(
        jax.nn.log_softmax(logits), jnp.maximum(which, 0)[..., None], axis=-1
    )
    said = which >= 0
    return -(true[..., 0] * said).sum() / jnp.maximum(said.sum(), 1)


def identity_loss(
    embeddings: Float[Array, "P D"], person: Int[Array, " P"], temperature: float
) -> Float[Array, ""]:
    """Supervised contrastive loss (Khosla et al. 2020, eq. 2): draws photos of a person together.

    embeddings: unit rows. person: who is on each photo; everyone needs two photos or more.
    """
    itself = jnp.eye(len(person), dtype=bool)
    positive = (person[:, None] == person[None, :]) & ~itself
    logits = jnp.where(itself, -1e9, embeddings @ embeddings.T / temperature)
    log_odds = jax.nn.log_softmax(logits, axis=1)
    per_photo = (positive * log_odds).sum(axis=1) / positive.sum(axis=1)
    return -per_photo.mean()


def augment(key: PRNGKeyArray, image: Float[Array, "S S 3"]) -> Float[Array, "S S 3"]:
    """One photo in [−1, 1] flipped, shifted by up to 1/32, relit and recoloured at random."""
    flip_key, shift_key, light_key, tint_key, grey_key = jax.random.split(key, 5)
    # Faces are aligned, and a small tower needs them so: shifted by an eighth it learns nothing.
    size, reach = image.shape[0], image.shape[0] // 32
    image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    corner = jax.random.randint(shift_key, (2,), 0, 2 * reach + 1)
    image = jax.lax.dynamic_slice(padded, (corner[0], corner[1], 0), (size, size, 3))
    contrast, brightness = jax.random.uniform(light_key, (2,), minval=-1.0, maxval=1.0)
    image = image * (1 + 0.3 * contrast) + 0.25 * brightness
    image += 0.15 * jax.random.uniform(tint_key, (3,), minval=-1.0, maxval=1.0)
    grey = jax.random.bernoulli(grey_key, 0.15)
    image = jnp.where(grey, image.mean(axis=-1, keepdims=True), image)
    return jnp.clip(image, -1.0, 1.0)
