"""Several adapters, people and forms of λ at once, compared with stock diffusers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from PIL import Image

from persona_jax.errors import UserError
from persona_jax.interop.ip_adapter import save_ip_adapter
from persona_jax.models import adapter
from persona_jax.models.aggregators import Aggregator, EveryPhoto
from persona_jax.models.unet import cross_attention_layers, text_kernels
from persona_jax.pipelines import generation, pipeline, scales
from persona_jax.runs import diffusers_check

DIM, TEXT = torch_models.TINY_VISION["projection_dim"], 16
AVERAGE, SET = Aggregator("avg"), EveryPhoto("resampler")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, its pipeline, two adapters: a plain one and a resampler)."""
    folder = tmp_path_factory.mktemp("base")
    torch_models.write_pipeline(folder)
    loaded = pipeline.load(str(folder))
    unet, adapters = loaded.unet, []
    kernels = text_kernels(unet.params, unet.module.config)
    for i, aggregator in enumerate((AVERAGE, SET)):
        params = adapter.init(jax.random.key(i), aggregator, DIM, TEXT, kernels)
        keys = iter(jax.random.split(jax.random.key(9 + i), len(jax.tree.leaves(params))))
        params = jax.tree.map(
            lambda x, k=keys: x + 0.3 * jax.random.normal(next(k), x.shape), params
        )
        save_ip_adapter(params, unet.module.config, folder / f"{i}.safetensors")
        adapters.append(adapter.Adapter(aggregator, params))
    return folder, loaded, adapters


@pytest.fixture(scope="module")
def ours(world):
    return diffusers_check.our_sampler(world[1])


@pytest.fixture(scope="module")
def both_loaded(world):
    """Stock diffusers' pipeline with both adapters."""
    folder = world[0]
    pipe = diffusers_check.open_diffusers(folder)
    names = ["0.safetensors", "1.safetensors"]
    pipe.load_ip_adapter(
        [str(folder)] * 2, subfolder=["", ""], weight_name=names, image_encoder_folder=None
    )
    return pipe


def seen(n: int, seed: int) -> np.ndarray:
    return torch_models.normal(1, n, DIM, seed=seed)


def reference_set(photos: np.ndarray, **more) -> generation.References:
    return generation.References(jnp.asarray(photos), jnp.ones(photos.shape[:2]), **more)


def plain_embeds(photos: np.ndarray, away: np.ndarray | None = None) -> torch.Tensor:
    image = photos.mean(axis=1)
    away = np.zeros_like(image) if away is None else away.mean(axis=1)
    return torch.from_numpy(np.stack([away, image]))


def set_embeds(photos: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.zeros_like(photos), photos]))


def test_two_adapters_each_with_its_own_scale(world, ours, both_loaded):
    """A plain one and a resampler."""
    one, other = seen(3, 1), seen(2, 2)
    latents = ours(world[2], [reference_set(one, scale=0.7), reference_set(other, scale=0.4)])
    both_loaded.set_ip_adapter_scale([0.7, 0.4])
    embeds = [plain_embeds(one), set_embeds(other)]
    expected = diffusers_check.diffusers_latents(
        both_loaded, world[1], ip_adapter_image_embeds=embeds
    )
    assert diffusers_check.apart(latents, expected) < 1e-3
    alone = ours(world[2][:1], [reference_set(one, scale=0.7)])
    assert diffusers_check.apart(alone, expected) > 1e-2


@pytest.mark.parametrize(
    "text", ['{"up": {"block_1": [0.0, 1.0]}}', '{"down": 0.5, "mid": 1, "up": 0.2}', "0.3"]
)
def test_scales_by_block_are_stocks(world, ours, both_loaded, text):
    unet, one = world[1].unet.module.config, seen(3, 1)
    parsed = scales.read_scale(text, unet)
    both_loaded.set_ip_adapter_scale([json.loads(text), 0.0])
    embeds = [plain_embeds(one), set_embeds(one)]
    expected = diffusers_check.diffusers_latents(
        both_loaded, world[1], ip_adapter_image_embeds=embeds
    )
    latents = ours(world[2][:1], [reference_set(one, scale=parsed)])
    assert diffusers_check.apart(latents, expected) < 1e-3


def test_photos_to_move_away_from(world, ours, both_loaded):
    """Negative photos are aggregated as others and replace the zero embedding."""
    one, away = seen(3, 1), seen(3, 5)
    both_loaded.set_ip_adapter_scale([1.0, 0.0])
    embeds = [plain_embeds(one, away), set_embeds(one)]
    expected = diffusers_check.diffusers_latents(
        both_loaded, world[1], ip_adapter_image_embeds=embeds
    )
    negative = (jnp.asarray(away), jnp.ones((1, 3)))
    latents = ours(world[2][:1], [reference_set(one, negative=negative)])
    assert diffusers_check.apart(latents, expected) < 1e-3
    assert diffusers_check.apart(ours(world[2][:1], [reference_set(one)]), expected) > 1e-3


def test_a_window_of_steps(world, ours, both_loaded):
    """Compares with stock diffusers' scale, set to 0 by a callback after half of the steps."""
    one = seen(3, 1)
    both_loaded.set_ip_adapter_scale([1.0, 0.0])

    def after(pipe, step, t, values):
        if step + 1 == diffusers_check.STEPS // 2:
            pipe.set_ip_adapter_scale([0.0, 0.0])
        return values

    expected = diffusers_check.diffusers_latents(
        both_loaded,
        world[1],
        ip_adapter_image_embeds=[plain_embeds(one), set_embeds(one)],
        callback_on_step_end=after,
    )
    half = ours(world[2][:1], [reference_set(one, window=(0.0, 0.5))])
    assert diffusers_check.apart(half, expected) < 1e-3
    whole = ours(world[2][:1], [reference_set(one)])
    assert diffusers_check.apart(whole, expected) > 1e-3
    windowed = ours(world[2][:1], [reference_set(one, window=(0.0, 1.0))])
    # These are two programs; on some processors their last bits differ.
    assert diffusers_check.apart(windowed, whole) < 1e-5


def halves(size: int = 16) -> tuple[Image.Image, Image.Image]:
    left = np.zeros((size, size), np.uint8)
    left[:, : size // 2] = 255
    return Image.fromarray(left), Image.fromarray(255 - left)


def test_two_people_in_one_picture_by_masks(world, ours, both_loaded):
    """The plain adapter's person is left, the resampler's right, as by ``ip_adapter_masks``."""
    one, other = seen(3, 1), seen(2, 2)
    unet, side = world[1].unet.module.config, world[1].latent_shape[0]
    masks = halves()
    latents = ours(
        world[2],
        [
            reference_set(
                photos, scale=scales.combine(0.8, scales.regions(mask, unet, (side, side)))
            )
            for photos, mask in zip((one, other), masks, strict=True)
        ],
    )
    both_loaded.set_ip_adapter_scale([0.8, 0.8])
    tensors = [torch.from_numpy(np.float32(mask) / 255)[None, None] for mask in masks]
    expected = diffusers_check.diffusers_latents(
        both_loaded,
        world[1],
        ip_adapter_image_embeds=[plain_embeds(one), set_embeds(other)],
        cross_attention_kwargs={"ip_adapter_masks": tensors},
    )
    assert diffusers_check.apart(latents, expected) < 1e-3
    everywhere = ours(world[2], [reference_set(one, scale=0.8), reference_set(other, scale=0.8)])
    assert diffusers_check.apart(everywhere, expected) > 1e-2


def test_regions_share_out_the_picture_at_every_layer(world):
    unet, side = world[1].unet.module.config, world[1].latent_shape[0]
    left, right = (scales.regions(mask, unet, (side, side)) for mask in halves(50))
    assert list(left) == list(cross_attention_layers(unet))
    sides = [8, 8, 8, 4]  # down 0, up 1 twice, mid
    for layer, length in zip(left, sides, strict=True):
        np.testing.assert_allclose(left[layer] + right[layer], 1.0, atol=1e-6)
        assert left[layer].shape == (1, length**2)


def test_four_people_at_once_are_four_alone(world):
    """Row b of a batch depends on its own references only."""
    loaded, adapters = world[1], world[2]
    sampler = jax.jit(generation.make_latent_sampler(loaded, steps=4))
    frozen = generation.sampler_params(loaded)
    photos = [torch_models.normal(4, 3, DIM, seed=seed) for seed in (1, 2)]
    weights = np.array([[1, 1, 1], [1, 0, 0], [0, 2, 1], [1, 1, 0]], np.float32)
    ids, negative = (np.repeat(loaded.tokenize([t])[0], 4, axis=0) for t in ("a photo", ""))
    request = generation.Request(
        keys=generation.picture_keys(0, 4),
        ids=jnp.asarray(ids),
        negative_ids=jnp.asarray(negative),
        references=tuple(
            generation.References(jnp.asarray(x), jnp.asarray(weights), scale)
            for x, scale in zip(photos, (0.8, jnp.linspace(0.2, 1, 4)[:, None]), strict=True)
        ),
        guidance=3.0,
    )
    together = sampler(frozen, tuple(adapters), request)
    for i in range(4):
        alone = sampler(frozen, tuple(adapters), generation.some_of(request, np.array([i])))
        assert torch_models.relative(alone[0], together[i]) < 1e-5
    assert torch_models.relative(together[0], together[1]) > 0.05


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("much", "neither a number nor JSON"),
        ("[1]", "a number from -1000 to 1000, or blocks"),
        ("NaN", "a number from -1000 to 1000, or blocks"),
        ('{"side": 1}', "no 'side'"),
        ('{"up": {"block_9": 1}}', "up has no 'block_9'"),
        ('{"up": {"block_1": [1, 2, 3, 4, 5]}}', "one number, or 2"),
        ('{"mid": "x"}', 'mid : \\["x"\\]|mid'),
    ],
)
def test_invalid_scales(world, text, words):
    with pytest.raises(UserError, match=words):
        scales.read_scale(text, world[1].unet.module.config)
