"""What the stages share: pictures, batches of them, and a run from checkpoint to last step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from persona_jax.data import images
from persona_jax.data.loader import photo_batches
from persona_jax.data.photo_datasets import Photos
from persona_jax.interop import folders
from persona_jax.runtime.mesh import first_process, place, replicated, to_host
from persona_jax.training.loop import Callback, fit
from persona_jax.training.state import LossFn, init_state, make_optimizer, make_step


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
    pictures: np.ndarray, batch_size: int, flip: bool, seed: int, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """{"image" [B, S, S, 3] in [−1, 1], half of them mirrored if `flip`, "photo", "index" [B]}."""
    chosen = photo_batches(
        len(pictures),
        batch_size,
        flip=flip,
        seed=seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for batch in chosen:
        image = to_float(pictures[batch["photo"]])
        image = np.where(batch["flip"][:, None, None, None], image[:, :, ::-1], image)
        yield {"image": image, "photo": batch["photo"].astype(np.int32), "index": batch["index"]}


def fit_stage(
    config: ConfigDict,
    stage: ConfigDict,
    workdir: Path,
    mesh: Mesh,
    params: Mapping | Callable[[], Mapping],
    loss: LossFn,
    frozen: Mapping,
    batches_from: Callable[[int], Iterator],
    callbacks: Sequence[Callback] = (),
) -> dict:
    """Trains one stage from its checkpoint, or from `params`, to its last step.

    Returns:
      What was learnt, on the host: the running average where the stage keeps one.
    """
    ema = stage.get("ema_decay")
    optimizer = make_optimizer(stage.optimizer)
    state = fit(
        init_state(params, optimizer, mesh, ema=ema is not None),
        make_step(loss, optimizer, mesh, ema_decay=ema),
        place(frozen, replicated(mesh)),
        batches_from,
        steps=stage.optimizer.steps,
        workdir=workdir,
        mesh=mesh,
        save_every=config.save_every,
        log_every=config.log_every,
        callbacks=callbacks,
    )
    return to_host(state.params if ema is None else state.ema)


def save_tower(folder: Path, tower: str, settings: dict, params: dict) -> None:
    """Writes a finished tower; every process may read it afterwards."""
    first_process(lambda: folders.save_tower(folder / tower, tower, settings, params))
