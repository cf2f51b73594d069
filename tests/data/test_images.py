import numpy as np
import pytest
from PIL import Image

from persona_jax.data.images import (
    centre_crop,
    clip_preprocess,
    grid,
    to_model,
    to_uint8,
)
from persona_jax.errors import UserError

VIT_H = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng((width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("shape", [(250, 250), (150, 150), (224, 224), (300, 201), (77, 140)])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
        {"size": {"height": 50, "width": 70}, "crop_size": {"height": 81, "width": 64}},
        {"resample": 2, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"do_resize": False, "crop_size": {"height": 225, "width": 90}, "do_normalize": False},
        {"do_rescale": False},
    ],
)
def test_clip_preprocess_is_transformers(shape, change):
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    config = {**VIT_H, **change}
    image = noise(*shape)
    theirs = pil.CLIPImageProcessorPil(**config)(image, return_tensors="np")["pixel_values"][0]
    ours = clip_preprocess(image, config)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), rtol=1e-5, atol=2e-6)


def test_clip_preprocess_reads_old_style_numbers():
    old = {**VIT_H, "size": 224, "crop_size": 224}
    np.testing.assert_array_equal(
        clip_preprocess(noise(100, 90), old), clip_preprocess(noise(100, 90), VIT_H)
    )


def test_centre_crop():
    image = centre_crop(noise(250, 250), 0.6)
    assert image.size == (150, 150)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(noise(250, 250))[50:200, 50:200])
    assert centre_crop(noise(30, 50), 1.0).size == (30, 30)
    with pytest.raises(UserError, match="above 0 and at most 1"):
        centre_crop(noise(10, 10), 1.5)


def test_to_model_and_back():
    image = noise(64, 64)
    pixels = to_model(image, 64)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    np.testing.assert_array_equal(to_uint8(pixels), np.asarray(image))
    assert to_uint8(np.full((1, 2, 2, 3), 3.0, np.float32)).max() == 255
    assert to_model(noise(40, 64), 32).shape == (32, 32, 3)


def test_to_model_is_antialiased():
    """A one-pixel checkerboard becomes grey; without antialiasing it would give stripes."""
    board = Image.fromarray((np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)).convert(
        "RGB"
    )
    assert np.abs(to_model(board, 32)).max() < 0.05


def test_grid(tmp_path):
    red = Image.new("RGB", (10, 10), "red")
    blue = np.zeros((10, 10, 3), np.uint8)
    blue[..., 2] = 255
    sheet = grid([[red, None, blue], [blue]])
    assert sheet.size == (3 * 12 + 2, 2 * 12 + 2)
    assert sheet.getpixel((3, 3)) == (255, 0, 0)
    assert sheet.getpixel((15, 3)) == (255, 255, 255)
    assert sheet.getpixel((27, 3)) == (0, 0, 255)
    assert sheet.getpixel((3, 15)) == (0, 0, 255)
    titled = grid([[red]], size=40, titles=["target"])
    assert titled.size == (44, 44 + 14)
    assert np.asarray(titled)[:14].min() < 128
    titled.save(tmp_path / "grid.png")
