"""The tfds builder of `portraits`: groups of people, nobody in two of them, drawn on the spot."""

import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float
from PIL import Image
from tqdm import tqdm

from persona_jax.data.portraits import descriptions as words
from persona_jax.data.portraits import traits
from persona_jax.data.portraits.render import render
from persona_jax.errors import UserError

GROUPS = ("base", "unseen", "reader", "train", "validation", "test")
"""Who may be drawn: two groups never share a person. `base` is for the base's towers and `unseen`
for scoring them, `reader` for the reader; adapters have the other three."""

CHUNK = 128


@dataclasses.dataclass(frozen=True)
class Settings:
    """What fixes a portraits dataset to the last pixel.

    Attributes:
      people: how many people of each group.
      photos: photos of each person.
      size: pixels along a side.
      seed: of all draws.
    """

    people: Mapping[str, int]
    photos: int = 10
    size: int = 64
    seed: int = 0

    def __post_init__(self):
        """Refuses unknown groups and sizes that make no picture."""
        if strange := sorted(set(self.people) - set(GROUPS)):
            raise UserError(f"portraits: unknown groups {strange}; known: {', '.join(GROUPS)}")
        if self.photos < 2 or self.size < 8 or not sum(self.people.values()):
            raise UserError(
                f"portraits: {dict(self.people)} people, {self.photos} photos each, {self.size} "
                "pixels; expected somebody, with 2 photos or more, of 8 pixels or more"
            )

    @property
    def digest(self) -> str:
        """Names the dataset."""
        values = dataclasses.asdict(self) | {"people": dict(self.people)}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


class Portraits(tfds.core.GeneratorBasedBuilder):
    """Drawn people whose every look is known (traits.IDENTITY and traits.SCENE)."""

    VERSION = tfds.core.Version("1.5.0")  # raise it whenever a pixel or a word changes

    def __init__(self, *, settings: Settings, **kwargs: Any):
        """`settings`: who to draw, and how."""
        self._settings = settings
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        numbers = {"identity": len(traits.IDENTITY), "scene": len(traits.SCENE)}
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
            description="Drawn portraits.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"photos": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        settings, built = self._settings, pathlib.Path(self.data_dir)
        total = sum(settings.people.values()) * settings.photos
        with tqdm(total=total, desc="draw portraits", unit=" photos") as bar:
            for chunk, pictures in _pictures(draw(settings), settings.size):
                for photo, picture in zip(chunk, pictures, strict=True):
                    data = io.BytesIO()
                    Image.fromarray(picture).save(data, "PNG", compress_level=1)
                    data.seek(0)
                    yield f"{photo['person']}/{photo['photo']:04d}", {"image": data, **photo}
                bar.update(len(chunk))
        (built / "source.json").write_text(json.dumps({"portraits": settings.digest}))
        (built / "skipped.json").write_text("[]")


def draw(settings: Settings) -> Iterator[dict]:
    """Every photo's numbers and captions, person by person; all but the picture."""
    for group in (g for g in GROUPS if settings.people.get(g)):
        for person in range(settings.people[group]):
            # A person and a photo depend on nothing but their own names and the seed.
            name = (settings.seed, GROUPS.index(group), person)
            rng = np.random.default_rng(name)
            identity, rate = traits.draw_identity(rng), traits.draw_hiding_rate(rng)
            who = traits.as_dict(traits.IDENTITY, identity)
            for number in range(1, settings.photos + 1):
                rng = np.random.default_rng((*name, number))
                scene = traits.draw_scene(rng, rate)
                photo = traits.as_dict(traits.SCENE, scene)
                yield {
                    "person": f"{group}-{person:05d}",
                    "photo": number,
                    "caption": words.photo_caption(photo),
                    "full_caption": words.full_caption(who, photo, rng),
                    "identity": identity,
                    "scene": scene,
                }


def _pictures(photos: Iterator[dict], size: int) -> Iterator[tuple[list[dict], np.ndarray]]:
    """Some photos at a time, and their pictures ``[P, S, S, 3]``.

    The next ones are drawn in the background while the caller stores these.
    """
    chunks = iter(lambda: list(itertools.islice(photos, CHUNK)), [])
    begun = ((chunk, _render(chunk, size)) for chunk in chunks)
    # A pair is there once its second half is begun.
    for (chunk, pictures), _ in itertools.pairwise(itertools.chain(begun, [None])):
        yield chunk, np.asarray(pictures)[: len(chunk)]


def _render(photos: list[dict], size: int) -> jax.Array:
    """Pictures ``[CHUNK, S, S, 3]``; a last chunk is filled up, for one compilation."""

    def stacked(name: str) -> Float[np.ndarray, "P _"]:
        filled = photos + [photos[-1]] * (CHUNK - len(photos))
        return np.stack([photo[name] for photo in filled])

    return render(stacked("identity"), stacked("scene"), size)
