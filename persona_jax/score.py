"""Scores any folder of images against a folder of photos: FID, KID and IS.

python -m persona_jax.score --pictures out --against photos --inception
python -m persona_jax.score --pictures out --against photos --pipeline tiny

The network is Inception v3, with both ways of resizing, or the trait classifier of a base of drawn
people; each column names it. --save FILE writes the photos' statistics, and --against FILE reads
them; pytorch-fid's .npz files work too, for FID (legacy).
"""

import argparse
import mimetypes
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from jaxtyping import Float

from persona_jax.data import images, photo_decoding
from persona_jax.data.people_folder import some
from persona_jax.errors import UserError, shown
from persona_jax.evaluation import networks, reference_statistics, report, trait_classifier
from persona_jax.evaluation.networks import Network, NetworkOutput
from persona_jax.interop import folders
from persona_jax.runtime import buckets, settings
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.outputs import try_file
from persona_jax.runtime.settings import number

AT_ONCE = 2**24
"""Maximal pixels held in memory (at least one image is)."""


def main(arguments: argparse.Namespace) -> None:
    """Scores the images and prints a table of one row."""
    against = buckets.local(arguments.against)
    row: dict[str, report.Cell] = {}
    known = reference_statistics.load(against) if against.suffix == ".npz" else {}
    opened = open_networks(arguments)
    if arguments.save:
        try_file(arguments.save, "--save")
    pictures = buckets.local(arguments.pictures)
    for folder in (pictures,) if known else (pictures, against):
        if others := list_pictures(folder)[1]:
            names = some([str(file.relative_to(folder)) for file in others])
            print(f"{shown(folder)}: ignored, because they are not single images: {names}")
    outputs, real = run_networks(pictures, opened), known
    if not known:
        photos = run_networks(against, opened)
        real = {name: reference_statistics.of(found.features) for name, found in photos.items()}
    for name in opened:
        if name not in real:
            print(f"{against}: no statistics by {name}; there are: {', '.join(known)}")
            continue
        row |= report.realism([outputs[name]], real[name], name, arguments.fid, arguments.splits)
    if not row:
        raise UserError(f"{against}: statistics by none of {', '.join(opened)}")
    if arguments.save:
        reference_statistics.save(buckets.local(arguments.save), real)
    print(report.markdown({arguments.pictures: row}))


def open_networks(arguments: argparse.Namespace) -> dict[str, Network]:
    """Opens the networks that the flags name.

    Raises:
      UserError: no network is named, or weights are missing or unknown.
    """
    opened = {}
    if arguments.pipeline:
        classifier = trait_classifier.load_trait_classifier(
            folders.find(arguments.pipeline).parent / "reader"
        )
        opened["the reader"] = networks.from_trait_classifier(classifier)
    if arguments.inception is not None:
        folder = buckets.local(arguments.data_dir) / "weights"
        opened |= networks.inception_networks(
            arguments.inception, arguments.inception_sha256, folder
        )
    if not opened:
        raise UserError("name a network: --inception, or --pipeline of a base of drawn people")
    return opened


def run_networks(folder: Path, opened: Mapping[str, Network]) -> dict[str, NetworkOutput]:
    """The output of each network for all images of a folder, each of which is read once.

    Features and logits are kept in float32, as KID and FID∞ draw subsets of all: 50,000 images take
    0.6 GB for each Inception network.
    """
    files, start = list_pictures(folder)[0], 0
    kept: dict[str, dict[str, np.ndarray]] = {name: {} for name in opened}
    for part in read_pictures(files):
        for name, network in opened.items():
            for kind, rows in vars(network(part)).items():
                if rows is not None:
                    if not start:
                        kept[name][kind] = np.empty((len(files), rows.shape[1]), np.float32)
                    kept[name][kind][start : start + len(part)] = rows
        start += len(part)
    return {
        name: NetworkOutput(found["features"], found.get("classes")) for name, found in kept.items()
    }


def list_pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """Lists the images of a folder and its subfolders, by name.

    Names that begin with a dot are ignored.

    Returns:
      The images; and the other files, among them sheets of several images written by this package.

    Raises:
      UserError: there is no folder, no image in it, or an image file that cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        absent = isinstance(error, FileNotFoundError)
        reason = "no such folder" if absent else error.strerror
        raise UserError(f"{shown(error.filename)}: {reason}; expected a folder of pictures")

    files = [Path(at) / name for at, _, names in os.walk(folder, onerror=refuse) for name in names]
    pictures, others = [], []
    for file in sorted(file for file in files if not file.name.startswith(".")):
        problem = photo_decoding.refusal(file)
        if problem is None and not images.is_sheet(file):
            pictures.append(file)
        elif problem is None or not (mimetypes.guess_type(file.name)[0] or "").startswith("image/"):
            others.append(file)
        else:
            raise UserError(f"{shown(file)}: not a readable picture ({problem})")
    if not pictures:
        raise UserError(f"{shown(folder)}: no pictures in this folder")
    return pictures, others


def read_pictures(files: Sequence[Path]) -> Iterator[Float[np.ndarray, "_ h w 3"]]:
    """Reads images in [−1, 1], in batches.

    Raises:
      UserError: an image cannot be read, or the sizes differ.
    """
    first, start = photo_decoding.load_photo(files[0]), 0
    at_once = max(1, AT_ONCE // (first.width * first.height))
    while start < len(files):
        part = []
        for file in files[start : start + at_once]:
            picture = photo_decoding.load_photo(file)
            if picture.size != first.size:
                raise UserError(
                    f"{file}: {picture.size[0]}x{picture.size[1]} pixels, but {files[0].name} has "
                    f"{first.size[0]}x{first.size[1]}; all must have the same size"
                )
            part.append(np.asarray(picture, np.float32) / 127.5 - 1.0)
        yield np.stack(part)
        start += at_once


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--pictures", type=settings.path, required=True, help="folder of the images to score"
    )
    flags.add_argument(
        "--against", type=settings.path, required=True, help="folder of photos, or their statistics"
    )
    flags.add_argument("--save", type=settings.path, help="file for the photos' statistics, .npz")
    flags.add_argument("--pipeline", help="a base with a trait classifier: tiny, or a folder")
    networks.add_flags(flags)
    flags.add_argument(
        "--data_dir",
        type=settings.path,
        default="data",
        help="folder in whose weights/ downloaded weights are kept",
    )
    flags.add_argument(
        "--splits",
        type=number(settings.COUNT),
        help="of the Inception Score; default: 10, or the number of images if that is less",
    )
    flags.add_argument(
        "--fid", action="store_true", help="report FID even for fewer images than features"
    )
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
