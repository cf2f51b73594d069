"""Scoring folders of pictures: figures equal those of the features; errors are one line."""

import hashlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models
from flax import traverse_util
from PIL import Image
from safetensors.numpy import save_file

from persona_jax import score
from persona_jax.data import images
from persona_jax.evaluation import networks, reference_statistics, trait_classifier
from persona_jax.interop.tensors import torch_name, torch_shape
from persona_jax.metrics import distributions
from persona_jax.models import trait_network as model
from persona_jax.models.inception import SIDE, InceptionV3
from persona_jax.runtime.command_line import run_with_arguments


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a random trait classifier, and two folders of pictures."""
    folder = tmp_path_factory.mktemp("score")
    torch_models.write_pipeline(folder / "base/pipeline")
    params = model.initialise(model.TraitNetwork(trait_classifier.HEADS), jax.random.key(0), 16)
    trait_classifier.save_trait_classifier(
        trait_classifier.TraitClassifier(params, np.ones(27, np.float32), 16),
        folder / "base/reader",
    )
    for name, count, low in (("painted", 24, 0), ("real", 30, 90)):
        (folder / name / "within").mkdir(parents=True)
        random = np.random.default_rng(count)
        for i in range(count):
            place = folder / name / ("within" if i % 2 else ".") / f"{i:02d}.png"
            Image.fromarray(random.integers(low, 256, (16, 16, 3)).astype(np.uint8)).save(place)
    return folder


def run_score(world, *flags: str) -> None:
    argv = ["score", "--pictures", str(world / "painted"), "--against", str(world / "real")]
    run_with_arguments(score.parser(), score.main, [*argv, *flags])


def row_of(printed: str) -> dict[str, float]:
    titles, _, values = (line.strip("|").split("|") for line in printed.strip().splitlines()[-3:])
    return {t.strip(): float(v) for t, v in zip(titles[1:], values[1:], strict=True)}


def test_figures_are_those_of_the_features(world, tmp_path, capsys):
    flags = ["--pipeline", str(world / "base/pipeline"), "--fid", "--splits", "3"]
    run_score(world, *flags, "--save", str(tmp_path / "real.npz"))
    row = row_of(capsys.readouterr().out)
    network = networks.from_trait_classifier(
        trait_classifier.load_trait_classifier(world / "base/reader")
    )
    one, other = (
        score.run_networks(world / name, {"": network})[""] for name in ("painted", "real")
    )
    assert one.features.shape == (24, 256)
    moments = [distributions.moments(output.features) for output in (one, other)]
    kid, _ = distributions.kernel_distance(one.features, other.features, seed=0)
    # The table prints four digits.
    wanted = {
        "KID × 1000 (the reader) ↓": 1000 * kid,
        "IS, 3 splits (the reader) ↑": distributions.inception_score(one.classes, 0, 3)[0],
        "IS, 3 splits, uniform p(y) (the reader) ↑": distributions.inception_score(
            one.classes, 0, 3, uniform=True
        )[0],
        "FID (the reader, too few pictures) ↓": distributions.frechet_distance(*moments),
        "FID∞ (the reader, too few pictures) ↓": distributions.frechet_distance_infinity(
            one.features, moments[1], 0
        ),
    }
    assert row == pytest.approx(wanted, rel=1e-3)

    # Saved statistics give the same figures.
    run_score(world, *flags, "--against", str(tmp_path / "real.npz"))
    assert row_of(capsys.readouterr().out) == pytest.approx(row, rel=1e-3)


def test_a_file_of_pytorch_fid_is_the_legacy_networks(tmp_path):
    random = np.random.default_rng(0).normal(size=(40, 8))
    np.savez(tmp_path / "fid.npz", mu=random.mean(axis=0), sigma=np.cov(random.T))
    (name, stored), *rest = reference_statistics.load(tmp_path / "fid.npz").items()
    assert (name, rest, stored.features, stored.count) == ("Inception, legacy", [], None, None)
    own = distributions.moments(random + 1)
    assert distributions.frechet_distance(own, stored) == pytest.approx(8.0)


@pytest.mark.slow
def test_both_inceptions_are_named(world, tmp_path, capsys):
    blank = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    tree = jax.eval_shape(InceptionV3().init, jax.random.key(0), blank)["params"]
    random = np.random.default_rng(0)
    state = {"fc.bias": np.zeros(1008, np.float32)}
    for path, leaf in traverse_util.flatten_dict(tree).items():
        shape = torch_shape(path, leaf.shape)
        state[torch_name(path)] = np.abs(random.normal(0, 0.05, shape)).astype(np.float32)
    save_file(state, tmp_path / "inception.safetensors")
    digest = hashlib.sha256((tmp_path / "inception.safetensors").read_bytes()).hexdigest()
    weights = ["--inception", str(tmp_path / "inception.safetensors")]
    run_score(world, *weights, "--inception_sha256", digest, "--fid")
    row = row_of(capsys.readouterr().out)
    assert len(row) == 10
    assert row["FID (Inception, clean, too few pictures) ↓"] > 0
    assert row["FID (Inception, legacy, too few pictures) ↓"] > 0


def test_other_files_of_sample_are_ignored(world, tmp_path, capsys):
    """As in README: the folder also holds a grid of another size and a JSON file."""
    out = tmp_path / "out"
    shutil.copytree(world / "painted", out)
    images.save_sheet(Image.new("RGB", (99, 40)), out / "grid.png")
    (out / "sample.json").write_text("{}")
    (out / ".hidden.png").write_bytes(b"")
    for file in sorted(out.rglob("*.png"))[6:]:
        if file.name != "grid.png":
            file.unlink()
    flags = ["--pipeline", str(world / "base/pipeline"), "--pictures", str(out)]
    run_score(world, *flags)
    printed = capsys.readouterr().out
    assert f"{out}: ignored, because they are not single images: grid.png, sample.json" in printed
    assert any("splits (the reader)" in title for title in row_of(printed))


def test_pictures_are_known_by_content_and_read_some_at_a_time(tmp_path, monkeypatch):
    levels = np.arange(5 * 8 * 8 * 3, dtype=np.uint8).reshape(5, 8, 8, 3)
    for i, name in enumerate(("a.jfif", "b", "c.txt", "d.PNG", "e.png")):
        Image.fromarray(levels[i]).save(tmp_path / name, "PNG")
    monkeypatch.setattr(score, "AT_ONCE", 2 * 8 * 8)
    pictures, others = score.list_pictures(tmp_path)
    assert others == []
    parts = list(score.read_pictures(pictures))
    assert [len(part) for part in parts] == [2, 2, 1]
    np.testing.assert_array_equal(images.to_uint8(np.concatenate(parts)), levels)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pictures", "{tmp}/empty"], "no pictures in this folder"),
        (["--pictures", "{tmp}/nowhere"], "nowhere: no such folder"),
        (["--pictures", "{tmp}/broken/a.png"], "a.png: Not a directory"),
        (["--save", "{tmp}/broken/a.png/x.npz"], "--save .*File exists"),
        (["--pictures", "{tmp}/mixed"], r"b.png: 8x16 pixels, but a.png has 16x16"),
        (["--pictures", "{tmp}/broken"], "a.png: not a readable picture"),
        (["--splits", "25"], "24 pictures in 25 splits"),
        (["--against", "{tmp}/broken.npz"], "statistics cannot be read"),
        (["--against", "{tmp}/fid.npz"], "statistics by none of the reader"),
        (["--against", "{tmp}/other.npz"], "256 features, but .* of 8"),
        (["--pipeline", ""], "name a network"),
        (["--pipeline", "tinny"], "tinny"),
        (["--inception", "{tmp}/a.pth"], "a.pth: sha256 .* none of the known files"),
    ],
)
def test_bad_input(world, tmp_path, capsys, flags, words):
    for name in ("empty", "mixed", "broken"):
        (tmp_path / name).mkdir()
    for name, size in (("a", (16, 16)), ("b", (8, 16))):
        Image.new("RGB", size).save(tmp_path / "mixed" / f"{name}.png")
    for file in (tmp_path / "broken/a.png", tmp_path / "broken.npz", tmp_path / "a.pth"):
        file.write_bytes(b"PK no such thing")
    flat = {"mu": np.zeros(8), "sigma": np.eye(8)}
    np.savez(tmp_path / "fid.npz", **flat)
    np.savez(tmp_path / "other.npz", **{f"the reader/{name}": x for name, x in flat.items()})
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        run_score(world, "--pipeline", str(world / "base/pipeline"), *flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert re.search(words, error), error
