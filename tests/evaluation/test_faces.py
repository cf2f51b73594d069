"""Evaluation by faces: which pictures are compared; real photos if they are available."""

import argparse
import dataclasses
import tarfile

import numpy as np
import pytest
import torch_models
from world import SHARED, config_of, use_people, write_people

from persona_jax.data.dataset import open_dataset
from persona_jax.errors import UserError
from persona_jax.evaluation import builder, evaluators, faces, networks
from persona_jax.interop import face_weights

NO_FLAGS = argparse.Namespace(inception=None)


def config_for(folder, tmp_path, people: int):
    config = config_of("sa", "lfw")
    use_people(config, folder, tmp_path / "data")
    config.data.test_people, config.references.n = people, 4
    return config


@pytest.fixture
def drawn(tmp_path):
    """An evaluator that encodes colours and gives all texts one embedding, and three people."""
    config = config_for(write_people(tmp_path / "people"), tmp_path, people=3)
    photos, groups = open_dataset(config.data)

    def colours(pictures: np.ndarray) -> np.ndarray:
        flat = pictures.reshape(len(pictures), -1)
        flat = flat - flat.mean(axis=0) / len(flat)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    evaluator = faces.FaceEvaluator(
        photos,
        crop=1.0,
        face=colours,
        words=lambda pictures: np.ones((len(pictures), 1)),
        texts=lambda captions: np.full((len(captions), 1), 0.5),
        find=lambda picture: picture.getpixel((0, 0)) != (0, 0, 0),
        networks={"colours": networks.from_face_encoder(colours)},
    )
    return evaluator, photos, evaluators.choose_subjects(evaluator, photos, groups.test, 3, config)


def test_pictures_are_held_against_the_references(drawn):
    evaluator, photos, subjects = drawn
    own = evaluators.photos_as_pictures(photos, subjects.held_out, 32)
    own[0] = -1.0  # black: no face
    result = evaluator.pictures(subjects, np.concatenate([own, own]))
    face, there, text = result.scores.values()
    assert face.shape == there.shape == text.shape == (3,)
    np.testing.assert_array_equal(there, [0, 1, 1])
    np.testing.assert_array_equal(text, 0.5)
    assert result.outputs["colours"].classes is None
    assert result.diversity is None
    assert evaluator.loss(result) == pytest.approx(2 - face.mean() - 0.5)


def test_diversity_is_how_far_pictures_of_one_person_are_apart(drawn):
    evaluator, photos, subjects = drawn
    subjects = dataclasses.replace(subjects, again=2)
    own = evaluators.photos_as_pictures(photos, subjects.held_out, 32)
    assert [who for who, _ in subjects.pictures] == [0, 1, 2, 0, 1, 2, 0, 1]
    same = evaluator.pictures(subjects, np.concatenate([own, own, own[:2]]))
    other = evaluator.pictures(subjects, np.concatenate([own, own, own[1:]]))
    features = evaluator.networks["colours"](own).features
    away = np.linalg.norm(features[:2] - features[1:], axis=1).mean()
    assert same.diversity < 0.2 * away
    assert other.diversity == pytest.approx(away, rel=0.2)


def test_a_photo_is_not_held_against_itself(drawn):
    evaluator, photos, subjects = drawn
    first = subjects.references[:, 0]
    pictures = evaluators.photos_as_pictures(photos, first, 32)
    result = evaluator.photos(subjects, first, pictures)
    unseen = dataclasses.replace(subjects, references=subjects.references[:, 1:])
    want = evaluator.photos(unseen, subjects.held_out, pictures)
    title = next(iter(result.scores))
    np.testing.assert_allclose(result.scores[title], want.scores[title], atol=1e-6)


def test_a_network_used_for_conditioning_cannot_be_the_evaluator(tmp_path):
    config = config_for(write_people(tmp_path / "people"), tmp_path, people=3)
    torch_models.write_pipeline(tmp_path / "pipeline")
    config.pipeline, config.image_encoder.kind = str(tmp_path / "pipeline"), "dlib"
    with pytest.raises(UserError, match="cannot also be the evaluator"):
        builder.build_evaluator(config, open_dataset(config.data)[0], 3, NO_FLAGS)


def test_real_people_are_nearer_to_themselves(tmp_path, monkeypatch):
    pytest.importorskip("dlib", reason="needs dlib-bin, of the extra 'faces'")
    archive = SHARED / "lfw/lfw-deepfunneled.tgz"
    if face_weights.installed_face_weights() is None or not archive.exists():
        pytest.skip("needs face_recognition_models and ../shared/lfw")
    taken: dict[str, dict[str, bytes]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile():
                _, person, file = member.name.split("/")
                taken.setdefault(person, {})[file] = tar.extractfile(member).read()
            if sum(len(files) >= 4 for files in taken.values()) > 8:
                break
    for person, files in taken.items():
        if len(files) >= 4:
            (tmp_path / "people" / person).mkdir(parents=True)
            for file, data in files.items():
                (tmp_path / "people" / person / file).write_bytes(data)
    config = config_for(tmp_path / "people", tmp_path, people=6)
    config.data.crop = 0.6
    torch_models.write_pipeline(tmp_path / "pipeline")
    config.pipeline = str(tmp_path / "pipeline")
    photos, groups = open_dataset(config.data)
    monkeypatch.setattr(builder, "MANY", 64)
    monkeypatch.setattr(
        builder, "embed_captions", lambda folder, captions: np.ones((len(captions), 12))
    )
    evaluator = builder.build_evaluator(config, photos, 6, NO_FLAGS)
    subjects = evaluators.choose_subjects(evaluator, photos, groups.test, 6, config)
    pictures = evaluators.photos_as_pictures(photos, subjects.held_out, 64, 0.6)
    own, there, _ = evaluator.photos(subjects, subjects.held_out, pictures).scores.values()
    swapped = dataclasses.replace(subjects, references=np.roll(subjects.references, 1, axis=0))
    other = next(iter(evaluator.photos(swapped, subjects.held_out, pictures).scores.values()))
    assert own.mean() > 0.4 > 0.2 > other.mean()
    assert there.mean() > 0.8
