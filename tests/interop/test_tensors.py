"""Names, layouts and strictness of tensor files; Stable Diffusion 1.5's published lists."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from persona_jax.errors import UserError
from persona_jax.interop.tensors import (
    TensorFiles,
    from_torch,
    load_tree,
    save_tree,
    to_torch,
    torch_name,
    torch_shape,
    weight_files,
)
from persona_jax.models import towers, unet

CONFIGS = {
    "unet": {
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "image_encoder": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
}


def listed(file: str):
    return json.loads((torch_models.PUBLISHED / file).read_text())


def our_shapes(tower: str) -> dict[str, list[int]]:
    tree = towers.abstract_params(towers.build(tower, CONFIGS[tower]))
    flat = traverse_util.flatten_dict(tree)
    return {torch_name(path): list(torch_shape(path, leaf.shape)) for path, leaf in flat.items()}


@pytest.mark.parametrize(
    ("tower", "file", "parameters"),
    [
        ("unet", "unet.json", 859_520_964),
        ("vae", "vae.json", 83_653_863),
        ("text_encoder", "text_encoder.json", 123_060_480),
        ("image_encoder", "image_encoder_vit_h14.json", 632_076_800),
    ],
)
def test_the_published_lists_are_ours_exactly(tower, file, parameters):
    published = listed(file)
    if tower == "text_encoder":  # transformers 5 lists it without the prefix
        published = {
            name if name.startswith("text_model.") else f"text_model.{name}": shape
            for name, shape in published.items()
        }
    ours = our_shapes(tower)
    assert ours == published
    assert sum(math.prod(shape) for shape in ours.values()) == parameters


def test_cross_attention_layers_are_numbered_as_in_ip_adapter_files():
    order = [name.removesuffix(".processor") for name in listed("unet_attn_processor_order.json")]
    layers = unet.cross_attention_layers(unet.UNetConfig.from_json(CONFIGS["unet"]))
    assert list(layers) == order[1::2]
    # The published adapter's projections fit the layers of their numbers.
    adapter, ours = listed("ip-adapter_sd15.json"), our_shapes("unet")
    for number, layer in zip(range(1, 32, 2), layers, strict=True):
        for kind in ("k", "v"):
            published = adapter[f"ip_adapter.{number}.to_{kind}_ip.weight"]
            assert published == ours[f"{layer}.to_{kind}.weight"]


# A tree with every kind of leaf: convolution, dense layer, norm, embedding, bare parameter.
TREE = {
    "conv_in": {"kernel": (3, 3, 4, 8), "bias": (8,)},
    "blocks.0": {"ff": {"kernel": (8, 5), "bias": (5,)}, "norm": {"scale": (5,), "bias": (5,)}},
    "token_embedding": {"embedding": (7, 5)},
    "class_embedding": (5,),
}


def filled(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape, dtype=np.float32),
        TREE,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def abstract() -> dict:
    return jax.eval_shape(filled)


def load(file, **more):
    return load_tree(abstract(), TensorFiles([file], "here"), **more)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_layouts_are_torchs():
    """Flax and torch compute the same convolution and dense layer from one file."""
    params, rng = filled(), np.random.default_rng(1)
    x = rng.standard_normal((1, 6, 6, 4), dtype=np.float32)
    kernel = to_torch(("conv_in", "kernel"), params["conv_in"]["kernel"])
    theirs = torch.conv2d(torch_models.nchw(x), torch.tensor(kernel))
    ours = jax.lax.conv_general_dilated(
        x, params["conv_in"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert torch_models.relative(ours, torch_models.nhwc(theirs)) < 1e-6
    dense = params["blocks.0"]["ff"]["kernel"]
    y = rng.standard_normal((2, 8), dtype=np.float32)
    weight = torch.tensor(np.ascontiguousarray(to_torch(("ff", "kernel"), dense)))
    assert (
        torch_models.relative(y @ dense, torch.nn.functional.linear(torch.tensor(y), weight)) < 1e-6
    )
    for path, leaf in traverse_util.flatten_dict(params).items():
        assert to_torch(path, leaf).shape == torch_shape(path, leaf.shape)
        np.testing.assert_array_equal(from_torch(path, to_torch(path, leaf)), leaf)


def test_saving_and_loading_is_the_identity(tmp_path):
    save_tree(filled(), tmp_path / "a.safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == {
        "conv_in.weight",
        "conv_in.bias",
        "blocks.0.ff.weight",
        "blocks.0.ff.bias",
        "blocks.0.norm.weight",
        "blocks.0.norm.bias",
        "token_embedding.weight",
        "class_embedding",
    }
    assert_same(load(tmp_path / "a.safetensors"), filled())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_files_keep_their_type_or_are_cast(dtype, tmp_path):
    half = jax.tree.map(lambda x: jnp.asarray(x, dtype), filled())
    save_tree(half, tmp_path / "a.safetensors")
    kept = load(tmp_path / "a.safetensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(dtype)}
    assert_same(kept, half)
    cast = load(tmp_path / "a.safetensors", dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {jnp.dtype("float32")}
    assert_same(cast, jax.tree.map(lambda x: x.astype(jnp.float32), half))


def test_bfloat16_files_of_torch(tmp_path):
    numbers = torch.tensor([1.0, -2.5, 3e38])
    save_torch({"x": numbers.to(torch.bfloat16)}, tmp_path / "a.safetensors")
    files = TensorFiles([tmp_path / "a.safetensors"], "here")
    tree = load_tree({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}, files, dtype=jnp.float32)
    np.testing.assert_array_equal(tree["x"], numbers.to(torch.bfloat16).float())


def test_tensors_go_straight_to_their_shards(tmp_path):
    save_tree(filled(), tmp_path / "a.safetensors")
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: whole, abstract())
    shardings["conv_in"]["kernel"] = NamedSharding(mesh, PartitionSpec(None, None, None, "fsdp"))
    tree = load(tmp_path / "a.safetensors", sharding=shardings)
    assert_same(tree, filled())
    assert jax.tree.map(lambda x: x.sharding, tree) == shardings
    assert tree["conv_in"]["kernel"].addressable_shards[3].data.shape == (3, 3, 4, 1)
    assert_same(load(tmp_path / "a.safetensors", sharding=whole), filled())


def remove(tensors):
    del tensors["conv_in.bias"]


def rename(tensors):
    tensors["blocks.0.feed.weight"] = tensors.pop("blocks.0.ff.weight")


def reshape(tensors):
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"].T.copy()


REMOVED = ["1 missing: conv_in.bias"]
RENAMED = ["1 missing: blocks.0.ff.weight", "1 unexpected: blocks.0.feed.weight"]
RESHAPED = ["1 misshapen: token_embedding.weight (5, 7) instead of (7, 5)"]


@pytest.mark.parametrize(
    ("damages", "named"),
    [
        ([remove], REMOVED),
        ([rename], RENAMED),
        ([reshape], RESHAPED),
        (
            [remove, rename, reshape],
            [
                "2 missing: blocks.0.ff.weight, conv_in.bias",
                "1 unexpected: blocks.0.feed.weight",
                *RESHAPED,
            ],
        ),
    ],
    ids=["removed", "renamed", "reshaped", "all"],
)
def test_what_does_not_fit_is_named(damages, named, tmp_path):
    save_tree(filled(), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    for damage in damages:
        damage(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        load(tmp_path / "a.safetensors")
    message = str(error.value)
    assert message.startswith("here: ")
    assert "\n" not in message
    assert message.split("; ")[1:] == named


def test_every_name_is_listed_however_many(tmp_path):
    strange = {f"strange.{i}": np.zeros(1, np.float32) for i in range(40)}
    save_file(strange, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        load(tmp_path / "a.safetensors")
    listed_names = "\n".join(error.value.details)
    assert all(name in listed_names for name in [*strange, "conv_in.weight", "blocks.0.ff.bias"])
    assert "40 unexpected: strange.0" in str(error.value)
    assert len(str(error.value)) < 500


def test_one_tensor_under_two_names_is_refused(tmp_path):
    save_tree(filled(), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    tensors["old.class_embedding"] = tensors["class_embedding"] + 1
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"1 twice: class_embedding as .*old\.class_embedding"):
        load(tmp_path / "a.safetensors", rename=lambda name: name.removeprefix("old."))


def test_a_layout_is_never_guessed_from_a_shape(tmp_path):
    """A square 3×3 kernel for a dense layer is refused; only a 1×1 one is a dense layer."""
    save_file({"ff.weight": np.zeros((5, 8, 3, 3), np.float32)}, tmp_path / "a.safetensors")
    tree = {"ff": {"kernel": jax.ShapeDtypeStruct((8, 5), jnp.float32)}}
    with pytest.raises(UserError, match=r"ff\.weight \(5, 8, 3, 3\) instead of \(5, 8\)"):
        load_tree(tree, TensorFiles([tmp_path / "a.safetensors"], "here"))
    weight = np.arange(40, dtype=np.float32).reshape(5, 8)
    save_file({"ff.weight": weight[..., None, None]}, tmp_path / "a.safetensors")
    out = load_tree(tree, TensorFiles([tmp_path / "a.safetensors"], "here"))
    np.testing.assert_array_equal(out["ff"]["kernel"], weight.T)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "4 bytes", "header", "cut short"])
def test_damaged_files_are_named(keep, tmp_path):
    file = tmp_path / "model.safetensors"
    save_tree(filled(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors") as error:
        load(file)
    assert "\n" not in str(error.value)


def test_tensors_that_are_not_numbers_to_compute_with_are_refused(tmp_path):
    save_file({"x": np.zeros(3, bool)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: x has type BOOL"):
        TensorFiles([tmp_path / "a.safetensors"], "here")


def test_a_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-2.safetensors").touch()
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors"):
        weight_files(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    words = "(not a readable index|not readable as JSON|expected a JSON object)"
    with pytest.raises(UserError, match=rf"model\.safetensors\.index\.json: {words}"):
        weight_files(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"there is pytorch_model\.bin: save it as safetensors"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"weights are read from safetensors"):
        weight_files(tmp_path)
