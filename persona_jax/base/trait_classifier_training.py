"""The reader of portraits: trained on the drawing program itself, with people of its own."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from persona_jax.base.stage import fit_stage
from persona_jax.data.portraits import traits
from persona_jax.data.portraits.builder import Settings, draw
from persona_jax.data.portraits.render import render
from persona_jax.diffusion.loss import example_keys
from persona_jax.evaluation import trait_classifier as reading
from persona_jax.models import trait_network as model
from persona_jax.runtime.mesh import first_process


def train_trait_classifier(config: ConfigDict, workdir: Path, mesh: Mesh) -> None:
    """Trains and scores the reader; writes it to ``workdir/reader``."""
    settings, size = config.reader, config.image_size
    module = model.TraitNetwork(reading.HEADS)

    def loss(params: Mapping, frozen: Mapping, batch: Mapping, step: Array):
        keys = example_keys(config.seed, step, batch["index"])
        pictures = render(batch["identity"], batch["scene"], size) / 127.5 - 1.0
        pictures = jax.vmap(lambda k, x: roughen(k, x, settings.noise))(keys, pictures)
        _, answers = module.apply({"params": params}, pictures)
        parts = losses(answers, batch["identity"], batch["scene"])
        return sum(parts.values()), parts

    def batches_from(start: int) -> Iterator[dict[str, np.ndarray]]:
        step = start
        while True:
            yield _batch(settings.batch_size, step, config.seed)
            step += 1

    learnt = fit_stage(
        config,
        settings,
        workdir / "reader_run",
        mesh,
        lambda: model.initialise(module, jax.random.key(config.seed + 3), size),
        loss,
        {},
        batches_from,
    )
    reader = reading.TraitClassifier(learnt, np.ones(len(traits.IDENTITY), np.float32), size)
    identity, scene, answers = read_unseen(reader, people=settings.unseen)
    error = (answers.identity - identity)[:, None, :] ** 2
    seen = 1 - traits.hidden_traits(scene)[:, None, :]
    spread = np.sqrt((error * seen).sum(axis=(0, 1)) / seen.sum(axis=(0, 1)))
    finished = reading.TraitClassifier(learnt, spread.astype(np.float32), size)
    first_process(lambda: reading.save_trait_classifier(finished, workdir / "reader"))


def score_trait_classifier(folder: Path, people: int = 512) -> dict:
    """How well the reader reads photos of people nobody else has seen.

    Returns:
      "identity": root mean square error of the traits that show (0.289 is guessing the middle);
      "traits": the same of each; "named": share of plain photos that name the right one of 32;
      and the share of right answers to each question.
    """
    reader = reading.load_trait_classifier(folder)
    identity, scene, answers = read_unseen(reader, people)
    seen = 1 - traits.hidden_traits(scene)
    error = (answers.identity - identity) ** 2 * seen
    traits_error = np.sqrt(error.sum(axis=0) / seen.sum(axis=0))
    scores = {"hides": ((answers.hides > 0.5) == (traits.hidden(scene) > 0.5)).mean()}
    for name, choice in answers.choices.items():
        shown = reading.SHOWN_BY.get(name)
        there = np.ones(len(scene), bool) if shown is None else reading.truth(scene, shown) == 1
        scores[name] = (choice == reading.truth(scene, name))[there].mean()
    plain = traits.as_vector(traits.SCENE, traits.PLAIN_SCENE)
    plain = np.repeat(plain[None], people, axis=0)
    named = reader.read(_pictures(identity, plain, reader.size)).identity
    groups = range(0, people - people % 32, 32)
    right = [reader.name(named[g : g + 32], identity[g : g + 32]) == np.arange(32) for g in groups]
    return {
        "people": people,
        "identity": round(float(np.sqrt(error.sum() / seen.sum())), 4),
        "named": round(float(np.mean(right)), 4),
        **{name: round(float(score), 4) for name, score in scores.items()},
        "traits": {
            name: round(float(value), 3)
            for name, value in zip(traits.IDENTITY, traits_error, strict=True)
        },
    }


def losses(
    answers: Mapping[str, Float[Array, "B _"]],
    identity: Float[Array, "B K"],
    scene: Float[Array, "B J"],
) -> dict[str, Float[Array, ""]]:
    """Squared error of the traits that show, cross-entropy of everything else that is there."""
    photo = traits.as_dict(traits.SCENE, jnp.moveaxis(scene, 1, 0))
    hides = jnp.stack([photo[f"hides_{region}"] for region in traits.REGIONS], axis=1)
    lengths = np.asarray([len(names) for names in traits.REGIONS.values()])
    seen = 1 - jnp.repeat(hides, lengths, axis=1, total_repeat_length=len(traits.IDENTITY))
    # 1 for guessing the middle, so that no question drowns another.
    off = 12 * (answers["identity"] - identity) ** 2
    out = {
        "identity": (off * seen).sum() / seen.sum(),
        "hides": optax.sigmoid_binary_cross_entropy(answers["hides"], hides).mean(),
        "glasses": optax.sigmoid_binary_cross_entropy(
            answers["glasses"][:, 0], photo["glasses"]
        ).mean(),
    }
    for name in ("expression", "background", *reading.SHOWN_BY):
        there = photo[reading.SHOWN_BY[name]] if name in reading.SHOWN_BY else jnp.ones(len(scene))
        wrong = optax.softmax_cross_entropy_with_integer_labels(
            answers[name], photo[name].astype(jnp.int32)
        )
        out[name] = (wrong * there).sum() / jnp.maximum(there.sum(), 1.0)
    return out


def roughen(key: Array, picture: Float[Array, "S S 3"], most: float) -> Float[Array, "S S 3"]:
    """Noise of a strength drawn up to `most`: painted pictures are not as clean as drawn ones."""
    strength_key, noise_key = jax.random.split(key)
    strength = jax.random.uniform(strength_key, maxval=most)
    return picture + strength * jax.random.normal(noise_key, picture.shape)


def read_unseen(reader: reading.TraitClassifier, people: int) -> tuple:
    """(identity, scene, readings) of one photo each of the `unseen` group's people."""
    photos = list(draw(Settings({"unseen": people}, photos=2)))[::2]
    identity = np.stack([photo["identity"] for photo in photos])
    scene = np.stack([photo["scene"] for photo in photos])
    return identity, scene, reader.read(_pictures(identity, scene, reader.size))


def _pictures(identity: np.ndarray, scene: np.ndarray, size: int) -> np.ndarray:
    parts = [
        np.asarray(render(identity[i : i + 64], scene[i : i + 64], size))
        for i in range(0, len(identity), 64)
    ]
    return np.concatenate(parts).astype(np.float32) / 127.5 - 1.0


def _batch(size: int, step: int, seed: int) -> dict[str, np.ndarray]:
    """This process' share of a batch of photos, each of a person of its own."""
    index = np.arange(step * size, (step + 1) * size)[jax.process_index() :: jax.process_count()]
    drawn = []
    for i in index:
        # No other group's seeds have this length.
        rng = np.random.default_rng((seed, 2, int(i), 0, 0))
        identity, rate = traits.draw_identity(rng), traits.draw_hiding_rate(rng)
        drawn.append((identity, traits.draw_scene(rng, rate)))
    identity, scene = map(np.stack, zip(*drawn, strict=True))
    return {"identity": identity, "scene": scene, "index": (index % 2**31).astype(np.int32)}
