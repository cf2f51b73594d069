"""Scores a folder of pictures, whoever made them, against a folder of photos: FID, KID and IS.

python -m persona_jax.score --pictures out --against photos --inception
python -m persona_jax.score --pictures out --against photos --pipeline tiny

By Inception v3, with both ways of enlarging pictures, or by the reader of a base of drawn people.
--save FILE keeps the photos' statistics, and --against FILE uses them again; pytorch-fid's .npz
files will do, for FID (legacy). Which network scored what stands in every column.
"""

import argparse
import mimetypes
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from jaxtyping import Float

from persona_jax.data import images, photo_files
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
"""Pixels held in memory, or one picture."""


def main(arguments: argparse.Namespace) -> None:
    """Folders → looks → a table of one row."""
    against, row = buckets.local(arguments.against), {}
    known = reference_statistics.load(against) if against.suffix == ".npz" else {}
    seen_by = open_networks(arguments)
    if arguments.save:
        try_file(arguments.save, "--save")
    pictures = buckets.local(arguments.pictures)
    for folder in (pictures,) if known else (pictures, against):
        if others := list_pictures(folder)[1]:
            names = some([str(file.relative_to(folder)) for file in others])
            print(f"{shown(folder)}: passed over, as they are not single pictures: {names}")
    outputs, real = run_networks(pictures, seen_by), known
    if not known:
        photos = run_networks(against, seen_by)
        real = {name: reference_statistics.of(found.features) for name, found in photos.items()}
    for name in seen_by:
        if name not in real:
            print(f"{against}: no statistics by {name}; there are: {', '.join(known)}")
            continue
        row |= report.realism([outputs[name]], real[name], name, arguments.fid, arguments.splits)
    if not row:
        raise UserError(f"{against}: statistics by none of {', '.join(seen_by)}")
    if arguments.save:
        reference_statistics.save(buckets.local(arguments.save), real)
    print(report.markdown({arguments.pictures: row}))


def open_networks(arguments: argparse.Namespace) -> dict[str, Network]:
    """Who looks.

    Raises:
      UserError: nobody named, or weights that are missing or others.
    """
    found = {}
    if arguments.pipeline:
        classifier = trait_classifier.load_trait_classifier(
            folders.find(arguments.pipeline).parent / "reader"
        )
        found["the reader"] = networks.from_trait_classifier(classifier)
    if arguments.inception is not None:
        folder = buckets.local(arguments.data_dir) / "weights"
        found |= networks.inception_networks(
            arguments.inception, arguments.inception_sha256, folder
        )
    if not found:
        raise UserError("name who looks: --inception, or --pipeline of a base of drawn people")
    return found


def run_networks(folder: Path, seen_by: Mapping[str, Network]) -> dict[str, NetworkOutput]:
    """What each network makes of all pictures of a folder, which are read once, some at a time.

    Features and logits are kept, float32 (KID and FID∞ draw subsets of all): 50,000 pictures take
    0.6 GB for each Inception.
    """
    files, start = list_pictures(folder)[0], 0
    kept: dict[str, dict[str, np.ndarray]] = {name: {} for name in seen_by}
    for part in read_pictures(files):
        for name, network in seen_by.items():
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
    """The pictures of a folder and those within, by name; and what else lies there: no pictures,
    and sheets of several that we drew. Names that begin with a dot are ignored.

    Raises:
      UserError: no folder, none of them is a picture, or one that is called a picture is none.
    """

    def refuse(error: OSError) -> NoReturn:
        absent = isinstance(error, FileNotFoundError)
        reason = "no such folder" if absent else error.strerror
        raise UserError(f"{shown(error.filename)}: {reason}; expected a folder of pictures")

    found = [Path(at) / name for at, _, names in os.walk(folder, onerror=refuse) for name in names]
    pictures, others = [], []
    for file in sorted(file for file in found if not file.name.startswith(".")):
        why = photo_files.refusal(file)
        if why is None and not images.is_sheet(file):
            pictures.append(file)
        elif why is None or not (mimetypes.guess_type(file.name)[0] or "").startswith("image/"):
            others.append(file)
        else:
            raise UserError(f"{shown(file)}: not a readable picture ({why})")
    if not pictures:
        raise UserError(f"{shown(folder)}: no pictures in this folder")
    return pictures, others


def read_pictures(files: Sequence[Path]) -> Iterator[Float[np.ndarray, "_ h w 3"]]:
    """Pictures in [−1, 1], some at a time.

    Raises:
      UserError: one that cannot be read, or pictures of several sizes.
    """
    first, start = photo_files.load_photo(files[0]), 0
    at_once = max(1, AT_ONCE // (first.width * first.height))
    while start < len(files):
        part = []
        for file in files[start : start + at_once]:
            picture = photo_files.load_photo(file)
            if picture.size != first.size:
                raise UserError(
                    f"{file}: {picture.size[0]}x{picture.size[1]} pixels, but {files[0].name} has "
                    f"{first.size[0]}x{first.size[1]}; all must have the same size"
                )
            part.append(np.asarray(picture, np.float32) / 127.5 - 1.0)
        yield np.stack(part)
        start += at_once


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "--pictures", type=settings.path, required=True, help="folder of the pictures to score"
    )
    flags.add_argument(
        "--against", type=settings.path, required=True, help="folder of photos, or their statistics"
    )
    flags.add_argument("--save", type=settings.path, help="file for the photos' statistics, .npz")
    flags.add_argument("--pipeline", help="a base with a reader: tiny, or a folder")
    networks.add_flags(flags)
    flags.add_argument(
        "--data_dir",
        type=settings.path,
        default="data",
        help="weights are fetched to weights/ there",
    )
    flags.add_argument(
        "--splits",
        type=number(settings.COUNT),
        help="of the Inception Score; 10, or as many as there are pictures",
    )
    flags.add_argument(
        "--fid", action="store_true", help="with FID, though of fewer pictures than features"
    )
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
