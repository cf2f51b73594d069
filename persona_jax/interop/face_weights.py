"""Weights of :class:`persona_jax.models.face_resnet.FaceResNet`, and the face crop they expect.

The same network comes in two formats: face-api.js' tfjs folder (a manifest and uint8 shards, 6 MB),
and dlib's float32 original (`dlib_face_recognition_resnet_model_v1.dat`, 22 MB, on PyPI in
`face_recognition_models`). Both readers are strict, and neither executes code from the file.
"""

import hashlib
import importlib.util
import json
import math
import re
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Float

from persona_jax.errors import UserError
from persona_jax.models.face_resnet import BLOCKS, SIDE, FaceResNet

# Position of the face in deep-funneled LFW photos (250×250: centre (125, 133), side 124), as
# fractions of the photo. These photos are aligned, so one crop fits all.
LFW_CENTRE = (0.5, 0.532)
LFW_CROP = 0.496


def installed_face_weights() -> Path | None:
    """dlib's `.dat` file in the package `face_recognition_models`, or None."""
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / "models" / "dlib_face_recognition_resnet_model_v1.dat"
    return file if file.is_file() else None


def load_face_weights(path: str | Path) -> dict:
    """FaceResNet's parameter tree (numpy float32) from a tfjs folder or a dlib `.dat`.

    Raises:
      UserError: `path` does not exist, or is truncated or of another kind; tensors that are
        missing, unexpected or misshapen, all named.
    """
    path = Path(path)
    tensors = _read_dat(path) if path.suffix == ".dat" else _read_tfjs_folder(path)
    expected = _expected_shapes()
    problems = [f"missing {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        raise UserError(
            f"{path}: not the weights of dlib's face recognition ResNet: "
            f"{'; '.join(sorted(problems))}"
        )
    return flax.traverse_util.unflatten_dict(
        {_flax_name(name): array for name, array in tensors.items()}, sep="/"
    )


def face_weights_hash(path: str | Path) -> str:
    """SHA-256 (hex) of the weight files: the `.dat`, or the manifest followed by its shards."""
    path = Path(path)
    files = [path] if path.suffix == ".dat" else [_manifest_file(path), *_shards(path)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(_read_bytes(file))
    return digest.hexdigest()


def face_crop(
    image: PIL.Image.Image,
    centre: tuple[float, float] = LFW_CENTRE,
    side: float = LFW_CROP,
    size: int = SIDE,
) -> Float[np.ndarray, "{size} {size} 3"]:
    """Crop a square from a photo and resize it, antialiased, for a face network.

    Args:
      image: any PIL image; converted to RGB.
      centre: (x, y) of the square's centre, as fractions of the photo's width and height.
      side: the square's side, as a fraction of the photo's shorter side.
      size: side of the result, in pixels.

    Returns:
      RGB, 0…255, float32 ``[size, size, 3]``.

    Raises:
      UserError: the square reaches outside the photo.
    """
    half = side * min(image.size) / 2
    x, y = (fraction * size for fraction, size in zip(centre, image.size, strict=True))
    box = (x - half, y - half, x + half, y + half)
    if half <= 0 or min(box) < 0 or box[2] > image.width or box[3] > image.height:
        raise UserError(
            f"face crop: centre {centre} and side {side} give the box {box}, outside the photo "
            f"of {image.width}×{image.height}; choose fractions that stay inside"
        )
    chip = image.convert("RGB").resize((size, size), PIL.Image.Resampling.BICUBIC, box=box)
    return np.asarray(chip, np.float32)


def read_tfjs_tensors(folder: Path, manifest: list) -> dict[str, np.ndarray]:
    """The tensors of a TensorFlow.js weights manifest, as float32.

    Args:
      folder: holds the shards.
      manifest: groups of `{"paths": [shard, …], "weights": [{"name", "shape", "dtype",
        "quantization"?: {"dtype", "scale", "min"}}, …]}`. The shards of a group are concatenated.
        Quantised values are `scale · q + min`.

    Raises:
      UserError: a shard is missing or its length differs from the manifest's, or a type is neither
        float32 nor quantised to uint8 or uint16.
    """
    tensors = {}
    for group in manifest:
        data = b"".join(_read_bytes(folder / name) for name in group["paths"])
        at = 0
        for entry in group["weights"]:
            name, shape, quantised = entry["name"], entry["shape"], entry.get("quantization")
            stored = quantised["dtype"] if quantised else entry["dtype"]
            if stored not in (("uint8", "uint16") if quantised else ("float32",)):
                raise UserError(
                    f"{folder}: {name} is stored as {stored}; float32, or quantised uint8 or "
                    "uint16, can be read"
                )
            dtype = np.dtype(stored).newbyteorder("<")
            end = at + math.prod(shape) * dtype.itemsize
            if end > len(data):
                raise UserError(
                    f"{folder}: {', '.join(group['paths'])} ends within {name} "
                    f"({len(data)} bytes, {end} needed); fetch it again"
                )
            values = np.frombuffer(data[at:end], dtype).astype(np.float32).reshape(shape)
            if quantised:
                values = values * np.float32(quantised["scale"]) + np.float32(quantised["min"])
            tensors[name] = values
            at = end
        if at != len(data):
            raise UserError(
                f"{folder}: {', '.join(group['paths'])} holds {len(data)} bytes, the manifest "
                f"describes {at}; manifest and shards are not of one model"
            )
    return tensors


def _expected_shapes() -> dict[str, tuple[int, ...]]:
    """The name in the manifest and the shape of every tensor."""
    blank = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    tree = jax.eval_shape(FaceResNet().init, jax.random.key(0), blank)["params"]
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    return {_manifest_name(name): leaf.shape for name, leaf in flat.items()}


def _flax_name(name: str) -> str:
    return "fc/kernel" if name == "fc" else name.replace("/conv/filters", "/conv/kernel")


def _manifest_name(name: str) -> str:
    return "fc" if name == "fc/kernel" else name.replace("/conv/kernel", "/conv/filters")


def _manifest_file(folder: Path) -> Path:
    manifests = sorted(folder.glob("*weights_manifest.json"))
    if len(manifests) != 1:
        raise UserError(
            f"{folder}: expected one *weights_manifest.json, found {len(manifests)}; give the "
            "folder of face-api.js' face_recognition_model, or dlib's "
            "dlib_face_recognition_resnet_model_v1.dat"
        )
    return manifests[0]


def _manifest(folder: Path) -> list:
    file = _manifest_file(folder)
    try:
        groups = json.loads(_read_bytes(file))
        # Access all that is read later, so that a file of another kind fails here, with its name.
        for group in groups:
            _ = [str(name) for name in group["paths"]]
            _ = [(entry["name"], math.prod(entry["shape"])) for entry in group["weights"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a TensorFlow.js weights manifest ({error!r})") from error
    return groups


def _shards(folder: Path) -> list[Path]:
    return [folder / name for group in _manifest(folder) for name in group["paths"]]


def _read_tfjs_folder(folder: Path) -> dict[str, np.ndarray]:
    return read_tfjs_tensors(folder, _manifest(folder))


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


# dlib writes layers in order from the input. Each begins with its version string, after the
# string's length as an integer. Only three kinds have parameters.
_LAYER = re.compile(rb"\x01\x05con_4|\x01\x07affine_|\x01\x04fc_2")


def _read_dat(file: Path) -> dict[str, np.ndarray]:
    """dlib's own file, with the names and layouts of the manifest."""
    data = _read_bytes(file)
    convs = ["conv32_down", *(f"{name}/conv{i}" for name, _, _ in BLOCKS for i in (1, 2))]
    want = [b"con_4", b"affine_"] * len(convs) + [b"fc_2"]
    marks = list(_LAYER.finditer(data))
    kinds = [mark.group()[2:] for mark in marks]
    if kinds != want:
        raise UserError(
            f"{file}: expected {len(convs)} convolutions with their affine layers and one fully "
            f"connected layer, found {kinds.count(b'con_4')}, {kinds.count(b'affine_')} and "
            f"{kinds.count(b'fc_2')}; use dlib_face_recognition_resnet_model_v1.dat"
        )
    shapes = _expected_shapes()
    tensors = {}
    try:
        for name, conv, affine in zip(convs, marks[:-1:2], marks[1::2], strict=True):
            height, width, inputs, outputs = shapes[f"{name}/conv/filters"]
            flat = _dat_tensor(data, conv.end()).ravel()
            filters, tensors[f"{name}/conv/bias"] = flat[:-outputs], flat[-outputs:]
            filters = filters.reshape(outputs, inputs, height, width)
            tensors[f"{name}/conv/filters"] = filters.transpose(2, 3, 1, 0)
            gamma, beta = _dat_tensor(data, affine.end()).reshape(2, outputs)
            tensors[f"{name}/scale/weights"], tensors[f"{name}/scale/biases"] = gamma, beta
        at = marks[-1].end()
        for _ in ("outputs", "inputs"):
            _, at = _dat_int(data, at)
        tensors["fc"] = _dat_tensor(data, at).reshape(shapes["fc"])
    except (ValueError, IndexError) as error:
        raise UserError(f"{file}: damaged, or of another dlib version ({error})") from error
    return tensors


def _dat_int(data: bytes, at: int) -> tuple[int, int]:
    """An integer in dlib's format (sign bit and byte count, then little-endian), and its end."""
    size = data[at] & 0x0F
    value = int.from_bytes(data[at + 1 : at + 1 + size], "little")
    return -value if data[at] & 0x80 else value, at + 1 + size


def _dat_tensor(data: bytes, at: int) -> np.ndarray:
    """A dlib tensor: version 2, four sizes, little-endian float32 values."""
    header = []
    for _ in range(5):
        value, at = _dat_int(data, at)
        header.append(value)
    version, *shape = header
    if version != 2 or min(shape) < 1:
        raise ValueError(f"tensor header {header} at byte {at}")
    # frombuffer raises ValueError if the file is truncated.
    return np.frombuffer(data, "<f4", count=math.prod(shape), offset=at).astype(np.float32)
