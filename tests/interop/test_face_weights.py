"""Reading the face network's weights: both layouts, strictly."""

import hashlib
import json
import math
import pathlib

import flax.traverse_util
import jax
import numpy as np
import PIL.Image
import pytest

from persona_jax.errors import UserError
from persona_jax.interop.face_weights import (
    face_crop,
    face_weights_hash,
    load_face_weights,
    read_tfjs_tensors,
)
from persona_jax.models.face_resnet import BLOCKS

SHARED = pathlib.Path(__file__).resolve().parents[2].parent / "shared"

CONVS = [("conv32_down", 7, 3, 32)]
for _name, _features, _ in BLOCKS:
    CONVS.append((f"{_name}/conv1", 3, CONVS[-1][-1], _features))
    CONVS.append((f"{_name}/conv2", 3, _features, _features))


def manifest_tensors(seed=0):
    """Returns random tensors by the manifest's names, listed without the network's code."""
    rng = np.random.default_rng(seed)
    shapes = {"fc": (256, 128)}
    for name, size, inputs, outputs in CONVS:
        shapes[f"{name}/conv/filters"] = (size, size, inputs, outputs)
        for part in ("conv/bias", "scale/weights", "scale/biases"):
            shapes[f"{name}/{part}"] = (outputs,)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def write_folder(folder, tensors, shards=2):
    """Writes a tfjs folder of float32 tensors, split into shards at arbitrary bytes."""
    data = b"".join(array.astype("<f4").tobytes() for array in tensors.values())
    size = -(-len(data) // shards)
    paths = [f"model-shard{i + 1}" for i in range(shards)]
    for i, path in enumerate(paths):
        (folder / path).write_bytes(data[i * size : (i + 1) * size])
    weights = [
        {"name": name, "shape": list(array.shape), "dtype": "float32"}
        for name, array in tensors.items()
    ]
    manifest = json.dumps([{"paths": paths, "weights": weights}])
    (folder / "face-weights_manifest.json").write_text(manifest)


def dlib_int(value):
    """Returns dlib's portable integer: a byte with the byte count, then little-endian bytes."""
    size = max(1, (value.bit_length() + 7) // 8)
    return bytes([size]) + value.to_bytes(size, "little")


def dlib_tensor(array):
    flat = array.astype("<f4").ravel()
    return b"".join(map(dlib_int, (2, flat.size, 1, 1, 1))) + flat.tobytes()


def write_dat(file, tensors):
    """Writes the parameter layers of a dlib network file, with other bytes between them."""
    out = [b"\x01\x0dloss_metric_2"]
    for name, *_ in CONVS:
        filters = tensors[f"{name}/conv/filters"].transpose(3, 2, 0, 1).ravel()
        conv = np.concatenate([filters, tensors[f"{name}/conv/bias"]])
        scale = [tensors[f"{name}/scale/{part}"] for part in ("weights", "biases")]
        out += [b"\x01\x05con_4", dlib_tensor(conv), b"110\x01\x02"]
        out += [b"\x01\x07affine_", dlib_tensor(np.concatenate(scale)), b"\x01\x05relu_110"]
    out += [b"\x01\x04fc_2", dlib_int(128), dlib_int(256), dlib_tensor(tensors["fc"]), b"110"]
    file.write_bytes(b"".join(out))


def assert_holds(params, tensors):
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    renamed = {"fc/kernel" if n == "fc" else n.replace("filters", "kernel"): n for n in tensors}
    assert flat.keys() == renamed.keys()
    for name, array in flat.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, tensors[renamed[name]], err_msg=name)


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_a_manifest_folder(tmp_path, shards):
    tensors = manifest_tensors()
    write_folder(tmp_path, tensors, shards)
    assert_holds(load_face_weights(tmp_path), tensors)


def test_reads_dlibs_own_file(tmp_path):
    tensors = manifest_tensors()
    write_dat(tmp_path / "net.dat", tensors)
    assert_holds(load_face_weights(tmp_path / "net.dat"), tensors)


def test_dequantises(tmp_path):
    small = np.arange(6, dtype=np.uint8).reshape(2, 3)
    wide = np.array([0, 65535], "<u2")
    plain = np.array([1.5], "<f4")
    (tmp_path / "shard").write_bytes(small.tobytes() + wide.tobytes() + plain.tobytes())
    coded = {"scale": 0.5, "min": -1.0}
    manifest = [
        {
            "paths": ["shard"],
            "weights": [
                {"name": "small", "shape": [2, 3], "dtype": "float32"}
                | {"quantization": {"dtype": "uint8"} | coded},
                {"name": "wide", "shape": [2], "dtype": "float32"}
                | {"quantization": {"dtype": "uint16"} | coded},
                {"name": "plain", "shape": [], "dtype": "float32"},
            ],
        }
    ]
    tensors = read_tfjs_tensors(tmp_path, manifest)
    np.testing.assert_array_equal(tensors["small"], 0.5 * small - 1)
    np.testing.assert_array_equal(tensors["wide"], [-1, 32766.5])
    assert tensors["plain"] == np.float32(1.5)
    manifest[0]["weights"][0]["quantization"]["dtype"] = "int4"
    with pytest.raises(UserError, match="small is stored as int4"):
        read_tfjs_tensors(tmp_path, manifest)


def test_names_every_missing_unexpected_and_misshapen_tensor(tmp_path):
    tensors = manifest_tensors()
    tensors["conv64_1/conv3/conv/bias"] = tensors.pop("conv64_1/conv2/conv/bias")
    del tensors["conv256_down_out/conv1/scale/weights"]
    tensors["fc"] = tensors["fc"].T
    write_folder(tmp_path, tensors)
    with pytest.raises(UserError) as caught:
        load_face_weights(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        str(tmp_path),
        "missing conv64_1/conv2/conv/bias",
        "unexpected conv64_1/conv3/conv/bias",
        "missing conv256_down_out/conv1/scale/weights",
        "fc is [128, 256], expected [256, 128]",
    ):
        assert part in message


def test_shard_too_short_too_long_or_gone(tmp_path):
    tensors = manifest_tensors()
    write_folder(tmp_path, tensors, shards=1)
    shard = tmp_path / "model-shard1"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match="ends within conv256_down_out/conv2/scale/biases"):
        load_face_weights(tmp_path)
    shard.write_bytes(data + b"more")
    with pytest.raises(UserError, match=f"holds {len(data) + 4} bytes"):
        load_face_weights(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="model-shard1: cannot be read"):
        load_face_weights(tmp_path)


@pytest.mark.parametrize("text", ["[1, 2]", "{not json", '[{"paths": ["a"]}]'])
def test_manifest_of_another_kind(tmp_path, text):
    (tmp_path / "x-weights_manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"x-weights_manifest\.json: not a TensorFlow\.js"):
        load_face_weights(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="found 0"):
        load_face_weights(tmp_path)
    with pytest.raises(UserError, match=r"none\.dat: cannot be read"):
        load_face_weights(tmp_path / "none.dat")


def test_dat_damaged_or_of_another_network(tmp_path):
    file = tmp_path / "net.dat"
    write_dat(file, manifest_tensors())
    data = file.read_bytes()
    file.write_bytes(data[:-1000])
    with pytest.raises(UserError, match="damaged"):
        load_face_weights(file)
    file.write_bytes(data.replace(b"affine_", b"bn_con2", 1))
    with pytest.raises(UserError, match="found 29, 28 and 1"):
        load_face_weights(file)
    # The first convolution's tensor claims one value more than it holds.
    file.write_bytes(data.replace(dlib_int(4736), dlib_int(4737), 1))
    with pytest.raises(UserError, match="damaged"):
        load_face_weights(file)


def test_hash_is_over_the_files_bytes(tmp_path):
    write_folder(tmp_path, manifest_tensors(), shards=2)
    names = ("face-weights_manifest.json", "model-shard1", "model-shard2")
    data = b"".join((tmp_path / name).read_bytes() for name in names)
    before = face_weights_hash(tmp_path)
    assert before == hashlib.sha256(data).hexdigest()
    shard = tmp_path / "model-shard2"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    assert face_weights_hash(tmp_path) != before
    (tmp_path / "net.dat").write_bytes(b"abc")
    assert face_weights_hash(tmp_path / "net.dat") == hashlib.sha256(b"abc").hexdigest()


def test_crop_takes_the_named_square():
    # The colour of a pixel encodes its position, so the crop's position can be read from it.
    y, x = np.mgrid[0:250, 0:250]
    photo = PIL.Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    chip = face_crop(photo)
    assert chip.shape == (150, 150, 3)
    assert chip.dtype == np.float32
    # Side 124 about (125, 133): columns 63…187, rows 71…195, in steps of 124/150.
    steps = (np.arange(150) + 0.5) * 124 / 150 - 0.5
    inner = slice(3, -3)  # the filter is cut short at the box's edge
    np.testing.assert_allclose(chip[75, inner, 0], (63 + steps)[inner], atol=1)
    np.testing.assert_allclose(chip[inner, 75, 1], (71 + steps)[inner], atol=1)


def test_crop_is_antialiased_and_the_same_for_a_larger_photo():
    # A one-pixel checkerboard shrunk six times becomes grey; without antialiasing it would stay
    # black and white.
    y, x = np.mgrid[0:1800, 0:1800]
    photo = PIL.Image.fromarray((255 * ((x + y) % 2)).astype(np.uint8))
    chip = face_crop(photo, centre=(0.5, 0.5), side=0.5)
    assert abs(chip - 127.5).max() < 4


def test_crop_outside_the_photo_is_refused():
    photo = PIL.Image.new("RGB", (250, 250))
    with pytest.raises(UserError, match="outside the photo of 250×250"):
        face_crop(photo, centre=(0.9, 0.5), side=0.5)
    with pytest.raises(UserError, match="outside the photo"):
        face_crop(photo, side=0.0)


def test_real_quantised_folder_loads():
    folder = SHARED / "weights/face_recognition_dlib_resnet"
    if not folder.is_dir():
        pytest.skip("no ../shared/weights/face_recognition_dlib_resnet")
    leaves = jax.tree.leaves(load_face_weights(folder))
    (group,) = json.loads(next(folder.glob("*weights_manifest.json")).read_text())
    assert len(leaves) == len(group["weights"])
    values = sum(math.prod(entry["shape"]) for entry in group["weights"])
    assert sum(leaf.size for leaf in leaves) == values
    assert all(np.isfinite(leaf).all() for leaf in leaves)
