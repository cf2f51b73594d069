"""Trains a small base in Stable Diffusion's layout from captioned photos.

python -m persona_jax.pretrain --config configs/base.py:lfw --workdir bases/lfw

Three stages, each resumable by running the same command again: VAE, CLIP pair, UNet. The people
kept for validation and test are in none of them. Writes WORKDIR/pipeline, a pipeline folder, and
WORKDIR/report.json.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from persona_jax import paint, pipeline
from persona_jax.cli import run_with_config, write_run_files
from persona_jax.data import images
from persona_jax.data.encodings import encode_photos
from persona_jax.data.loader import photo_batches
from persona_jax.data.photos import Photos
from persona_jax.data.tokenizer import learn_tokenizer
from persona_jax.dataset import open_dataset, rows_of
from persona_jax.diffusion.loss import denoising_loss, draw_steps, example_keys
from persona_jax.diffusion.schedule import STABLE_DIFFUSION
from persona_jax.interop import folders, tensors
from persona_jax.metrics.verification import verification
from persona_jax.models import towers
from persona_jax.models.attention import Source, project_keys_values
from persona_jax.models.unet import text_kernels
from persona_jax.models.vae import (
    AutoencoderKL,
    draw_latents,
    kl_divergence,
)
from persona_jax.training import contrastive
from persona_jax.training.loop import fit
from persona_jax.training.mesh import initialize_distributed, make_mesh, place, replicated
from persona_jax.training.state import init_state, make_optimizer, make_step

PROMPTS = ("a photo of a smiling woman", "a photo of an angry man", "a photo of a person", "")


def main(config: ConfigDict, workdir: Path) -> None:
    """VAE, CLIP pair, UNet, report."""
    initialize_distributed()
    mesh = make_mesh(**config.mesh)
    write_run_files(workdir, config)
    photos, people = open_dataset(config.data)
    rows = rows_of(photos, people.base)
    held_out = rows_of(photos, [*people.validation, *people.test])
    print(f"{len(rows)} photos of {len(people.base)} people; {len(held_out)} photos held out")
    pictures = read_pictures(photos, rows, config)
    folder = workdir / "pipeline"
    learn_tokenizer(
        [photos.captions[row] for row in rows],
        config.vocab_size,
        config.clip.text.max_position_embeddings,
        folder / "tokenizer",
    )

    train_vae(config, workdir, mesh, pictures)
    report = {"vae": score_vae(folder, read_pictures(photos, held_out[:256], config))}
    print(json.dumps(report), flush=True)
    train_clip(config, workdir, mesh, photos, rows, pictures)
    report |= {"clip": score_clip(folder, photos, held_out, config)}
    print(json.dumps(report), flush=True)
    train_unet(config, workdir, mesh, photos, rows)
    (workdir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"base written to {folder}; pictures in {workdir / 'unet'}. Next:\n"
        f"  python -m persona_jax.train --config configs/sa.py:{config.preset} --workdir runs/sa"
    )


# --- pictures -------------------------------------------------------------------------------


def read_pictures(photos: Photos, rows: np.ndarray, config: ConfigDict) -> np.ndarray:
    """The chosen photos, cropped and resized, uint8 ``[P, S, S, 3]``."""
    size, crop = config.image_size, config.data.crop
    out = np.empty((len(rows), size, size, 3), np.uint8)
    for i, row in enumerate(tqdm(rows, desc="read photos", unit=" photos")):
        cropped = images.centre_crop(photos.image(row), crop)
        out[i] = images.to_uint8(images.to_model(cropped, size))
    return out


def to_float(pictures: np.ndarray) -> np.ndarray:
    """uint8 → float32 in [−1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1.0


def in_parts(function, array: np.ndarray, size: int = 64) -> np.ndarray:
    """`function` over the first axis of `array`, `size` rows at a time."""
    parts = [np.asarray(function(array[i : i + size])) for i in range(0, len(array), size)]
    return np.concatenate(parts)


def picture_batches(
    pictures: np.ndarray, batch_size: int, seed: int, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """{"image" [B, S, S, 3] in [−1, 1], mirrored half of the time, "photo" [B], "index" [B]}."""
    chosen = photo_batches(
        len(pictures),
        batch_size,
        flip=True,
        seed=seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for batch in chosen:
        image = to_float(pictures[batch["photo"]])
        image = np.where(batch["flip"][:, None, None, None], image[:, :, ::-1], image)
        yield {"image": image, "photo": batch["photo"].astype(np.int32), "index": batch["index"]}


def fit_stage(config, stage: ConfigDict, workdir, mesh, params, loss, frozen, batches_from, **more):
    """One stage from its checkpoint, or from `params`, to its last step; returns the state."""
    ema = stage.get("ema_decay")
    optimizer = make_optimizer(stage.optimizer)
    return fit(
        init_state(params, optimizer, mesh, ema=ema is not None),
        make_step(loss, optimizer, mesh, ema_decay=ema),
        place(frozen, replicated(mesh)),
        batches_from,
        steps=stage.optimizer.steps,
        workdir=workdir,
        mesh=mesh,
        save_every=config.save_every,
        log_every=config.log_every,
        **more,
    )


def save_tower(folder: Path, tower: str, settings: dict, params: dict) -> None:
    """Writes a finished tower, from process 0."""
    if jax.process_index() == 0:
        folders.save_tower(folder / tower, tower, settings, params)


# --- VAE ------------------------------------------------------------------------------------


def train_vae(config: ConfigDict, workdir: Path, mesh, pictures: np.ndarray) -> None:
    """Reconstruction (squared and absolute error) and a little KL; then the latents' scale."""
    settings = config.vae.tower.to_dict()
    module = towers.build("vae", settings)
    kl_weight, seed = config.vae.kl_weight, config.seed

    def loss(params, frozen, batch, step):
        image = batch["image"]
        moments = module.apply({"params": params}, image, method=AutoencoderKL.encode)
        keys = example_keys(seed, step, batch["index"])
        scale = module.config.scaling_factor
        latents = jax.vmap(lambda key, m: draw_latents(key, m, scale))(keys, moments)
        error = module.apply({"params": params}, latents, method=AutoencoderKL.decode) - image
        squared = jnp.mean(error**2)
        kl = jnp.mean(kl_divergence(moments)) / latents[0].size
        total = squared + 0.2 * jnp.mean(jnp.abs(error)) + kl_weight * kl
        return total, {"psnr": 10 * jnp.log10(4.0 / squared), "kl": kl}

    def batches_from(start):
        return picture_batches(pictures, config.vae.batch_size, seed, start)

    state = fit_stage(
        config,
        config.vae,
        workdir / "vae",
        mesh,
        towers.initialise(module, jax.random.key(seed)),
        loss,
        {},
        batches_from,
    )
    encode = jax.jit(lambda p, x: module.apply({"params": p}, x, method=AutoencoderKL.encode))
    sample = to_float(pictures[:: max(1, len(pictures) // 512)][:512])
    moments = in_parts(lambda part: encode(state.params, part), sample)
    mean, log_variance = np.split(moments, 2, axis=-1)
    std = float(np.sqrt(mean.var() + np.exp(log_variance).mean()))
    settings["scaling_factor"] = round(1 / std, 5)
    save_tower(workdir / "pipeline", "vae", settings, state.params)


def score_vae(folder: Path, pictures: np.ndarray) -> dict:
    """PSNR of reconstructions of unseen people, in dB over values in [−1, 1]."""
    vae = folders.load_tower(folder / "vae", "vae")
    reconstruct = jax.jit(lambda p, x: vae.module.apply({"params": p}, x))
    image = to_float(pictures)
    again = np.clip(in_parts(lambda part: reconstruct(vae.params, part), image), -1, 1)
    error = ((again - image) ** 2).mean(axis=(1, 2, 3))
    rows = [list(images.to_uint8(x[:12])) for x in (image, again)]
    images.grid(rows).save(folder.parent / "vae.png")
    return {"psnr": round(float(np.mean(10 * np.log10(4 / error))), 2), "photos": len(image)}


# --- CLIP -----------------------------------------------------------------------------------


def train_clip(
    config: ConfigDict, workdir: Path, mesh, photos: Photos, rows, pictures: np.ndarray
) -> None:
    """Captions against pictures, and photos of one person drawn together."""
    folder, clip = workdir / "pipeline", config.clip
    tokenizer = pipeline.load_tokenizer(folder / "tokenizer")
    tokens, _ = pipeline.tokenize(tokenizer, [photos.captions[row] for row in rows])
    end = len(tokenizer) - 1
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

    def loss(params, frozen, batch, step):
        keys = jax.vmap(jax.random.split)(example_keys(seed, step, batch["index"]))
        views = jnp.concatenate([batch["image"], batch["partner"]])
        views = jax.vmap(contrastive.augment)(keys.T.reshape(-1), views)
        embedded = vision.apply({"params": params["image_encoder"]}, views).embedding
        embedded = contrastive.normalise(embedded)
        pooled = text.apply({"params": params["text_encoder"]}, batch["tokens"]).pooled
        captions = contrastive.normalise(pooled @ params["text_projection"]["kernel"])
        alike = (batch["tokens"][:, None] == batch["tokens"][None]).all(axis=-1)
        scale = jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(100.0)))
        caption = contrastive.caption_loss(embedded[: len(captions)], captions, alike, scale)
        who = jnp.concatenate([batch["person"], batch["person"]])
        identity = contrastive.identity_loss(embedded, who, temperature)
        return caption + weight * identity, {"caption": caption, "identity": identity}

    def batches_from(start):
        for batch in picture_batches(pictures, clip.batch_size, seed + 1, start):
            photo, index = batch["photo"], batch["index"]
            yield {
                "image": batch["image"],
                "partner": to_float(pictures[partners.draw(photo, index, seed)]),
                "tokens": tokens[photo],
                "person": person[photo].astype(np.int32),
                "index": index,
            }

    state = fit_stage(config, clip, workdir / "clip", mesh, init, loss, {}, batches_from)
    for tower, settings in (("text_encoder", text_settings), ("image_encoder", vision_settings)):
        save_tower(folder, tower, settings, state.params[tower])
    if jax.process_index() == 0:
        rest = {name: state.params[name] for name in ("text_projection", "logit_scale")}
        # CLIPTextModel has no place for these; scoring text against pictures needs them.
        tensors.save_tree(rest, folder / "text_projection.safetensors")
        folders.write_json(
            folder / "feature_extractor/preprocessor_config.json",
            folders.clip_preprocessing(vision.config.image_size),
        )


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
    """How well the image embedding verifies people never seen in training: AUC over pairs."""
    eye = folders.load_tower(folder / "image_encoder", "image_encoder")
    pictures = to_float(read_pictures(photos, rows, config))
    embed = jax.jit(lambda p, x: eye.module.apply({"params": p}, x).embedding)
    embeddings = in_parts(lambda part: embed(eye.params, part), pictures)
    people = [photos.people[row] for row in rows]
    scores = verification(embeddings, people)
    return {"unseen_people": len(set(people)), **{k: round(v, 4) for k, v in scores.items()}}


# --- UNet -----------------------------------------------------------------------------------


def train_unet(config: ConfigDict, workdir: Path, mesh, photos: Photos, rows) -> None:
    """Noise prediction from captions, a tenth of them empty."""
    folder, unet_config = workdir / "pipeline", config.unet
    settings = unet_config.tower.to_dict()
    module = towers.build("unet", settings)
    write_scaffold(folder)
    parts = pipeline.load(str(folder), only=("vae", "text_encoder"))
    text, vae = parts.text_encoder, parts.vae
    encodings = encode_latents(photos, rows, parts, config)
    empty, _ = parts.tokenize([""])
    schedule, seed, scale = parts.schedule, config.seed, vae.module.config.scaling_factor

    def loss(params, frozen, batch, step):
        keys = example_keys(seed, step, batch["index"])
        drop_key, latent_key, noise_key, t_key = jax.vmap(lambda k: jax.random.split(k, 4))(keys).T
        dropped = jax.vmap(jax.random.uniform)(drop_key) < unet_config.empty_caption
        ids = jnp.where(dropped[:, None], frozen["empty"], batch["tokens"])
        hidden = text.module.apply({"params": frozen["text_encoder"]}, ids).hidden
        source = Source(*project_keys_values(text_kernels(params, module.config), hidden))
        latents = jax.vmap(lambda k, m: draw_latents(k, m, scale))(latent_key, batch["moments"])
        noise = jax.vmap(lambda k: jax.random.normal(k, latents.shape[1:]))(noise_key)
        t = draw_steps(t_key, schedule)

        def predict(z, t):
            return module.apply({"params": params}, z, t, (source,))

        return denoising_loss(predict, schedule, latents, noise, t).mean(), {}

    def batches_from(start):
        chosen = photo_batches(
            len(rows),
            unet_config.batch_size,
            flip=True,
            seed=seed + 2,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for batch in chosen:
            photo, side = batch["photo"], batch["flip"].astype(np.int64)
            yield {
                "moments": encodings.arrays["moments"][photo, side],
                "tokens": encodings.arrays["tokens"][photo],
                "index": batch["index"],
            }

    parts = dataclasses.replace(parts, unet=folders.Tower(module, {}, settings))
    painter = paint.make_painter(parts, steps=unet_config.grid_steps)
    ids, _ = parts.tokenize([prompt for prompt in PROMPTS for _ in range(6)])
    request = paint.Request(
        keys=paint.picture_keys(seed, 6 * len(PROMPTS)),
        ids=jnp.asarray(ids),
        negative_ids=jnp.repeat(jnp.asarray(empty), len(ids), axis=0),
        guidance=unet_config.grid_guidance,
    )

    def draw(step, state):
        frozen = {"unet": state.ema, "vae": vae.params, "text_encoder": text.params}
        pictures = images.to_uint8(np.asarray(painter(frozen, None, request)))
        grid = images.grid([list(row) for row in np.split(pictures, len(PROMPTS))])
        if jax.process_index() == 0:
            grid.save(workdir / "unet" / f"grid_{step:06d}.png")

    state = fit_stage(
        config,
        unet_config,
        workdir / "unet",
        mesh,
        lambda: towers.initialise(module, jax.random.key(seed + 2)),
        loss,
        {"text_encoder": text.params, "empty": jnp.asarray(empty)},
        batches_from,
        callbacks=[(unet_config.grid_every, draw)],
    )
    save_tower(folder, "unet", settings, state.ema)


def write_scaffold(folder: Path) -> None:
    """The small files that make the towers' folders a pipeline."""
    if jax.process_index() == 0:
        folders.write_json(folder / "scheduler/scheduler_config.json", STABLE_DIFFUSION)
        folders.write_json(folder / "model_index.json", folders.model_index())


def encode_latents(photos: Photos, rows, parts: pipeline.Pipeline, config: ConfigDict):
    """The moments of every base photo, in both orientations, and its caption's tokens."""
    vae, size, crop = parts.vae, config.image_size, config.data.crop
    encode = jax.jit(lambda p, x: vae.module.apply({"params": p}, x, method=AutoencoderKL.encode))

    def encode_images(pictures):
        pixels = [images.to_model(images.centre_crop(p, crop), size) for p in pictures]
        return {"moments": np.asarray(encode(vae.params, np.stack(pixels)))}

    return encode_photos(
        photos,
        rows,
        encode_images=encode_images,
        encode_captions=lambda captions: {"tokens": parts.tokenize(captions)[0]},
        cache_dir=Path(config.data.data_dir) / "encoded",
        key=f"base {vae.hash} {size} {crop}",
    )


if __name__ == "__main__":
    run_with_config(main)
