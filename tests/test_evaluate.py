"""Evaluation of real people, whose traits are not known as numbers."""

import json

import numpy as np
import torch_models
from world import adapter_config, write_adapter, write_people

from persona_jax import evaluate
from persona_jax.evaluation import faces, networks
from persona_jax.runtime.command_line import run_with_arguments


def test_real_people_are_evaluated_by_their_faces(tmp_path, monkeypatch, capsys):
    """Uses an evaluator that encodes colours in place of dlib's."""

    def colours(pictures: np.ndarray) -> np.ndarray:
        flat = pictures.reshape(len(pictures), -1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    def evaluator(config, photos, people, arguments):
        return faces.FaceEvaluator(
            photos,
            crop=config.data.crop,
            face=colours,
            words=lambda pictures: np.ones((len(pictures), 1)),
            texts=lambda captions: np.full((len(captions), 1), 0.5),
            find=lambda picture: True,
            networks={"colours": networks.from_face_encoder(colours)},
        )

    workdir = tmp_path / "sa"
    torch_models.write_pipeline(tmp_path / "base")
    write_people(tmp_path / "people", people=4)
    config = adapter_config("sa", tmp_path / "people", tmp_path / "data", tmp_path / "base")
    config.aggregator.pooling_heads, config.data.test_people = 3, 2
    write_adapter(config, workdir)
    monkeypatch.setattr(evaluate.builder, "build_evaluator", evaluator)
    argv = ["evaluate", "--workdir", str(workdir), "--references", "3", "1"]
    run_with_arguments(evaluate.parser(), evaluate.main, argv)
    report = json.loads((workdir / "evaluation/report.json").read_text())
    assert list(report["rows"]) == ["from 1", "from 3", "from another person's", "real photos"]
    real = report["rows"]["real photos"]
    assert 0 < real["face cosine to the references ↑"]["value"] <= 1
    assert real["text cosine ↑"]["value"] == 0.5
    assert "details" not in report
    assert "| from 3 |" in capsys.readouterr().out
