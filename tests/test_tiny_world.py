"""The preset tiny at its smallest: drawn people, base, trait classifier, adapter, evaluation."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from world import config_of, shrink_adapter, shrink_base, use_people

from persona_jax import evaluate, pretrain, probe, train
from persona_jax.base import ship
from persona_jax.errors import UserError
from persona_jax.evaluation import trait_classifier
from persona_jax.interop.checkpoints import load_params
from persona_jax.methods import adapter_training
from persona_jax.pipelines import pipeline
from persona_jax.runtime.command_line import run_with_arguments


def assert_close(ours, theirs) -> None:
    """Asserts equality up to half precision."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), ours, theirs)


def few_people(config, data_dir, **people: int) -> None:
    config.data.data_dir = str(data_dir)
    config.data.portraits.update({"photos": 4, "size": 16})
    with config.data.portraits.unlocked():
        config.data.portraits.people = people


def adapter_config(data_dir, base):
    config = config_of("sa", "tiny")
    few_people(config, data_dir, train=6, validation=3, test=4)
    return shrink_adapter(config, base / "pipeline")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(data_dir, base, workdir of an adapter)."""
    root = tmp_path_factory.mktemp("tiny")
    config = config_of("base", "tiny")
    few_people(config, root / "data", base=8, unseen=64)
    shrink_base(config)
    config.clip.batch_size = 16
    config.unet.scored = 8
    config.reader.update({"batch_size": 8, "unseen": 8})
    config.reader.optimizer.steps = 2
    pretrain.main(config, root / "base")
    train.main(adapter_config(root / "data", root / "base"), root / "sa")
    return root / "data", root / "base", root / "sa"


def test_the_base_is_scored_by_its_trait_classifier(tiny):
    _, base, _ = tiny
    report = json.loads((base / "report.json").read_text())
    assert set(report) == {"vae", "clip", "reader", "prompts"}
    assert 0 <= report["clip"]["retrieval"] < 0.5
    assert report["prompts"]["pictures"] == 8
    assert 0 <= report["prompts"]["background"] <= 1
    assert Image.open(base / "prompts.png").size[0] > 8 * 16


def run_evaluate(workdir, *flags: str) -> None:
    argv = ["evaluate", "--workdir", str(workdir), "--steps", "2", *flags]
    run_with_arguments(evaluate.parser(), evaluate.main, argv)


def test_evaluation_reads_every_number_of_references(tiny, capsys):
    _, _, workdir = tiny
    run_evaluate(workdir, "--references", "1", "3")
    report = json.loads((workdir / "evaluation" / "report.json").read_text())
    rows = report["rows"]
    assert list(rows) == ["from 1", "from 3", "from another person's", "real photos"]
    for row in rows.values():
        assert 0 < row["error of the traits ↓"]["value"] < 5
        assert 0 <= row["named, of 4 ↑"]["value"] <= 1
    assert rows["from 3"]["its difference to from 3"] is None
    assert (
        rows["from 1"]["KID × 1000 (the reader) ↓"] != rows["from 3"]["KID × 1000 (the reader) ↓"]
    )
    assert set(report["details"]["1"]["by_hiding"]) <= {"0", "1"}
    assert "| real photos |" in capsys.readouterr().out
    # A plain picture, one for the held-out photo's caption, and a second plain one.
    assert len(list((workdir / "evaluation" / "from_3").glob("*.png"))) == 12
    assert "<table>" in (workdir / "evaluation" / "report.html").read_text()
    # Three references, the held-out photo, samples, and one for the held-out photo's caption.
    assert Image.open(workdir / "evaluation" / "grid.png").size[0] == 8 * 18 + 2


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--people", "5", "--references", "1"], "5 people"),
        (["--people", "4", "--references", "4"], "--references"),
        (["--people", "4", "--references", "0"], "--references"),
    ],
)
def test_wrong_flags_of_evaluate(tiny, capsys, flags, word):
    with pytest.raises(SystemExit) as stop:
        run_evaluate(tiny[2], *flags)
    assert stop.value.code == 2
    assert word in capsys.readouterr().err


def test_the_probe_distinguishes_aggregators_on_unseen_people(tiny, tmp_path, monkeypatch, capsys):
    data, base, _ = tiny
    monkeypatch.setattr(probe, "STEPS", 3)
    monkeypatch.setattr(probe, "SIZES", (1, 3))
    probe.main(adapter_config(data, base), tmp_path)
    report = json.loads((tmp_path / "probe.json").read_text())
    table = report["errors"]
    assert set(table) == {*probe.KINDS, probe.TRUTH}
    # After three steps, predictions are still close to the mean.
    errors = np.array([list(row.values()) for row in table.values()])
    assert errors.shape == (5, 2)
    assert ((errors > 0.2) & (errors < 0.5)).all()


def test_a_trait_is_read_off_the_photos_that_show_it():
    """Three photos of one person whose readings are their embeddings: a trait hidden on one, on
    two, on all."""
    params = {"kernel": np.eye(3), "bias": np.zeros(3)}
    embeddings = np.array([[[1.0, 1, 1]], [[2, 2, 2]], [[6, 6, 6]]])
    hidden = np.array([[0.0, 1, 1], [0, 1, 1], [1, 0, 1]])
    look = probe.photos_that_show(params, embeddings, hidden, [np.arange(3)])
    np.testing.assert_allclose(look(3), [[1.5, 6.0, 3.0]])
    np.testing.assert_allclose(look(2), [[1.5, 1.5, 1.5]])


def test_the_packed_base_is_the_trained_one(tiny, tmp_path):
    data, base, _ = tiny
    config = adapter_config(data, base)
    config.aggregator.kind = "first"
    train.main(config, tmp_path / "ip")
    argv = ["ship", "--base", str(base), "--adapter", str(tmp_path / "ip")]
    run_with_arguments(ship.parser(), ship.main, [*argv, "--out", str(tmp_path / "out")])

    whole, packed = (pipeline.load(str(place / "pipeline")) for place in (base, tmp_path / "out"))
    for tower in ("unet", "vae", "text_encoder", "image_encoder"):
        assert_close(getattr(packed, tower).params, getattr(whole, tower).params)
    both = [parts.tokenize(["a red hat"])[0] for parts in (whole, packed)]
    np.testing.assert_array_equal(*both)
    trait_classifier.load_trait_classifier(tmp_path / "out" / "reader")

    # A method for sets starts from the packed adapter.
    config = adapter_config(data, tmp_path / "out")
    config.init_from = str(tmp_path / "out" / "ip_adapter.safetensors")
    begun = adapter_training.init_adapter(config, packed, 16)
    learnt = load_params(tmp_path / "ip" / "checkpoints", "ema")
    for part in ("image_proj", "ip_adapter"):
        assert_close(begun[part], learnt[part])
    assert begun["aggregator"]


def test_people_without_known_traits_cannot_be_probed(tiny, tmp_path):
    data, base, _ = tiny
    config = adapter_config(data, base)
    (tmp_path / "people").mkdir()
    for person in "abcd":
        (tmp_path / "people" / person).mkdir()
        for number in range(4):
            picture = Image.new("RGB", (16, 16), (10 * number, 9, 99))
            picture.save(tmp_path / "people" / person / f"{number}.png")
    use_people(config, tmp_path / "people", tmp_path / "data")
    with pytest.raises(UserError, match="portraits"):
        probe.main(config, tmp_path)
