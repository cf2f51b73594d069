"""Asks, before any diffusion, which aggregator gets most of a person out of a set of photos.

python -m persona_jax.probe --config configs/sa.py:tiny --workdir runs/probe

Portraits come with the truth about who is on them. A linear map behind each aggregator learns to
tell a person's traits from the embeddings of one to nine of their photos (a deeper one only learns
two thousand people by heart); an eighth of the people it might learn from say when to stop, and the
error is measured on others. Where self-attention does not win here, no diffusion run will show it.
Beside them stands what is there to be won: each trait as the map reads it off the photos that show
it, by the truth about what they hide. Writes WORKDIR/probe.json.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from persona_jax.data.dataset import open_dataset, rows_of
from persona_jax.data.encodings import EncodingJob, Encodings, encode
from persona_jax.data.loader import batches
from persona_jax.data.photo_datasets import Photos
from persona_jax.data.portraits import traits
from persona_jax.data.splits import photos_of
from persona_jax.errors import UserError
from persona_jax.methods import adapter_training
from persona_jax.metrics.intervals import bootstrap
from persona_jax.models import aggregators
from persona_jax.models.aggregators import Aggregator
from persona_jax.pipelines import pipeline
from persona_jax.pipelines.image_encoders import ImageEncoder, open_image_encoder
from persona_jax.runtime import buckets
from persona_jax.runtime.command_line import run_with_config

KINDS = tuple(name for name, kind in aggregators.KINDS.items() if kind.probed)
SIZES = (1, 3, 9)
STEPS, BATCH, RATE, WEIGHT_DECAY = 800, 128, 1e-3, 1.0
"""With a weight decay of 0.01, and more so with more steps, self-attention begins to know the
people it learns from before it has learnt whom to trust; the others are the same with either."""
CHECK_EVERY = 50
TRUTH = "the photos that show the trait"


def main(config: ConfigDict, workdir: Path) -> None:
    """Embeddings, then a probe per aggregator, then the table."""
    photos, people = open_dataset(config.data)
    if not photos.has("identity"):
        raise UserError(
            f"probe: nobody knows the true traits of {config.data.dataset} people; use portraits"
        )
    # The encoder alone: a base whose UNet is yet to be trained is what this is for.
    wanted = ("image_encoder",) if config.image_encoder.kind == "clip" else ()
    path = config.image_encoder.path or None
    parts = pipeline.load(config.pipeline, only=wanted, image_encoder=path if wanted else None)
    encoder = open_image_encoder(config, parts)
    data, identity, scene = {}, photos.truth("identity"), photos.truth("scene")
    for group in ("train", "validation"):
        chosen = getattr(people, group)
        rows = rows_of(photos, chosen)
        encodings = embed(photos, rows, encoder, config)
        sets = photos_of(encodings.people, chosen)
        embeddings = np.array(encodings.arrays["embeddings"])
        data[group] = embeddings, identity[rows], sets
    shown, truth, sets = data["validation"]
    errors: dict[str, dict[int, np.ndarray]] = {}
    for kind in KINDS:
        changed = ConfigDict(config.aggregator.to_dict() | {"kind": kind})
        aggregator = adapter_training.make_aggregator(changed)
        params = learn(aggregator, *data["train"], seed=config.seed)
        errors[kind] = {n: squared(aggregator, params, shown, truth, sets, n) for n in SIZES}
        if kind == "first":
            hidden = traits.hidden_traits(scene[rows_of(photos, people.validation)])
            look = photos_that_show(params, shown, hidden, sets)
            known = truth[[found[0] for found in sets]]
            errors[TRUTH] = {n: ((look(n) - known) ** 2).mean(axis=1) for n in SIZES}
    report(errors, workdir)


def report(errors: dict[str, dict[int, np.ndarray]], workdir: Path) -> None:
    """Writes and prints the table, and by how much self-attention is ahead of the average.

    errors: mean squared error of each person ``[P]``, by aggregator and number of photos.
    """
    table = {
        kind: {n: round(float(found.mean() ** 0.5), 4) for n, found in of_kind.items()}
        for kind, of_kind in errors.items()
    }
    most = max(SIZES)
    ahead = errors["avg"][most] ** 0.5 - errors["self_attention"][most] ** 0.5
    mean = bootstrap(ahead[None])
    found = {"errors": table, "self_attention_ahead_of_avg": dataclasses.asdict(mean)}
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "probe.json").write_text(json.dumps(found, indent=2) + "\n")
    print("\nroot mean square error of a person's traits (0.289: guessing the middle)\n")
    print("| aggregator | " + " | ".join(f"{n} photo{'s' * (n > 1)}" for n in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    for kind in (*KINDS, TRUTH):
        print(f"| {kind} | " + " | ".join(f"{error:.4f}" for error in table[kind].values()) + " |")
    print(
        f"\nself-attention's error is below the average's by {mean.value:.4f} "
        f"({mean.low:.4f} to {mean.high:.4f}, 95 % over {len(ahead)} people) from {most} photos"
    )


def photos_that_show(
    params: dict,
    embeddings: Float[np.ndarray, "P 1 D"],
    hidden: Float[np.ndarray, "P K"],
    sets: list[Int[np.ndarray, " _"]],
) -> Callable[[int], Float[np.ndarray, "Q K"]]:
    """A function from a number of photos to each person's traits: the mean reading of those photos
    that show the trait, or of all where none does.

    Args:
      params: of a probe that reads a photo alone.
      embeddings, hidden: of all photos; 1 where a photo hides the trait.
      sets: each person's photos.
    """
    readings = embeddings[:, 0] @ np.asarray(params["kernel"]) + np.asarray(params["bias"])

    def look(count: int) -> Float[np.ndarray, "Q K"]:
        rows = np.stack([found[:count] for found in sets])
        shows = 1.0 - hidden[rows]
        shows = np.where(shows.any(axis=1, keepdims=True), shows, 1.0)
        return (readings[rows] * shows).sum(axis=1) / shows.sum(axis=1)

    return look


def embed(photos: Photos, rows: np.ndarray, encoder: ImageEncoder, config: ConfigDict) -> Encodings:
    """Image embeddings of the chosen photos ``[P, 1, D]``, computed once."""
    look = jax.jit(encoder.embed)
    job = EncodingJob(
        photos,
        rows,
        encode_images=lambda pictures: {
            "embeddings": look(encoder.params, np.stack([encoder.preprocess(p) for p in pictures]))
        },
        encode_captions=lambda captions: {},
        cache_dir=buckets.local(config.data.data_dir) / "encoded",
        key=f"probe {encoder.hash}",
        mirrored=False,
    )
    return encode(job)


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
    dim, count = embeddings.shape[-1], identity.shape[1]
    params = {
        "aggregator": aggregator.init(jax.random.key(seed), dim),
        "kernel": jnp.zeros((dim, count)),
        "bias": jnp.full(count, 0.5),
    }
    schedule = optax.cosine_decay_schedule(RATE, STEPS)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

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
                found = squared(aggregator, params, embeddings, identity, kept, fewest)
                error = float(found.mean() ** 0.5)
                bar.set_postfix(learnt=f"{float(value) ** 0.5:.4f}", unseen=f"{error:.4f}")
                if error < least:
                    best, least = params, error
    return best


def squared(
    aggregator: Aggregator,
    params: dict,
    embeddings: Float[np.ndarray, "P 1 D"],
    identity: Float[np.ndarray, "P K"],
    sets: list[Int[np.ndarray, " _"]],
    count: int,
) -> Float[np.ndarray, " Q"]:
    """Each person's mean squared error over traits, from their first `count` photos."""
    rows = np.stack([found[:count] for found in sets])
    mask = np.ones(rows.shape, np.float32)
    read = predict(params, aggregator, jnp.asarray(embeddings[rows, 0]), jnp.asarray(mask))
    return ((np.asarray(read) - identity[rows[:, 0]]) ** 2).mean(axis=1)


if __name__ == "__main__":
    run_with_config(main)
