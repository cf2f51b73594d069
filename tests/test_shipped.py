"""The shipped base: small, described, and usable by stock diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from safetensors.numpy import load_file
from world import config_of

from persona_jax.base.ship import MOST_BYTES
from persona_jax.errors import UserError
from persona_jax.evaluation import trait_classifier
from persona_jax.interop import folders
from persona_jax.methods import adapter_training
from persona_jax.models.adapter import Adapter
from persona_jax.models.aggregators import Aggregator
from persona_jax.pipelines import generation, pipeline

TINY = folders.SHIPPED["tiny"]
PROMPT = "a photo of a smiling person wearing a red hat on a green background"
STEPS, GUIDANCE = 10, 3.0


@pytest.fixture(scope="module")
def shipped():
    return pipeline.load("tiny", dtype=jnp.float32, param_dtype=jnp.float32)


@pytest.fixture(scope="module")
def noise():
    return torch_models.normal(1, 16, 16, 8)


def ours(parts, noise, adapters=(), references=()) -> jax.Array:
    request = generation.Request(
        keys=generation.picture_keys(0, 1),
        ids=jnp.asarray(parts.tokenize([PROMPT])[0]),
        negative_ids=jnp.asarray(parts.tokenize([""])[0]),
        references=references,
        guidance=GUIDANCE,
        noise=jnp.asarray(noise),
    )
    sampler = generation.make_sampler(parts, steps=STEPS)
    return sampler(generation.sampler_params(parts), adapters, request)


def theirs(noise, embedding=None) -> np.ndarray:
    """Returns stock diffusers' picture in [−1, 1]; an adapter is loaded by its own loader."""
    pipe = torch_models.open_diffusers(TINY / "pipeline")
    more = {}
    if embedding is not None:
        pipe.load_ip_adapter(
            str(TINY), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None
        )
        assert isinstance(pipe.unet.encoder_hid_proj, MultiIPAdapterImageProjection)
        both = np.stack([np.zeros_like(embedding), embedding])
        more["ip_adapter_image_embeds"] = [torch_models.torch.from_numpy(both[:, None])]
    images = pipe(
        PROMPT,
        latents=torch_models.nchw(noise),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=64,
        width=64,
        output_type="np",
        **more,
    ).images
    return 2 * images - 1


def test_it_is_small():
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert 10_000_000 < sum(path.stat().st_size for path in files) <= MOST_BYTES


def test_it_is_described():
    card = (TINY / "README.md").read_text()
    for word in ("license", "PSNR", "retrieval", "AUC", "minutes"):
        assert word in card


def test_stock_diffusers_generates_the_same_picture(shipped, noise):
    assert torch_models.relative(ours(shipped, noise), theirs(noise)) < 2e-3


def test_stock_diffusers_reads_its_adapter(shipped, noise):
    embedding = torch_models.normal(1, 256)
    config = config_of("ip")
    params = adapter_training.init_adapter(config, shipped, 256)
    references = generation.References(jnp.asarray(embedding)[:, None], jnp.ones((1, 1)))
    learnt = Adapter(Aggregator("first"), params)
    sampled = ours(shipped, noise, (learnt,), (references,))
    assert torch_models.relative(sampled, theirs(noise, embedding)) < 2e-3
    assert torch_models.relative(sampled, ours(shipped, noise)) > 0.05


@pytest.mark.parametrize("name", ["ip", "max", "avg", "sa"])
def test_every_method_starts_from_it_by_default(shipped, name):
    config = config_of(name)
    assert (config.preset, config.pipeline, config.init_from) == ("tiny", "tiny", "tiny")
    params = adapter_training.init_adapter(config, shipped, 256)
    assert bool(params["aggregator"]) == (name == "sa")
    bias = load_file(TINY / "ip_adapter.safetensors")["image_proj.norm.bias"]
    np.testing.assert_array_equal(params["image_proj"]["norm"]["bias"], bias)


def test_its_adapter_is_refused_on_another_pipeline(shipped):
    config = config_of("sa", "tiny")
    config.update({"init_from": "tiny", "pipeline": "bases/mine/pipeline"})
    with pytest.raises(UserError, match="init_from=tiny: its adapter is for the shipped"):
        adapter_training.init_adapter(config, shipped, 256)


def test_its_trait_classifier_reads_every_trait():
    classifier = trait_classifier.load_trait_classifier(TINY / "reader")
    assert classifier.size == 64
    assert classifier.spread.max() < 0.29
