"""Encoding ahead of training, in parts."""

import re

import pytest
import torch_models
from world import ROOT, write_people

from persona_jax import encode, train
from persona_jax.data import encodings
from persona_jax.runtime.command_line import run_with_arguments, run_with_config


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("encode")
    torch_models.write_pipeline(root / "base")
    changes = {
        "pipeline": root / "base",
        "init_from": "",
        "data.dataset": "folder",
        "data.folder": write_people(root / "people"),
        "data.data_dir": root / "data",
        "data.test_people": 1,
        "data.validation_people": 1,
        "data.least_photos": 4,
        "batch_size": 8,
        "references.n": 3,
        "grid.people": 0,
        "optimizer.steps": 1,
    }
    changes = [f"--config.{key}={value}" for key, value in changes.items()]
    return ["--config", str(ROOT / "configs/avg.py"), *changes]


def run(flags: list[str], *more: str) -> None:
    run_with_arguments(encode.parser(), encode.main, ["encode", *flags, *more])


def test_parts_are_all_that_training_needs(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encodings, "SHARD", 5)  # 16 photos in four shards
    run(flags, "--part", "2/3")
    assert "part 2 of 3 is done, 1 of 4 shards are here" in capsys.readouterr().out
    run(flags, "--part", "1/3")
    run(flags, "--part", "3/3")
    assert "4 of 4 shards are here" in capsys.readouterr().out
    run_with_config(train.main, ["train", *flags, "--workdir", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert "1 steps done" in said.out
    assert "encode photos" not in said.err


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_wrong_parts(flags, part, capsys):
    with pytest.raises(SystemExit) as stop:
        run(flags, "--part", part)
    assert stop.value.code == 2
    assert re.search(rf"error: --part {part}: expected a number of all", capsys.readouterr().err)


def test_only_adapters_photos(flags, capsys):
    with pytest.raises(SystemExit):
        run(["--config", str(ROOT / "configs/lora.py")])
    assert "photos are encoded for adapters only" in capsys.readouterr().err
