"""Synthetic photos: people differ in colour, photos in the position of a stripe."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

SHARED = pathlib.Path(__file__).resolve().parents[2].parent / "shared"


def jpeg(person: int, number: int, size: int = 40) -> bytes:
    pixels = np.full((size, size, 3), (60 * person % 256, 90, 30 * number % 256), np.uint8)
    pixels[:, number % size] = 255
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


PEOPLE = {"Ann_Lee": 3, "Bo_Van_Dyk": 2, "Cy_Ono": 1}


def write_tgz(path: pathlib.Path, photos: dict[str, bytes]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in photos.items():
            info = tarfile.TarInfo(f"lfw-deepfunneled/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_folder(path: pathlib.Path, counts: dict[str, int]) -> pathlib.Path:
    for person, (name, count) in enumerate(counts.items()):
        (path / name).mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            (path / name / f"{number}.jpg").write_bytes(jpeg(person, number))
    return path
