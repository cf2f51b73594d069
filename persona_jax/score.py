"""Scores a folder of pictures, whoever made them, against a folder of photos: FID, KID and IS.

python -m persona_jax.score --pictures out --against photos --inception
python -m persona_jax.score --pictures out --against photos --pipeline tiny

By Inception v3, with both ways of enlarging pictures, or by the reader of a base of drawn people.
--save FILE keeps the photos' statistics, and --against FILE uses them again; pytorch-fid's .npz
files will do, for FID (legacy). Which network scored what stands in every column.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

from persona_jax.data import images
from persona_jax.data.photos import SUFFIXES
from persona_jax.errors import UserError
from persona_jax.evaluation import networks, reference_statistics, report, trait_classifier
from persona_jax.evaluation.networks import Network, NetworkOutput
from persona_jax.interop import folders
from persona_jax.runtime import buckets, settings
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.settings import number

AT_ONCE = 512
"""Pictures held in memory."""


def main(arguments: argparse.Namespace) -> None:
    """Folders → looks → a table of one row."""
    against, row = buckets.local(arguments.against), {}
    known = reference_statistics.load(against) if against.suffix == ".npz" else {}
    seen_by = open_networks(arguments)
    pictures = buckets.local(arguments.pictures)
    outputs = {name: run_network(pictures, network) for name, network in seen_by.items()}
    real = {}
    for name, network in seen_by.items():
        if known and name not in known:
            print(f"{against}: no statistics by {name}; there are: {', '.join(known)}")
            continue
        real[name] = known.get(name) or reference_statistics.of(
            run_network(against, network).features
        )
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


def run_network(folder: Path, network: Network) -> NetworkOutput:
    """A network's look at all pictures of a folder."""
    parts = [network(part) for part in read_pictures(folder)]
    classes = None if parts[0].classes is None else np.concatenate([p.classes for p in parts])
    return NetworkOutput(np.concatenate([part.features for part in parts]), classes)


def read_pictures(folder: Path) -> Iterator[Float[np.ndarray, "_ h w 3"]]:
    """All pictures of a folder and those within, by name, in [−1, 1], some at a time.

    Raises:
      UserError: no folder, no pictures, one that cannot be read, or pictures of several sizes.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        what = "no pictures in this folder" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what} (looked for {', '.join(sorted(SUFFIXES))})")
    size = None
    for start in range(0, len(files), AT_ONCE):
        part = []
        for file in files[start : start + AT_ONCE]:
            picture = images.load_photo(file)
            size = size or picture.size
            if picture.size != size:
                raise UserError(
                    f"{file}: {picture.size[0]}x{picture.size[1]} pixels, but {files[0].name} has "
                    f"{size[0]}x{size[1]}; all must have the same size"
                )
            part.append(np.asarray(picture, np.float32) / 127.5 - 1.0)
        yield np.stack(part)


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
        "--splits", type=number(settings.COUNT), default=10, help="of the Inception Score"
    )
    flags.add_argument(
        "--fid", action="store_true", help="with FID, though of fewer pictures than features"
    )
    return flags


if __name__ == "__main__":
    run_with_arguments(parser(), main)
