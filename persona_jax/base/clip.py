"""Second stage: a text and a vision tower that agree, and an eye for who is on a photo."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from persona_jax.base import contrastive
from persona_jax.base.caption_sampling import captions_of, draw_caption, looks_of, odds_of
from persona_jax.base.stage import (
    fit_stage,
    in_parts,
    picture_batches,
    read_pictures,
    save_tower,
    to_float,
)
from persona_jax.data.photo_datasets import Photos
from persona_jax.diffusion.loss import example_keys
from persona_jax.interop import folders, tensors
from persona_jax.metrics.verification import verification
from persona_jax.models import towers
from persona_jax.models.layers import normalise
from persona_jax.pipelines import pipeline
from persona_jax.runtime.mesh import first_process


def train_clip(
    config: ConfigDict, workdir: Path, mesh: Mesh, photos: Photos, rows, pictures: np.ndarray
) -> None:
    """Captions against pictures, looks against their opposites, and photos of one person drawn
    together.

    The scene alone tells a batch's photos apart, so captions teach the tower little of who is on
    them; where sentences about single looks are known, choosing between opposites does.
    """
    folder, clip = workdir / "pipeline", config.clip
    tokenizer = pipeline.load_tokenizer(folder / "tokenizer")
    kinds = captions_of(photos, rows)
    odds = odds_of(kinds, clip.captions.to_dict())
    tokens = np.stack([pipeline.tokenize(tokenizer, kind)[0] for kind in kinds.values()], axis=1)
    # What follows a caption's end changes nothing before it: the tower is causal.
    end = len(tokenizer) - 1
    tokens = _cut(tokens, end)
    opposites, which = looks_of(photos, rows)
    sentences = [sentence for pair in opposites for sentence in pair]
    look_tokens = _cut(pipeline.tokenize(tokenizer, sentences)[0], end) if opposites else None
    text_settings = clip.text.to_dict() | {
        "vocab_size": end + 1,
        "eos_token_id": end,
        "bos_token_id": end - 1,
        "pad_token_id": end,
    }
    vision_settings = clip.vision.to_dict()
    text = towers.build("text_encoder", text_settings)
    vision = towers.build("image_encoder", vision_settings)
    _, person = np.unique([photos.people[row] for row in rows], return_inverse=True)
    partners = Partners(person)
    seed, weight, temperature = config.seed, clip.identity_weight, clip.identity_temperature

    def init():
        keys = jax.random.split(jax.random.key(seed + 1), 3)
        shape = (text.config.hidden_size, text.config.projection_dim)
        return {
            "text_encoder": towers.initialise(text, keys[0]),
            "image_encoder": towers.initialise(vision, keys[1]),
            "text_projection": {"kernel": 0.05 * jax.random.normal(keys[2], shape)},
            "logit_scale": jnp.log(10.0),
        }

    def describe(params, ids):
        pooled = text.apply({"params": params["text_encoder"]}, ids).pooled
        return normalise(pooled @ params["text_projection"]["kernel"])

    def loss(params, frozen, batch, step):
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(seed, step, batch["index"]))
        views = jnp.concatenate([batch["image"], batch["partner"]])
        if clip.augment:
            views = jax.vmap(contrastive.augment)(keys[:, :2].T.reshape(-1), views)
        embedded = vision.apply({"params": params["image_encoder"]}, views).embedding
        embedded = normalise(embedded)
        ids = draw_caption(keys[:, 2], batch["tokens"], odds)
        captions = describe(params, ids)
        alike = (ids[:, None] == ids[None]).all(axis=-1)
        scale = jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(100.0)))
        caption = contrastive.caption_loss(embedded[: len(captions)], captions, alike, scale)
        who = jnp.concatenate([batch["person"], batch["person"]])
        identity = contrastive.identity_loss(embedded, who, temperature)
        parts = {"caption": caption, "identity": identity}
        total = caption + weight * identity
        if look_tokens is not None:
            told = describe(params, jnp.asarray(look_tokens)).reshape(len(opposites), 2, -1)
            true = jnp.concatenate([batch["which"][:, 0], batch["which"][:, 1]])
            parts["looks"] = contrastive.opposites_loss(embedded, told, true, scale)
            total += clip.looks_weight * parts["looks"]
        return total, parts

    def batches_from(start):
        for batch in picture_batches(pictures, clip.batch_size, config.flip, seed + 1, start):
            photo, index = batch["photo"], batch["index"]
            partner = partners.draw(photo, index, seed)
            yield {
                "image": batch["image"],
                "partner": to_float(pictures[partner]),
                "which": np.stack([which[photo], which[partner]], axis=1),
                "tokens": tokens[photo],
                "person": person[photo].astype(np.int32),
                "index": index,
            }

    learnt = fit_stage(config, clip, workdir / "clip", mesh, init, loss, {}, batches_from)
    for tower, settings in (("text_encoder", text_settings), ("image_encoder", vision_settings)):
        save_tower(folder, tower, settings, learnt[tower])
    rest = {name: learnt[name] for name in ("text_projection", "logit_scale")}
    preprocessing = folders.clip_preprocessing(vision.config.image_size)

    def write() -> None:
        # CLIPTextModel has no place for these; scoring text against pictures needs them.
        tensors.save_tree(rest, folder / "text_projection.safetensors")
        folders.write_json(folder / "feature_extractor/preprocessor_config.json", preprocessing)

    first_process(write)


def _cut(tokens: np.ndarray, end: int) -> np.ndarray:
    """Tokens ``[..., T]`` without the columns in which every text has ended already."""
    return tokens[..., : (tokens == end).argmax(axis=-1).max() + 1]


class Partners:
    """Another photo of the same person, where there is one; else the same photo."""

    def __init__(self, person: np.ndarray):
        """`person` [P]: who is on each photo."""
        self._others = [np.flatnonzero(person == p) for p in range(person.max() + 1)]
        self._person = person

    def draw(self, photo: np.ndarray, index: np.ndarray, seed: int) -> np.ndarray:
        """A partner per photo ``[B]``, a function of (seed, index)."""
        out = photo.copy()
        for i, (row, example) in enumerate(zip(photo, index, strict=True)):
            others = self._others[self._person[row]]
            others = others[others != row]
            if len(others):
                out[i] = np.random.default_rng((seed, int(example))).choice(others)
        return out


def score_clip(folder: Path, photos: Photos, rows: np.ndarray, config: ConfigDict) -> dict:
    """How well the image embedding verifies people never seen in training: AUC over pairs.

    And, where full captions describe the person, how often the photo that a caption was made for
    is the nearest of 64, each of another person.
    """
    eye = folders.load_tower(folder / "image_encoder", "image_encoder")
    pictures = to_float(read_pictures(photos, rows, config))
    embed = jax.jit(lambda p, x: eye.module.apply({"params": p}, x).embedding)
    embeddings = in_parts(lambda part: embed(eye.params, part), pictures)
    people = [photos.people[row] for row in rows]
    scores = verification(embeddings, people)
    kinds = captions_of(photos, rows)
    if "full" in kinds:
        texts = pipeline.embed_captions(folder, kinds["full"])
        scores["retrieval"] = retrieval(embeddings, texts, people)
    return {"unseen_people": len(set(people)), **{k: round(v, 4) for k, v in scores.items()}}


def retrieval(
    pictures: np.ndarray, texts: np.ndarray, people: Sequence[str], among: int = 64
) -> float:
    """Share of captions whose own photo is the nearest of `among`, each of another person.

    Args:
      pictures, texts: embeddings ``[P, D]`` of photos and of their captions.
      people: the person of each row; several rounds are made of their 1st, 2nd, … photos.
    """
    pictures = pictures / np.linalg.norm(pictures, axis=1, keepdims=True)
    numbers = dict.fromkeys(people, 0)
    place = np.empty(len(people), np.int64)
    for row, person in enumerate(people):
        place[row], numbers[person] = numbers[person], numbers[person] + 1
    right = []
    for number in range(place.max() + 1):
        rows = np.flatnonzero(place == number)
        for start in range(0, len(rows) - among + 1, among):
            chosen = rows[start : start + among]
            nearest = (texts[chosen] @ pictures[chosen].T).argmax(axis=1)
            right.append((nearest == np.arange(among)).mean())
    return float(np.mean(right)) if right else float("nan")
