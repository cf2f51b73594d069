"""The adapter in the UNet, compared with stock diffusers and an IP-Adapter in published layout."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from diffusers.image_processor import IPAdapterMaskProcessor

from persona_jax.interop.folders import load_tower
from persona_jax.models import adapter
from persona_jax.models.aggregators import Aggregator, EveryPhoto
from persona_jax.models.attention import Source, project_keys_values
from persona_jax.models.unet import cross_attention_layers, text_kernels

DIM, TEXT = 12, torch_models.TINY_UNET["cross_attention_dim"]
AVERAGE = Aggregator("avg")
Z, T = torch_models.normal(2, 8, 8, 4), np.array([3, 801])
TOKENS, IMAGE = torch_models.normal(2, 7, TEXT, seed=1), torch_models.normal(2, DIM, seed=2)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return torch_models.make_unet(torch_models.TINY_UNET)


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    theirs.save_pretrained(folder)
    return load_tower(folder, "unet")


@pytest.fixture(scope="module")
def kernels(ours):
    return text_kernels(ours.params, ours.module.config)


@pytest.fixture(scope="module")
def published(theirs):
    """A random adapter in the file layout: numbered by position in ``attn_processors``."""
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> torch.Tensor:
        return 0.5 * torch.randn(shape, generator=generator)

    layers = {
        number: theirs.get_submodule(name.removesuffix(".processor"))
        for number, name in enumerate(theirs.attn_processors)
        if "attn2" in name
    }
    return {
        "image_proj": {
            "proj.weight": drawn(adapter.TOKENS * TEXT, DIM),
            "proj.bias": drawn(adapter.TOKENS * TEXT),
            "norm.weight": 1 + drawn(TEXT),
            "norm.bias": drawn(TEXT),
        },
        "ip_adapter": {
            f"{number}.to_{kind}_ip.weight": drawn(layer.inner_dim, TEXT)
            for number, layer in layers.items()
            for kind in "kv"
        },
    }


@pytest.fixture(scope="module")
def params(published, ours):
    """The same adapter as our tree, from torch's names and the layers' order."""

    def array(tensor: torch.Tensor) -> jax.Array:
        return jnp.asarray(tensor.numpy())

    projection, projections = published["image_proj"], published["ip_adapter"]
    layers = cross_attention_layers(ours.module.config)
    assert len(projections) == 2 * len(layers)
    return {
        "image_proj": {
            "proj": {
                "kernel": array(projection["proj.weight"].T),
                "bias": array(projection["proj.bias"]),
            },
            "norm": {
                "scale": array(projection["norm.weight"]),
                "bias": array(projection["norm.bias"]),
            },
        },
        "ip_adapter": {
            layer: {
                f"to_{kind}": {"kernel": array(projections[f"{2 * i + 1}.to_{kind}_ip.weight"].T)}
                for kind in "kv"
            }
            for i, layer in enumerate(layers)
        },
        "aggregator": {},
    }


@pytest.fixture(scope="module")
def with_adapter(theirs, published):
    """Stock diffusers' UNet with the published adapter loaded."""
    unet = torch_models.make_unet(torch_models.TINY_UNET)
    unet.load_state_dict(theirs.state_dict())
    unet._load_ip_adapter_weights([published])
    return unet


@pytest.fixture(scope="module")
def run(ours, params, kernels):
    """Our UNet with the adapter, compiled once per form of λ."""

    @jax.jit
    def predict(image, scale):
        sources = (
            Source(*project_keys_values(kernels, jnp.asarray(TOKENS))),
            adapter.source(params, image, scale),
        )
        return ours.module.apply({"params": ours.params}, jnp.asarray(Z), jnp.asarray(T), sources)

    return lambda image, scale: predict(jnp.asarray(image), scale)


def stock_predicts(unet, image, scale, mask=None) -> np.ndarray:
    for name, processor in unet.attn_processors.items():
        if "attn2" in name:
            processor.scale = [scale[name] if isinstance(scale, dict) else scale]
    more = {} if mask is None else {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
    with torch.no_grad():
        out = unet(
            torch_models.nchw(Z),
            torch.tensor(T),
            torch.tensor(TOKENS),
            added_cond_kwargs={
                "image_embeds": [torch.tensor(image).reshape(len(image), -1, image.shape[-1])]
            },
            **more,
        )
    return torch_models.nhwc(out.sample)


@pytest.mark.parametrize("scale", [1.0, 0.6, 0.0])
def test_unet_with_adapter_is_stocks_with_ip_adapter(scale, run, with_adapter):
    expected = stock_predicts(with_adapter, IMAGE, scale)
    assert torch_models.relative(run(IMAGE, scale), expected) < 1e-5


def test_several_photos_side_by_side_are_stocks_several_images(run, with_adapter):
    random = np.random.default_rng(3)
    images = random.normal(size=(len(IMAGE), 3, IMAGE.shape[1])).astype(np.float32)
    every = EveryPhoto().apply({}, jnp.asarray(images), jnp.ones(images.shape[:2]))
    expected = stock_predicts(with_adapter, images, 1.0)
    assert torch_models.relative(run(every, 1.0), expected) < 1e-5


def test_the_unconditional_branch_is_the_zero_embedding(run, with_adapter):
    """The zero embedding gives tokens too, so it differs from no adapter."""
    zeros = np.zeros_like(IMAGE)
    ours = run(zeros, 1.0)
    assert torch_models.relative(ours, stock_predicts(with_adapter, zeros, 1.0)) < 1e-5
    assert torch_models.relative(run(zeros, 0.0), ours) > 1e-2


def test_scale_zero_is_no_adapter(run, theirs):
    with torch.no_grad():
        expected = theirs(torch_models.nchw(Z), torch.tensor(T), torch.tensor(TOKENS)).sample
    assert torch_models.relative(run(IMAGE, 0.0), torch_models.nhwc(expected)) < 1e-5
    assert torch_models.relative(run(IMAGE, 1.0), torch_models.nhwc(expected)) > 1e-2


def test_a_scale_for_each_layer(run, ours, with_adapter):
    layers = cross_attention_layers(ours.module.config)
    scales = {layer: 0.2 * i for i, layer in enumerate(layers)}
    expected = stock_predicts(
        with_adapter, IMAGE, {f"{layer}.processor": scale for layer, scale in scales.items()}
    )
    assert torch_models.relative(run(IMAGE, scales), expected) < 1e-5


def test_region_masks_are_stocks_ip_adapter_masks(run, ours, with_adapter):
    """λ is ``[B, h·w]`` per layer, resized to the layer by stock diffusers' own function."""
    mask = np.zeros((1, 1, 64, 64), np.float32)
    mask[..., 24:] = 1.0
    expected = stock_predicts(with_adapter, IMAGE, 0.8, torch.tensor(mask))

    def shrunk(layer: str) -> jax.Array:
        places = 16 if layer.startswith("mid_block") else 64
        small = IPAdapterMaskProcessor.downsample(torch.tensor(mask[0]), 2, places, 1)
        return jnp.asarray(0.8 * small[..., 0].numpy())

    scales = {layer: shrunk(layer) for layer in cross_attention_layers(ours.module.config)}
    ours = run(IMAGE, scales)
    assert torch_models.relative(ours, expected) < 1e-5
    assert torch_models.relative(run(IMAGE, 0.8), expected) > 1e-3


def test_image_tokens_are_stocks(params, published):
    projection = diffusers.models.embeddings.ImageProjection(DIM, TEXT, adapter.TOKENS)
    projection.load_state_dict(
        {k.replace("proj.", "image_embeds."): v for k, v in published["image_proj"].items()}
    )
    tokens = adapter.ImageProjection(TEXT).apply(
        {"params": params["image_proj"]}, jnp.asarray(IMAGE)
    )
    assert tokens.shape == (2, 4, TEXT)
    assert torch_models.relative(tokens, projection(torch.tensor(IMAGE))) < 1e-6


def test_a_fresh_adapter_starts_from_the_texts_projections(kernels):
    fresh = adapter.init(jax.random.key(0), AVERAGE, DIM, TEXT, kernels)
    assert set(fresh) == {"image_proj", "ip_adapter", "aggregator"}
    jax.tree.map(np.testing.assert_array_equal, fresh["ip_adapter"], dict(kernels))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dict(kernels))
    copied = adapter.init(jax.random.key(0), AVERAGE, DIM, TEXT, half)["ip_adapter"]
    assert {leaf.dtype for leaf in jax.tree.leaves(copied)} == {jnp.dtype("float32")}
    assert fresh["image_proj"]["proj"]["kernel"].shape == (DIM, 4 * TEXT)


def test_a_set_is_aggregated_before_it_is_projected(params):
    references = jnp.asarray(torch_models.normal(2, 3, DIM))
    weights = jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    image = adapter.aggregate(params, AVERAGE, references, weights)
    np.testing.assert_allclose(image[0], references[0, :2].mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(image[1], jnp.zeros(DIM))


def test_a_source_computes_in_the_given_dtype(params):
    made = adapter.source(params, jnp.asarray(IMAGE), dtype=jnp.dtype("bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves((made.keys, made.values))} == {
        jnp.dtype("bfloat16")
    }
