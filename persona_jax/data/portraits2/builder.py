"""The tfds builder of `portraits2`: groups of people, nobody in two of them, drawn on the spot."""

import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from persona_jax.data.portraits.builder import GROUPS, Settings
from persona_jax.data.portraits2 import descriptions, drawing, traits

CHUNK = 256


class Portraits2(tfds.core.GeneratorBasedBuilder):
    """Illustrated people whose every trait is known ("traits": traits.IDENTITY, "photo_scene":
    traits.SCENE)."""

    VERSION = tfds.core.Version("2.0.0")  # raise it whenever a pixel or a word changes

    def __init__(self, *, settings: Settings, **kwargs: Any):
        """`settings`: who to draw, and how."""
        self._settings = settings
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        numbers = {"traits": len(traits.IDENTITY), "photo_scene": len(traits.SCENE)}
        features = {
            "image": tfds.features.Image(),
            "person": tfds.features.Text(),
            "photo": tfds.features.Scalar(np.int32),
            "caption": tfds.features.Text(),
            "full_caption": tfds.features.Text(),
        } | {
            name: tfds.features.Tensor(shape=(length,), dtype=np.float32)
            for name, length in numbers.items()
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Illustrated people.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"photos": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        settings, built = self._settings, pathlib.Path(self.data_dir)
        total = sum(settings.people.values()) * settings.photos
        with tqdm(total=total, desc="draw portraits", unit=" photos") as bar:
            for photo, data in draw_files(draw(settings), settings.size):
                key = f"{photo['person']}/{photo['photo']:04d}"
                yield key, {"image": io.BytesIO(data), **photo}
                bar.update()
        (built / "source.json").write_text(json.dumps({"portraits2": settings.digest}))
        (built / "skipped.json").write_text("[]")


def draw(settings: Settings) -> Iterator[dict]:
    """Every photo's numbers and captions, person by person; all but the picture.

    A person and a photo depend on nothing but their own names and the seed.
    """
    for group in (g for g in GROUPS if settings.people.get(g)):
        for person in range(settings.people[group]):
            name = (settings.seed, GROUPS.index(group), person)
            identity = traits.draw_identity(np.random.default_rng(name))
            for number in range(1, settings.photos + 1):
                rng = np.random.default_rng((*name, number))
                scene = traits.draw_scene(rng)
                yield {
                    "person": f"{group}-{person:05d}",
                    "photo": number,
                    "caption": descriptions.photo_caption(traits.as_dict(traits.SCENE, scene)),
                    "full_caption": descriptions.full_caption(identity, scene, rng),
                    "traits": identity,
                    "photo_scene": scene,
                }


def draw_files(photos: Iterable[dict], size: int) -> Iterator[tuple[dict, bytes]]:
    """Each photo with its picture, a PNG file; as many are drawn at a time as there are cores.

    libvips and Pillow work without holding Python's lock.
    """

    def file(photo: dict) -> bytes:
        data = io.BytesIO()
        picture = drawing.draw(photo["traits"], photo["photo_scene"], size)
        Image.fromarray(picture).save(data, "PNG", compress_level=1)
        return data.getvalue()

    photos = iter(photos)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(itertools.islice(photos, CHUNK)):
            yield from zip(chunk, pool.map(file, chunk), strict=True)
