"""The sampler compared with stock StableDiffusionPipeline; the effect of a request's settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models

from persona_jax.diffusion.ddim import picture_noise
from persona_jax.models import adapter
from persona_jax.models.aggregators import Aggregator
from persona_jax.models.attention import Source
from persona_jax.models.unet import cross_attention_layers, text_kernels
from persona_jax.pipelines import generation, pipeline
from persona_jax.runtime.mesh import make_mesh

STEPS, SIDE, B = 10, 16, 2
PROMPTS = ["a photo of a smiling woman", "an angry man"]
NEGATIVE = ["a portrait", ""]
AVERAGE = Aggregator("avg")
DIM = torch_models.TINY_VISION["projection_dim"]


ONE = make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    torch_models.write_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return pipeline.load(str(folder))


@pytest.fixture(scope="module")
def frozen(loaded):
    return generation.sampler_params(loaded)


@pytest.fixture(scope="module")
def learnt(loaded):
    unet = loaded.unet
    kernels = text_kernels(unet.params, unet.module.config)
    params = adapter.init(jax.random.key(5), AVERAGE, DIM, 16, kernels)
    # As after training: biases are not zero, and W'_k and W'_v differ from the text's.
    keys = iter(jax.random.split(jax.random.key(6), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params)
    return adapter.Adapter(AVERAGE, params)


@pytest.fixture(scope="module")
def sampler(loaded):
    """One sampler for all tests, so that each kind of request is compiled once."""
    return generation.make_sampler(loaded, steps=STEPS)


def ids(loaded, prompts) -> jax.Array:
    return jnp.asarray(loaded.tokenize(prompts)[0])


def request(
    loaded, prompts=PROMPTS, negative=NEGATIVE, seed=0, first=0, **more
) -> generation.Request:
    return generation.Request(
        keys=generation.picture_keys(seed, len(prompts), first),
        ids=ids(loaded, prompts),
        negative_ids=ids(loaded, negative),
        **more,
    )


def references(scale=1.0, weights=((1, 1, 0), (1, 2, 1)), seed=1) -> generation.References:
    embeddings = jax.random.normal(jax.random.key(seed), (B, 3, DIM))
    return generation.References(embeddings, jnp.array(weights, jnp.float32), scale)


def stock_images(folder, noise, guidance, output_type, prompts=PROMPTS, **more) -> torch.Tensor:
    return torch_models.open_diffusers(folder)(
        prompts,
        negative_prompt=NEGATIVE,
        latents=torch_models.nchw(noise),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        height=SIDE,
        width=SIDE,
        output_type=output_type,
        **more,
    ).images


def test_guided_ddim_is_stocks(folder, loaded, frozen):
    """Compares 10 steps from the same noise."""
    noise = jnp.asarray(torch_models.normal(B, 8, 8, 4))
    latent_sampler = jax.jit(generation.make_latent_sampler(loaded, steps=STEPS))

    def latents(prompts=PROMPTS, guidance=7.5):
        return latent_sampler(frozen, (), request(loaded, prompts, guidance=guidance, noise=noise))

    ours = latents()
    assert (
        torch_models.relative(ours, torch_models.nhwc(stock_images(folder, noise, 7.5, "latent")))
        < 1e-3
    )
    # The comparison is meaningful: guidance and prompts change the pictures of these weights.
    assert torch_models.relative(latents(guidance=1.0), ours) > 0.05
    assert torch_models.relative(latents(PROMPTS[::-1]), ours) > 0.05


def test_v_prediction_is_stocks(tmp_path):
    torch_models.write_pipeline(tmp_path, prediction="v_prediction", clip=False)
    towers = [tower for tower in pipeline.TOWERS if tower != "image_encoder"]
    loaded = pipeline.load(str(tmp_path), only=towers)
    noise = jnp.asarray(torch_models.normal(B, 8, 8, 4))
    sampler = jax.jit(generation.make_latent_sampler(loaded, steps=STEPS))
    latents = sampler(
        generation.sampler_params(loaded), (), request(loaded, guidance=3.0, noise=noise)
    )
    expected = stock_images(tmp_path, noise, 3.0, "latent")
    assert torch_models.relative(latents, torch_models.nhwc(expected)) < 1e-3


def stock_adapter(params, loaded) -> dict:
    """Returns the adapter as a state dict in IP-Adapter's published layout."""
    layers = cross_attention_layers(loaded.unet.module.config)

    def to_torch(x) -> torch.Tensor:
        return torch.tensor(np.array(x))

    projection = params["image_proj"]
    return {
        "image_proj": {
            "proj.weight": to_torch(projection["proj"]["kernel"]).T.contiguous(),
            "proj.bias": to_torch(projection["proj"]["bias"]),
            "norm.weight": to_torch(projection["norm"]["scale"]),
            "norm.bias": to_torch(projection["norm"]["bias"]),
        },
        "ip_adapter": {
            f"{2 * i + 1}.to_{kind}_ip.weight": to_torch(
                params["ip_adapter"][layer][f"to_{kind}"]["kernel"]
            ).T.contiguous()
            for i, layer in enumerate(layers)
            for kind in "kv"
        },
    }


def test_sampling_with_an_adapter_is_stock_ip_adapter(folder, loaded, frozen, learnt, sampler):
    """Stock gets the pooled set as ``ip_adapter_image_embeds``, zeros as unconditional half."""
    noise = jnp.asarray(torch_models.normal(B, 8, 8, 4))
    wanted = references(scale=0.7)
    pipe = torch_models.open_diffusers(folder)
    state = stock_adapter(learnt.params, loaded)
    pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)
    weights = np.array([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]])
    pooled = torch.tensor(np.einsum("bn,bnd->bd", weights, wanted.embeddings)).float()

    def stock_picture(i: int) -> np.ndarray:
        """Returns one picture: stock gives all pictures of a call the same person."""
        return pipe(
            PROMPTS[i],
            negative_prompt=NEGATIVE[i],
            latents=torch_models.nchw(noise[i : i + 1]),
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            height=SIDE,
            width=SIDE,
            output_type="np",
            ip_adapter_image_embeds=[torch.stack([torch.zeros(DIM), pooled[i]])[:, None]],
        ).images[0]

    expected = np.stack([stock_picture(i) for i in range(B)])

    def pictures(wanted):
        asked = request(loaded, guidance=4.0, noise=noise, references=(wanted,))
        return sampler(frozen, (learnt,), asked)

    assert torch_models.relative(pictures(wanted), 2 * expected - 1) < 1e-3
    without = stock_images(folder, noise, 4.0, "np")
    assert torch_models.relative(expected, without) > 0.02
    # λ = 0 equals no adapter; all weights 0 give the zero embedding, which does not.
    assert torch_models.relative(pictures(references(scale=0.0)), 2 * without - 1) < 1e-3
    empty = pictures(references(0.7, weights=((0, 0, 0), (0, 0, 0))))
    zeros = generation.References(jnp.zeros((B, 3, DIM)), jnp.ones((B, 3)), 0.7)
    np.testing.assert_array_equal(empty, pictures(zeros))
    assert torch_models.relative(empty, 2 * without - 1) > 1e-3


def test_one_program_for_all_that_may_change(loaded, frozen, learnt, sampler):
    """Prompts, seeds, guidance, η, λ, photos and weights each change the pictures."""
    before = sampler._cache_size()

    def pictures(prompts=PROMPTS, negative=NEGATIVE, seed=0, guidance=5.0, eta=0.0, **photos):
        return sampler(
            frozen,
            (learnt,),
            request(
                loaded,
                prompts,
                negative,
                seed,
                guidance=guidance,
                eta=eta,
                references=(references(**photos),),
            ),
        )

    first = pictures()
    for change in (
        {"prompts": ["a man", "a woman"]},
        {"negative": ["smiling", "angry"]},
        {"seed": 1},
        {"guidance": 2.0},
        {"eta": 1.0},
        {"scale": 0.3},
        {"weights": ((0, 1, 1), (3, 0, 0))},
        {"seed": 2, "weights": ((0, 0, 0), (0, 0, 0))},
    ):
        assert torch_models.relative(pictures(**change), first) > 1e-4, change
    np.testing.assert_array_equal(pictures(), first)
    assert sampler._cache_size() == before + 1


def test_a_picture_depends_on_its_key_alone(loaded, frozen, learnt, sampler):
    """Picture i does not depend on the number of pictures, or on being generated alone."""
    embeddings = references().embeddings[:1]

    def pictures(count, first=0):
        prompts, negative = [PROMPTS[0]] * count, [""] * count
        same = generation.References(jnp.repeat(embeddings, count, axis=0), jnp.ones((count, 3)))
        asked = request(loaded, prompts, negative, 3, first, eta=0.5, references=(same,))
        return sampler(frozen, (learnt,), asked)

    two = pictures(2)
    np.testing.assert_array_equal(pictures(2), two)
    # The noise is equal bit for bit. Results computed from it may round differently in another row
    # of the batch, as matrix products of some processors do.
    keys, later = generation.picture_keys(3, 2), generation.picture_keys(3, 2, 1)
    for step in range(3):
        drawn, again = (picture_noise(k, step, loaded.latent_shape) for k in (keys, later))
        np.testing.assert_array_equal(again[0], drawn[1])
    np.testing.assert_allclose(pictures(2, first=1)[0], two[1], atol=1e-5)
    assert torch_models.relative(two[1], two[0]) > 0.05
    np.testing.assert_allclose(pictures(1)[0], two[0], atol=1e-4)


def test_scale_may_differ_by_picture_and_by_layer(loaded, frozen, learnt):
    """λ applies to both halves of guidance; test_adapter checks its effect on attention."""
    layers = cross_attention_layers(loaded.unet.module.config)
    latent_sampler = generation.make_latent_sampler(loaded, steps=STEPS)
    for scale in (jnp.ones((B, 1)), dict.fromkeys(layers, 0.5), dict.fromkeys(layers, jnp.ones(1))):
        asked = request(loaded, references=(references(scale),))
        assert jax.eval_shape(latent_sampler, frozen, (learnt,), asked).shape == (B, 8, 8, 4)
    halves = generation.for_both_halves(jnp.array([[0.0], [0.8]]))
    assert halves[:, 0].tolist() == pytest.approx([0.0, 0.8, 0.0, 0.8])
    assert generation.for_both_halves(jnp.ones((1, 4))).shape == (1, 4)
    assert generation.for_both_halves(0.5) == 0.5


def test_text_source_is_what_the_unet_attends_to(loaded, frozen):
    unet = loaded.unet
    kernels = text_kernels(unet.params, unet.module.config)
    source = generation.text_source(
        loaded.text_encoder.module, frozen["text_encoder"], kernels, ids(loaded, PROMPTS)
    )
    assert isinstance(source, Source)
    assert set(source.keys) == set(cross_attention_layers(unet.module.config))
    assert {value.shape[:2] for value in source.values.values()} == {(B, 16)}


@pytest.mark.parametrize("scale", ["one", "each", "masks", "one mask"])
def test_pictures_are_shared_out_among_devices(loaded, frozen, learnt, scale):
    """Each device generates its part of the pictures, equal to those of one device."""
    count, side = 4, loaded.latent_shape[0]
    draw = jax.random.uniform(jax.random.key(8), (count, side * side))
    layers = cross_attention_layers(loaded.unet.module.config)
    reference_set = generation.References(
        jax.random.normal(jax.random.key(7), (count, 3, DIM)),
        jnp.ones((count, 3)),
        {
            "one": 0.5,
            "each": draw[:, :1],
            "masks": dict.fromkeys(layers, draw[:, :1]),
            "one mask": dict.fromkeys(layers, draw[:1, :1]),
        }[scale],
        window=(0.0, 0.7),
    )
    noise = jax.random.normal(jax.random.key(9), (count, *loaded.latent_shape))
    asked = request(
        loaded, PROMPTS * 2, NEGATIVE * 2, references=(reference_set,), eta=0.5, noise=noise
    )
    alone = jax.jit(
        generation.split_among_devices(generation.make_latent_sampler(loaded, steps=STEPS), ONE)
    )
    all_ = jax.jit(
        generation.split_among_devices(generation.make_latent_sampler(loaded, steps=STEPS))
    )
    expected, split = (sampler(frozen, (learnt,), asked) for sampler in (alone, all_))
    assert len(expected.sharding.device_set) == 1
    assert len(split.sharding.device_set) == count
    assert torch_models.relative(split, np.asarray(expected)) < 1e-4


def test_a_subset_of_a_requests_pictures(loaded):
    reference_set = generation.References(
        jnp.zeros((4, 3, DIM)), jnp.ones((4, 3)), {"a": jnp.zeros((1, 4)), "b": jnp.zeros((4, 4))}
    )
    asked = request(loaded, PROMPTS * 2, NEGATIVE * 2, references=(reference_set,))
    some = generation.some_of(asked, np.array([3, 0]))
    assert len(some.keys) == len(some.ids) == len(some.references[0].embeddings) == 2
    assert some.references[0].scale["a"].shape == (1, 4)
    assert some.references[0].scale["b"].shape == (2, 4)
    assert some.guidance == asked.guidance
