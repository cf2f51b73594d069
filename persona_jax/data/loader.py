"""Training batches in a global order that depends on the seed alone.

Example i of the infinite sequence is the same in every run. Step s consists of the examples
[s B, (s + 1) B), of which process p of P takes s B + p, s B + p + P, ... So the step is the
iterator's whole state, and a run may resume with another number of processes.
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Int

from persona_jax.data.leave_one_out import leave_one_out, with_wrong_photos
from persona_jax.data.records import Arrays
from persona_jax.errors import UserError

# Two threads hide the page faults of memory-mapped encodings; more would contend for the GIL.
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


def batches(
    encodings: Arrays,
    people_photos: Sequence[Int[np.ndarray, " _"]],
    *,
    batch_size: int,
    n: int,
    fixed: bool,
    flip: bool,
    seed: int,
    wrong: float = 0.0,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields leave-one-out training batches without end; each photo is the target once an epoch.

    Args:
      encodings: "moments" [P, 2, h, w, 2C], "embeddings" [P, 2, D] or [P, 2, L, D], "tokens"
        [P, T]; axis 1 is the orientation (0 original, 1 mirrored; the latter only if `flip`).
      people_photos: rows of each person's photos, two or more (see splits.photos_of).
      batch_size: over all processes; each yields batch_size / process_count examples.
      n: photos drawn for an example, the target included: N = n - 1.
      fixed: always use the largest number of references (see leave_one_out).
      flip: mirror half of the examples.
      wrong: share of the examples in which a minority of references shows other people, 0 to 1.
      start_step: the first batch; nothing before it is read or drawn.
      process_index, process_count: this process and the number of processes.

    Yields:
      {"moments" [B, h, w, 2C], "tokens" [B, T], "embeddings" [B, N, (L,) D] (0 where padded),
      "mask" [B, N], "index" [B] int32: the example's position in the global order, modulo 2³¹}.

    Raises:
      UserError: a person has fewer than two photos, n is below 2, the batch does not divide evenly
        among the processes, `wrong` is outside [0, 1], or it is above 0 with a single person.
    """
    if not 0 <= wrong <= 1 or (wrong and len(people_photos) < 2):
        raise UserError(
            f"config.references.wrong={wrong}: expected a share from 0 to 1, and above 0 at least "
            f"two people; found {len(people_photos)}"
        )
    if n < 2:
        raise UserError(f"n = {n} photos per example: expected at least 2 (a target and one more)")
    if alone := sum(len(photos) < 2 for photos in people_photos):
        raise UserError(f"{alone} people have fewer than 2 photos; train on the others")
    rows = np.concatenate(people_photos)
    targets = rows.tolist()
    starts = np.cumsum([0, *(len(photos) for photos in people_photos)])
    persons = np.repeat(np.arange(len(people_photos)), [len(p) for p in people_photos])

    def draw(index: int, position: int) -> dict[str, np.ndarray]:
        photos = people_photos[persons[position]]
        rng = np.random.default_rng((seed, index))
        example = leave_one_out(photos, targets[position], rng, n=n, fixed=fixed, flip=flip)
        if wrong and rng.random() < wrong:
            # Positions of all photos but the person's own, which are contiguous.
            own, first = len(photos), starts[persons[position]]
            drawn = rng.integers(len(targets) - own, size=n - 1)
            strangers = rows[np.where(drawn < first, drawn, drawn + own)]
            example = with_wrong_photos(example, strangers, rng)
        return {**_as_arrays(example._asdict()), "index": _int32(index)}

    def gather(drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        target, side = drawn["target"], drawn["flip"].astype(np.int64)
        embeddings = encodings["embeddings"][drawn["references"], side[:, None]]
        return {
            "moments": encodings["moments"][target, side],
            "tokens": encodings["tokens"][target],
            "embeddings": embeddings
            * drawn["mask"].reshape(-1, n - 1, *[1] * (embeddings.ndim - 2)),
            "mask": drawn["mask"],
            "index": drawn["index"],
        }

    shares = _shares(
        _order(len(targets), seed).map_with_index(draw), batch_size, process_index, process_count
    )
    return iter(shares[start_step:].map(gather).to_iter_dataset(READ))


def photo_batches(
    count: int,
    batch_size: int,
    *,
    flip: bool,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields indices of photos for training the base, in the same manner as :func:`batches`.

    Args:
      count: number of photos.
      batch_size, flip, seed, start_step, process_index, process_count: see :func:`batches`.

    Yields:
      {"photo" [B] int64 in [0, count), each once an epoch; "flip" [B] bool; "index" [B] int32}.
    """

    def draw(index: int, photo: int) -> dict[str, np.ndarray]:
        mirrored = flip and np.random.default_rng((seed, index)).random() < 0.5
        return {**_as_arrays({"photo": photo, "flip": mirrored}), "index": _int32(index)}

    order = _order(count, seed).map_with_index(draw)
    shares = _shares(order, batch_size, process_index, process_count)
    return iter(shares[start_step:].to_iter_dataset(READ))


def _order(count: int, seed: int) -> grain.MapDataset:
    """Returns 0 .. count - 1, shuffled anew in each epoch, for a practically endless sequence."""
    # grain seeds epoch e with seed + e: hashing keeps runs of nearby seeds from sharing epochs.
    hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    # Not grain's own endless repetition: its length is too large for batches of one example.
    return grain.MapDataset.range(count).shuffle(seed=hashed).repeat(2**48 // count + 1)


def _shares(
    examples: grain.MapDataset, batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset:
    """Returns this process's part of every batch."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch size {batch_size}: expected a multiple of the {process_count} processes"
        )
    return examples[process_index::process_count].batch(batch_size // process_count)


def _as_arrays(values: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in values.items()}


def _int32(index: int) -> np.ndarray:
    return np.asarray(index % 2**31, np.int32)
