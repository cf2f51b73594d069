"""Asks, before any diffusion, which aggregator gets most of a person out of a set of photos.

python -m persona_jax.probe --config configs/sa.py:tiny --workdir runs/probe

Portraits come with the truth about who is on them. A linear map behind each aggregator learns to
tell a person's traits from the embeddings of one to nine of their photos (a deeper one only learns
two thousand people by heart); an eighth of the people it might learn from say when to stop, and the
error is measured on others. Where self-attention does not win here, no diffusion run will show it.
Writes WORKDIR/probe.json.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from persona_jax import methods, pipeline
from persona_jax.cli import run_with_config
from persona_jax.data.encodings import Encodings, encode_photos
from persona_jax.data.loader import batches
from persona_jax.data.photos import Photos
from persona_jax.data.splits import photos_of
from persona_jax.dataset import open_dataset, rows_of
from persona_jax.errors import UserError
from persona_jax.eyes import Eye, open_eye
from persona_jax.models.aggregators import Aggregator

KINDS = ("first", "max", "avg", "self_attention")
SIZES = (1, 3, 9)
STEPS, BATCH, RATE = 2000, 128, 1e-3
CHECK_EVERY = 50


def main(config: ConfigDict, workdir: Path) -> None:
    """Embeddings, then a probe per aggregator, then the table."""
    photos, people = open_dataset(config.data)
    if not photos.has("identity"):
        raise UserError(
            f"probe: nobody knows the true traits of {config.data.dataset} people; use portraits"
        )
    # The eye alone: a base whose UNet is yet to be trained is what this is for.
    wanted = ("image_encoder",) if config.image_encoder.kind == "clip" else ()
    path = config.image_encoder.path or None
    parts = pipeline.load(config.pipeline, only=wanted, image_encoder=path if wanted else None)
    eye = open_eye(config, parts)
    data, identity = {}, photos.truth("identity")
    for group in ("train", "validation"):
        chosen = getattr(people, group)
        rows = rows_of(photos, chosen)
        encodings = embed(photos, rows, eye, config)
        sets = photos_of(encodings.people, chosen)
        embeddings = np.array(encodings.arrays["embeddings"])
        data[group] = embeddings, identity[rows], sets
    table = {}
    for kind in KINDS:
        changed = ConfigDict(config.aggregator.to_dict() | {"kind": kind})
        aggregator = methods.make_aggregator(changed)
        params = learn(aggregator, *data["train"], seed=config.seed)
        table[kind] = {n: measure(aggregator, params, *data["validation"], n) for n in SIZES}
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "probe.json").write_text(json.dumps(table, indent=2) + "\n")
    print("\nroot mean square error of a person's traits (0.289: guessing the middle)\n")
    print("| aggregator | " + " | ".join(f"{n} photos" for n in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    for kind, errors in table.items():
        print(f"| {kind} | " + " | ".join(f"{error:.4f}" for error in errors.values()) + " |")


def embed(photos: Photos, rows: np.ndarray, eye: Eye, config: ConfigDict) -> Encodings:
    """Image embeddings of the chosen photos ``[P, 1, D]``, computed once."""
    look = jax.jit(eye.embed)
    return encode_photos(
        photos,
        rows,
        encode_images=lambda pictures: {
            "embeddings": look(eye.params, np.stack([eye.preprocess(p) for p in pictures]))
        },
        encode_captions=lambda captions: {},
        cache_dir=Path(config.data.data_dir) / "encoded",
        key=f"probe {eye.hash}",
        mirrored=False,
    )


def predict(
    params: dict, aggregator: Aggregator, embeddings: Float[Array, "B N D"], mask: Array
) -> Float[Array, "B K"]:
    """Traits of the person that each set of photos shows."""
    x = aggregator.apply(params["aggregator"], embeddings, mask)
    return x @ params["kernel"] + params["bias"]


def learn(
    aggregator: Aggregator,
    embeddings: Float[np.ndarray, "P 1 D"],
    identity: Float[np.ndarray, "P K"],
    sets: list[Int[np.ndarray, " _"]],
    seed: int,
) -> dict:
    """Least squares over leave-one-out sets: a probe's parameters where those of every eighth
    person, which it does not learn from, were read best."""
    kept, sets = sets[::8], [found for i, found in enumerate(sets) if i % 8]
    dim, traits = embeddings.shape[-1], identity.shape[1]
    params = {
        "aggregator": aggregator.init(jax.random.key(seed), dim),
        "kernel": jnp.zeros((dim, traits)),
        "bias": jnp.full(traits, 0.5),
    }
    optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, STEPS), weight_decay=0.01)

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            read = predict(params, aggregator, batch["embeddings"], batch["mask"])
            return jnp.mean((read - batch["moments"]) ** 2)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    # The loader hands on whatever belongs to the target: its traits in the place of its latents.
    arrays = {"embeddings": embeddings, "moments": identity[:, None], "tokens": identity}
    longest = max(map(len, sets))
    source = batches(arrays, sets, batch_size=BATCH, n=longest, fixed=False, flip=False, seed=seed)
    state, best, least = optimizer.init(params), params, np.inf
    fewest = min(map(len, kept))
    with tqdm(range(STEPS), desc=f"probe {aggregator.kind}", unit=" steps") as bar:
        for i in bar:
            params, state, value = step(params, state, next(source))
            if (i + 1) % CHECK_EVERY == 0 or i + 1 == STEPS:
                error = measure(aggregator, params, embeddings, identity, kept, fewest)
                bar.set_postfix(learnt=f"{float(value) ** 0.5:.4f}", unseen=f"{error:.4f}")
                if error < least:
                    best, least = params, error
    return best


def measure(
    aggregator: Aggregator,
    params: dict,
    embeddings: Float[np.ndarray, "P 1 D"],
    identity: Float[np.ndarray, "P K"],
    sets: list[Int[np.ndarray, " _"]],
    count: int,
) -> float:
    """Root mean square error over people and traits, from each one's first `count` photos."""
    rows = np.stack([found[:count] for found in sets])
    mask = np.ones(rows.shape, np.float32)
    read = predict(params, aggregator, jnp.asarray(embeddings[rows, 0]), jnp.asarray(mask))
    return round(float(np.sqrt(np.mean((np.asarray(read) - identity[rows[:, 0]]) ** 2))), 4)


if __name__ == "__main__":
    run_with_config(main)
