"""Opens the dataset that a config names and divides its people."""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from persona_jax.data.people_folder import some
from persona_jax.data.photo_datasets import DRAWN, Photos, load_photos
from persona_jax.data.portraits.builder import Settings
from persona_jax.data.splits import People, grouped_people, photos_of, split_people


def open_dataset(config: ConfigDict) -> tuple[Photos, People]:
    """Returns photos and identity-disjoint groups of people for the config's ``data`` section."""
    photos = load_photos(
        config.dataset,
        config.data_dir,
        config.manual_dir or None,
        config.folder or None,
        config.archive_sha256 or None,
        Settings(**config.portraits.to_dict()),
    )
    if photos.skipped:
        print(f"{len(photos.skipped)} files are left out: {some(photos.skipped)}", flush=True)
    if config.dataset in DRAWN:
        return photos, grouped_people(photos.people)
    people = split_people(
        photos.people,
        test=config.test_people,
        validation=None if config.validation_people < 0 else config.validation_people,
        least=config.least_photos,
        seed=config.seed,
    )
    return photos, people


def rows_of(photos: Photos, people: Sequence[str]) -> np.ndarray:
    """Returns the rows of all photos of the given people, ascending ``[P]``."""
    return np.sort(np.concatenate(photos_of(photos.people, people)))
