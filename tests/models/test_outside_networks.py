"""Inception v3 and FaceNet compared with the PyTorch modules, on weights drawn by name and shape.

The packages of those modules would install another torch, so their outputs are in a golden file.
The last test recomputes it if they are installed (``pip install --no-deps torch-fidelity
facenet-pytorch``).
"""

import importlib.util
import json
import pathlib
import sys
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from persona_jax.interop.tensors import from_torch, torch_name, torch_shape
from persona_jax.models.facenet import FaceNet
from persona_jax.models.inception import InceptionV3

GOLDEN = pathlib.Path(__file__).with_name("outside_networks_golden.json")
NETWORKS = {"inception": (InceptionV3(), 299), "facenet": (FaceNet(), 160)}


def draw(name, shape):
    """Returns a reproducible tensor in torch's layout that preserves the signal's scale."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if len(shape) > 1:
        return (rng.randn(*shape) * (2 / np.prod(shape[1:])) ** 0.5).astype(np.float32)
    if name.endswith(("running_var", ".weight")):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return (0.1 * rng.randn(*shape)).astype(np.float32)


def params_of(network, size):
    blank = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    tree = jax.eval_shape(network.init, jax.random.key(0), blank)["params"]
    flat = traverse_util.flatten_dict(tree)
    drawn = {
        path: from_torch(path, draw(torch_name(path), torch_shape(path, leaf.shape)))
        for path, leaf in flat.items()
    }
    return traverse_util.unflatten_dict(drawn)


def pictures(size):
    """Returns two smooth pictures of integer levels, 0 to 255 ``[2, size, size, 3]``."""
    y, x = np.mgrid[0:size, 0:size] / size
    waves = [np.sin(9 * x + i) * np.cos(7 * y - 2 * i) for i in range(6)]
    return (
        np.rint(127.5 + 127 * np.stack(waves, -1)).reshape(size, size, 2, 3).transpose(2, 0, 1, 3)
    )


def thin(array):
    """Returns every eighth value, and the norm of all."""
    return {"norm": np.linalg.norm(array, axis=1).tolist(), "some": array[:, ::8].tolist()}


def close(actual, wanted):
    np.testing.assert_allclose(np.linalg.norm(actual, axis=1), wanted["norm"], rtol=1e-4)
    some = np.asarray(wanted["some"])
    error = np.linalg.norm(np.asarray(actual)[:, ::8] - some) / np.linalg.norm(some)
    assert error < 1e-4, error


def test_inception_agrees_with_torch_fidelity():
    wanted = json.loads(GOLDEN.read_text())
    network, size = NETWORKS["inception"]
    inputs = jnp.asarray((pictures(size) - 128) / 128, jnp.float32)
    features, logits = jax.jit(network.apply)({"params": params_of(network, size)}, inputs)
    assert features.shape == (2, 2048)
    assert logits.shape == (2, 1008)
    close(features, wanted["inception_features"])
    close(logits, wanted["inception_logits"])


def test_facenet_agrees_with_facenet_pytorch():
    network, size = NETWORKS["facenet"]
    inputs = jnp.asarray((pictures(size) - 127.5) / 128, jnp.float32)
    embedding = jax.jit(network.apply)({"params": params_of(network, size)}, inputs)
    assert embedding.shape == (2, 512)
    close(embedding, json.loads(GOLDEN.read_text())["facenet"])


def submodule(package, name):
    """Loads a module of a package without the package's own imports, which need torchvision."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"pip install --no-deps {package.replace('_', '-')} to make the golden file")
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = bare
    return importlib.import_module(f"{package}.{name}")


@pytest.fixture
def outside(tmp_path):
    """Returns the outputs of the outside modules."""
    torch = pytest.importorskip("torch")
    fidelity = submodule("torch_fidelity", "feature_extractor_inceptionv3")
    facenet = submodule("facenet_pytorch", "models.inception_resnet_v1")

    def fill(module):
        state = module.state_dict()
        for name, tensor in state.items():
            if not name.endswith("num_batches_tracked"):
                state[name] = torch.tensor(draw(name, tuple(tensor.shape)))
        return state

    def levels(size):
        return torch.tensor(pictures(size).transpose(0, 3, 1, 2).copy())

    kind = fidelity.FeatureExtractorInceptionV3
    original = kind.load_state_dict
    kind.load_state_dict = lambda self, state: original(self, fill(self))
    torch.save({}, tmp_path / "empty.pth")
    try:
        inception = kind("it", ["2048", "logits_unbiased"], str(tmp_path / "empty.pth"))
    finally:
        kind.load_state_dict = original
    face = facenet.InceptionResnetV1().eval()
    face.load_state_dict(fill(face))
    with torch.no_grad():
        features, logits = inception(levels(299).to(torch.uint8))
        faces = face((levels(160).float() - 127.5) / 128)
    return {
        "inception_features": thin(features.numpy()),
        "inception_logits": thin(logits.numpy()),
        "facenet": thin(faces.numpy()),
    }


def test_golden_file_is_what_the_outside_modules_say(outside):
    wanted = json.loads(GOLDEN.read_text())
    for name, numbers in outside.items():
        np.testing.assert_allclose(numbers["norm"], wanted[name]["norm"], rtol=1e-5)
        np.testing.assert_allclose(numbers["some"], wanted[name]["some"], rtol=1e-3, atol=1e-5)
