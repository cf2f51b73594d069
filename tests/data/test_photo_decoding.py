"""Photos of all formats decode to the right pixels, or a one-line error says why not."""

import io
import logging
import os
import struct
import sys

import numpy as np
import pytest
from files import chunk, encoded, exif_with_broken_rational, png, tiff
from PIL import Image, ImageCms

from persona_jax.data import colour, photo_decoding
from persona_jax.data.photo_decoding import Unreadable, decode, decode_mask, load_mask, load_photo
from persona_jax.errors import UserError

GREY16 = np.linspace(0, 65535, 4096).round().astype(np.uint16).reshape(64, 64)
LEVELS = np.rint(GREY16 / 65535 * 255).astype(np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
HALF = np.zeros((16, 16), np.uint8)
HALF[:, 8:] = 255


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng((width, height))
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def pixels(data: bytes) -> np.ndarray:
    image = decode(io.BytesIO(data))
    assert image.mode == "RGB"
    return np.asarray(image)


def mask(data: bytes) -> np.ndarray:
    image = decode_mask(io.BytesIO(data))
    assert image.mode == "L"
    return np.asarray(image)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, axis=-1)


SIXTEEN_BITS = {
    "png": png(GREY16, 0),
    "tiff": tiff(GREY16),
    "tiff big endian": tiff(GREY16, ">"),
    "tiff white is zero": tiff(65535 - GREY16, photometric=0),
    "tiff 32 bits": tiff(GREY16.astype(np.uint32) * 65537),
    "tiff floats": tiff((GREY16 / 65535).astype(np.float32)),
    "tiff floats big endian": tiff((GREY16 / 65535).astype(np.float32), ">"),
    "pgm": b"P5 64 64 65535\n" + GREY16.astype(">u2").tobytes(),
    "jpeg 2000": encoded(Image.fromarray(GREY16), "JPEG2000", irreversible=False),
}


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_grey_of_more_than_8_bits_is_scaled(name):
    np.testing.assert_array_equal(pixels(SIXTEEN_BITS[name]), grey(LEVELS))
    np.testing.assert_array_equal(mask(SIXTEEN_BITS[name]), LEVELS)


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_colours_of_16_bits_keep_the_upper_8(colour_type, channels):
    values = np.repeat(GREY16[..., None], channels, axis=-1)
    if channels in (2, 4):
        values[..., -1] = 65535
    assert abs(pixels(png(values, colour_type)).astype(int) - grey(LEVELS)).max() <= 1


def test_values_of_unknown_range_are_refused():
    for values in (GREY16.astype(np.int32), (GREY16 / 257).astype(np.float32)):
        with pytest.raises(Unreadable, match="convert it to 8 or 16 bits"):
            pixels(tiff(values))
    nan = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(Unreadable, match="floats"):
        pixels(tiff(nan))


def test_a_clear_value_of_16_bits():
    data = png(GREY16, 0, chunk(b"tRNS", struct.pack(">H", int(GREY16[0, 5]))))
    expected = grey(LEVELS)
    expected[GREY16[0, 5] == GREY16] = 255
    np.testing.assert_array_equal(pixels(data), expected)


def transparent() -> dict[str, bytes]:
    """Returns noise on the left, and transparent noise on the right."""
    hidden = np.concatenate([noise(16, 16), 255 - HALF[..., None]], axis=-1)
    palette = Image.fromarray(noise(16, 16)).quantize(8)
    indices = np.asarray(palette).copy()
    indices[:, 8:] = 7
    clear = Image.fromarray(indices, "P")
    clear.putpalette(palette.getpalette())
    rgb = noise(16, 16)
    rgb[:, 8:] = (1, 2, 3)
    return {
        "png": encoded(Image.fromarray(hidden), "PNG"),
        "webp": encoded(Image.fromarray(hidden), "WEBP", lossless=True, exact=True),
        "tiff": encoded(Image.fromarray(hidden), "TIFF"),
        "grey": encoded(Image.fromarray(hidden[..., 2:]), "PNG"),
        "palette": encoded(clear, "PNG", transparency=7),
        "gif": encoded(clear, "GIF", transparency=7),
        "one colour": encoded(Image.fromarray(rgb), "PNG", transparency=(1, 2, 3)),
    }


@pytest.mark.parametrize("name", transparent())
def test_what_is_hidden_under_transparency_stays_hidden(name):
    assert (pixels(transparent()[name])[:, 8:] == 255).all()


def test_half_transparent_is_laid_on_white():
    rgba = np.dstack([noise(32, 32), np.full((32, 32), 64, np.uint8)])
    expected = rgba[..., :3] * (64 / 255) + 255 * (1 - 64 / 255)
    assert abs(pixels(encoded(Image.fromarray(rgba), "PNG")) - expected).max() <= 1
    opaque = np.dstack([noise(32, 32), np.full((32, 32), 255, np.uint8)])
    np.testing.assert_array_equal(pixels(png(opaque, 6)), noise(32, 32))


def srgb_of(levels: np.ndarray, primaries, gamma: float) -> np.ndarray:
    """Returns the closed form: linear light, change of basis, sRGB's curve; white is D65."""

    def basis(points):
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in points]).T
        white = np.array([0.3127 / 0.329, 1, (1 - 0.3127 - 0.329) / 0.329])
        return columns * np.linalg.solve(columns, white)

    to_srgb = np.linalg.solve(basis(((0.64, 0.33), (0.3, 0.6), (0.15, 0.06))), basis(primaries))
    linear = np.clip((levels / 255) ** gamma @ to_srgb.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("primaries", "gamma"), [(colour.ADOBE_RGB, 563 / 256), (P3, 2.2)], ids=["adobe", "p3"]
)
def test_colour_profiles_are_converted(kind, primaries, gamma):
    profile = colour.matrix_profile(primaries, gamma=gamma)
    levels = noise(32, 32)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(levels), kind, icc_profile=profile, **lossless)
    converted = pixels(data).astype(int)
    assert abs(converted - srgb_of(levels, primaries, gamma)).max() <= 1.01
    stock = ImageCms.profileToProfile(
        Image.fromarray(levels), io.BytesIO(profile), ImageCms.createProfile("sRGB")
    )
    np.testing.assert_array_equal(converted, np.asarray(stock))
    assert abs(converted - levels).max() > 30


def test_a_converted_photo_is_saved_as_what_it_is():
    profile = colour.matrix_profile(P3)
    photo = decode(io.BytesIO(encoded(Image.fromarray(noise(8, 8)), "PNG", icc_profile=profile)))
    np.testing.assert_array_equal(pixels(encoded(photo, "PNG")), np.asarray(photo))


def test_profiles_that_change_nothing():
    levels = noise(16, 16)
    for extra in ({"icc_profile": SRGB}, {}):
        np.testing.assert_array_equal(
            pixels(encoded(Image.fromarray(levels), "PNG", **extra)), levels
        )
    # A grey picture with an RGB profile.
    grey_levels = levels[..., 0]
    data = encoded(Image.fromarray(grey_levels), "PNG", icc_profile=SRGB)
    np.testing.assert_array_equal(pixels(data), grey(grey_levels))


def test_transparency_and_profile_together():
    profile = colour.matrix_profile(P3)
    rgba = np.dstack([noise(16, 16), 255 - HALF])
    decoded = pixels(encoded(Image.fromarray(rgba), "PNG", icc_profile=profile))
    whole = pixels(encoded(Image.fromarray(noise(16, 16)), "PNG", icc_profile=profile))
    np.testing.assert_array_equal(decoded[:, :8], whole[:, :8])
    assert (decoded[:, 8:] == 255).all()


@pytest.mark.parametrize("profile", [b"no profile", SRGB[:200]])
def test_a_damaged_profile_is_said(profile, caplog):
    levels = noise(16, 16)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(
            pixels(encoded(Image.fromarray(levels), "PNG", icc_profile=profile)), levels
        )
    assert "taken as sRGB" in caplog.text


def test_adobe_rgb_of_cameras_and_primaries_of_png():
    levels, expected = noise(16, 16), srgb_of(noise(16, 16), colour.ADOBE_RGB, 563 / 256)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    converted = pixels(encoded(Image.fromarray(levels), "PNG", exif=exif.tobytes()))
    assert abs(converted - expected).max() <= 1.01
    points = (0.3127, 0.329, *np.ravel(colour.ADOBE_RGB))
    chunks = chunk(b"gAMA", struct.pack(">I", 45455))
    chunks += chunk(b"cHRM", struct.pack(">8I", *(round(x * 100000) for x in points)))
    assert abs(pixels(png(levels, 2, chunks)) - expected).max() <= 1.5
    same = chunk(b"sRGB", b"\0") + chunks
    np.testing.assert_array_equal(pixels(png(levels, 2, same)), levels)


def test_cmyk_and_lab():
    cmyk = Image.fromarray(noise(16, 16)).convert("CMYK")
    np.testing.assert_array_equal(pixels(encoded(cmyk, "TIFF")), noise(16, 16))
    lab = Image.new("LAB", (8, 8), (128, 128, 128))
    # L* = 50.2 is sRGB grey 119.4.
    assert abs(pixels(encoded(lab, "TIFF")).astype(int) - 119.4).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF"])
def test_photos_are_turned_upright(kind, orientation):
    if kind == "HEIF":  # HEIF has its own rotation, which the decoder applies
        pytest.importorskip("pillow_heif").register_heif_opener()
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:16, :16] = (255, 0, 0)
    upright[32:, 16:] = (0, 0, 255)
    back = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    stored = Image.fromarray(upright)
    stored = stored if back == 1 else stored.transpose(photo_decoding.TURNS[back])
    exif = Image.Exif()
    exif[0x112] = orientation
    decoded = pixels(encoded(stored, kind, exif=exif.tobytes())).astype(int)
    assert decoded.shape == upright.shape
    assert abs(decoded - upright).mean() < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_costs_neither_the_photo_nor_its_orientation(kind):
    stored = Image.fromarray(noise(32, 16))
    exif = exif_with_broken_rational(6)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    assert pixels(encoded(stored, kind, exif=exif, **lossless)).shape == (32, 16, 3)
    assert pixels(encoded(stored, kind, exif=b"Exif\0\0MM\0*nothing")).shape == (16, 32, 3)


@pytest.mark.parametrize("suffix", [".heic", ".jpg", ""])
def test_heic_is_read_whatever_it_is_called(tmp_path, suffix):
    pytest.importorskip("pillow_heif").register_heif_opener()
    smooth = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    profile = colour.matrix_profile(P3)
    file = tmp_path / f"photo{suffix}"
    smooth.save(file, "HEIF", quality=100, chroma=444, icc_profile=profile)
    srgb = ImageCms.profileToProfile(smooth, io.BytesIO(profile), ImageCms.createProfile("sRGB"))
    assert abs(np.asarray(load_photo(file), int) - np.asarray(srgb)).max() <= 8


def test_heic_without_its_decoder_says_what_to_install(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg", "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match="pip install pillow-heif"):
        load_photo(tmp_path / "a.jpg")


def test_masks_in_the_alpha_channel():
    for colours in (
        np.zeros((16, 16, 3), np.uint8),
        np.full((16, 16, 3), 255, np.uint8),
        noise(16, 16),
    ):
        np.testing.assert_array_equal(mask(png(np.dstack([colours, HALF]), 6)), HALF)
    np.testing.assert_array_equal(mask(png(np.dstack([255 - HALF * 0, HALF]), 4)), HALF)
    opaque = np.dstack([grey(HALF), np.full((16, 16), 255, np.uint8)])
    np.testing.assert_array_equal(mask(png(opaque, 6)), HALF)
    np.testing.assert_array_equal(mask(png(HALF, 0)), HALF)


def test_masks_that_say_nothing_or_two_things_are_refused(tmp_path):
    nothing = np.dstack([grey(HALF), np.zeros((16, 16), np.uint8)])
    both = np.dstack([grey(HALF), HALF.T])
    for data, words in ((nothing, "transparent all over"), (both, "both in black and white and")):
        (tmp_path / "m.png").write_bytes(png(data, 6))
        with pytest.raises(UserError, match=rf"m.png: .*{words}"):
            load_mask(tmp_path / "m.png")


def test_a_profile_does_not_change_a_mask():
    half = Image.fromarray(np.full((8, 8, 3), 128, np.uint8))
    assert (
        mask(encoded(half, "PNG", icc_profile=colour.matrix_profile(P3, gamma=1.0))) == 128
    ).all()


def test_200_megapixels_of_jpeg_are_read_smaller(tmp_path, monkeypatch):
    image = Image.fromarray(noise(4, 3)).resize((1600, 1200), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "a.png")
    whole = np.asarray(load_photo(tmp_path / "a.jpg").resize((80, 60), Image.Resampling.BOX), int)
    monkeypatch.setattr(photo_decoding, "MOST", 1_000_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800_000)  # Pillow refuses twice this number
    small = load_photo(tmp_path / "a.jpg")
    assert small.size == (800, 600)
    assert abs(np.asarray(small.resize((80, 60), Image.Resampling.BOX), int) - whole).max() <= 2
    with pytest.raises(UserError, match=r"a.png: .*megapixels.*make it smaller"):
        load_photo(tmp_path / "a.png")
    monkeypatch.setattr(photo_decoding, "MOST_JPEG", 1_500_000)
    with pytest.raises(UserError, match="2 megapixels; at most 1, of a JPEG 2, are read"):
        load_photo(tmp_path / "a.jpg")


def test_formats_that_run_other_programs_are_not_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match="none of the known formats"):
        load_photo(tmp_path / "a.png")


def test_load_photo(tmp_path):
    path = tmp_path / "a.jpg"
    image = Image.new("L", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 8
    image.save(path, exif=exif)
    assert load_photo(path).size == (4, 6)
    assert load_photo(str(path)).mode == "RGB"


def test_load_photo_names_the_bad_file(tmp_path):
    data = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(data, "JPEG")
    bad = {"empty.jpg": b"", "text.png": b"hello", "cut.jpg": data.getvalue()[:700]}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name in [*bad, "absent.jpg"]:
        with pytest.raises(UserError, match=name) as error:
            load_photo(tmp_path / name)
        assert not {"\n", "<"} & set(str(error.value))
    with pytest.raises(UserError, match=tmp_path.name):
        load_photo(tmp_path)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("link.jpg")
    (tmp_path / "nowhere.jpg").symlink_to("absent.jpg")
    for path in (
        tmp_path / "pipe.jpg",
        tmp_path / "link.jpg",
        tmp_path / "nowhere.jpg",
        "/dev/zero",
    ):
        with pytest.raises(UserError, match="not a readable picture") as error:
            load_photo(path)
        assert len(str(error.value)) < 500
    for name in ("a\0b", "n" * 300, "new\nline", b"\xff.jpg".decode("utf-8", "surrogateescape")):
        with pytest.raises(UserError) as error:
            load_photo(tmp_path / name)
        assert str(error.value).isprintable()
        assert len(str(error.value).encode()) < 500
