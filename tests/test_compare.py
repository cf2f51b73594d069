"""The comparison as a user runs it, at the smallest size: random towers and trait classifier."""

import json

import jax
import numpy as np
import pytest
import torch_models
from PIL import Image
from world import config_of, shrink_adapter

from persona_jax import compare
from persona_jax.evaluation import evaluators, trait_classifier
from persona_jax.models import trait_network as model
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.run_folder import write_run_files


@pytest.fixture(scope="module")
def small_configs(tmp_path_factory):
    """A folder of configs that train a few steps on a random base of 16 pixels."""
    folder = tmp_path_factory.mktemp("world")
    torch_models.write_pipeline(folder / "base/pipeline")
    params = model.initialise(model.TraitNetwork(trait_classifier.HEADS), jax.random.key(0), 16)
    classifier = trait_classifier.TraitClassifier(params, np.ones(27, np.float32), 16)
    trait_classifier.save_trait_classifier(classifier, folder / "base/reader")
    for name in ("ip", "sa", "dreambooth"):
        config = config_of(name, "tiny")
        config.data.data_dir = str(folder / "data")
        config.data.portraits.update({"photos": 4, "size": 16})
        with config.data.portraits.unlocked():
            config.data.portraits.people = {"train": 6, "validation": 4, "test": 4}
        if name == "dreambooth":
            config.update({"pipeline": str(folder / "base/pipeline"), "batch_size": 8})
            config.references.n, config.optimizer.steps, config.sampling.steps = 4, 1, 2
            config.prior.update({"pictures": 2, "steps": 1})
        else:
            shrink_adapter(config, folder / "base/pipeline")
        write_run_files(folder / name, config)
        (folder / f"{name}.py").write_text(
            "from persona_jax.runtime.run_folder import read_config\n"
            "def get_config(preset):\n"
            f"    return read_config({str(folder / name)!r})\n"
        )
    return folder


def run_compare(*flags: str) -> None:
    run_with_arguments(compare.parser(), compare.main, ["compare", *flags])


@pytest.mark.parametrize(
    "methods",
    [["ip", "sa"], pytest.param(["ip", "sa", "dreambooth"], marks=pytest.mark.slow)],
)
def test_a_comparison_from_training_to_table(methods, small_configs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "CHOOSERS", {"adapter": 4, "personal": 2})
    monkeypatch.setattr(compare, "GUIDANCE", (2.0, 3.0))
    monkeypatch.setattr(compare, "SCALES", (0.5,))
    monkeypatch.setattr(compare, "DOUBLINGS", 0)
    monkeypatch.setattr(evaluators, "AGAIN", 3)
    monkeypatch.setattr(compare, "SHOWN", 2)
    flags = ["--out", str(tmp_path), "--configs", str(small_configs)]
    flags += ["--methods", *methods]
    run_compare(*flags)
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text())
    anybody = [f"{name}, anybody by the same weights" for name in methods if name == "dreambooth"]
    assert list(table) == [
        *methods,
        *anybody,
        "sa, another person's photos",
        "ip, all photos side by side",
        "text alone",
        "real photos",
        "real photos through the VAE",
    ]
    assert table["sa"]["its difference to sa"] is None
    for row in table.values():
        error = row["error of the traits ↓"]
        assert f"{error['value']:.3f} ({error['low']:.3f} to {error['high']:.3f})" in printed
        assert row["IS, 4 splits (the reader) ↑"] == pytest.approx(1.0)  # one picture per split
    assert table["sa"]["diversity"] > 0
    # Four photos per person: three references; two pictures of each method.
    assert Image.open(tmp_path / "grid.png").size[0] == (4 + 2 * len(methods)) * 18 + 2
    assert "<table>" in (tmp_path / "report.html").read_text()

    # Run again, it trains and samples nothing, and the table is the same.
    run_compare(*flags)
    again = capsys.readouterr().out
    assert "generating" in printed
    assert "generating" not in again
    assert "training /" not in again
    assert json.loads((tmp_path / "table.json").read_text()) == table
    with pytest.raises(SystemExit):
        run_compare(*flags, "--steps", "9")
    assert "holds a comparison with other settings" in capsys.readouterr().err
    # Nor are pictures of configs that have been edited since taken for theirs.
    settings = small_configs / "ip/config.json"
    before = settings.read_text()
    settings.write_text(json.dumps(json.loads(before) | {"batch_size": 4, "log_every": 7}))
    with pytest.raises(SystemExit):
        run_compare(*flags)
    settings.write_text(before)
    error = capsys.readouterr().err
    assert "other settings (ip: batch_size: 8, now 4); choose another folder" in error
    settings = small_configs / "base/pipeline/unet/config.json"
    before = settings.read_text()
    settings.write_text(before + "\n")  # another base, in the place of the first
    try:
        with pytest.raises(SystemExit):
            run_compare(*flags)
    finally:
        settings.write_text(before)
    assert "now has hash" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("best", "chosen"), [(1.0, 1.0), (2.0, 2.0), (0.25, 0.25), (64.0, 8.0), (0.01, 0.125)]
)
def test_choices_descend_by_at_most_three_doublings(best, chosen):
    start = {"rate": 1.0, "steps": 9}

    def loss(choice):
        return abs(np.log(choice["rate"] / best))

    assert compare._walk(start, "rate", (2.0, 0.5), loss) == {"rate": chosen, "steps": 9}
    fewer = compare._walk(start, "steps", (0.5,), lambda choice: choice["steps"])
    assert fewer == {"rate": 1.0, "steps": 1}


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--methods", "ip"], "with sa"),
        (["--methods", "sa", "gan"], "gan"),
        (["--people", "5", "--methods", "sa"], "5 people: a multiple of 5, 2 to 4"),
        (["--seeds", "0"], "--seeds: '0'"),
        (["--methods", "sa", "--people", "3200"], "2 to 4"),
        (["--methods", "sa", "max"], "no such file"),
    ],
)
def test_wrong_flags_of_compare(small_configs, tmp_path, capsys, flags, word):
    with pytest.raises(SystemExit) as stop:
        run_compare("--out", str(tmp_path), "--configs", str(small_configs), *flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert word in error
