"""The Python API on a random base: inputs, outputs and errors."""

import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from PIL import Image
from world import adapter_config, config_of, shaken, write_adapter, write_people

import persona_jax as pj
from persona_jax import export, sample
from persona_jax.api.pipeline import Options
from persona_jax.data import images as pictures
from persona_jax.data import photo_decoding
from persona_jax.interop import tensors
from persona_jax.methods import finetuning, finetuning_loop
from persona_jax.models import lora
from persona_jax.pipelines import generation
from persona_jax.pipelines.pipeline import open_pipeline
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.run_folder import write_run_files

PROMPT = "a photo of a smiling woman"
FEW = {"steps": 2, "guidance": 2.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """People, a random base, runs of an adapter and of one person, an exported folder, a LoRA."""
    root = tmp_path_factory.mktemp("world")
    write_people(root / "people", people=2, photos=3)
    torch_models.write_pipeline(root / "base")
    config = adapter_config("sa", root / "people", root / "data", root / "base")
    config.aggregator.pooling_heads = 3
    write_adapter(config, root / "sa")
    argv = ["export", "--workdir", root / "sa", "--out", root / "out", "--format", "ip-adapter"]
    run_with_arguments(export.parser(), export.main, list(map(str, argv)))
    personal = config_of("lora", "lfw")
    personal.pipeline = str(root / "base")
    parts = open_pipeline(personal)
    learnt = finetuning.init(personal, parts, jax.random.split(jax.random.key(0), 1))
    write_run_files(root / "lora", personal)
    learnt = shaken(jax.tree.map(lambda x: x[0], learnt), 0)
    finetuning_loop.save_person(root / "lora", "ann", learnt, parts, personal)
    update = shaken(lora.init(jax.random.key(0), parts.unet.params, 2), 0)
    tensors.save_tree({"unet": update}, root / "style.safetensors")
    return root


@pytest.fixture(scope="module")
def pipe(world):
    return pj.load_pipeline(str(world / "base"))


@pytest.fixture(scope="module")
def adapter(world, pipe):
    return pj.load_adapter(world / "sa", pipe)


def photos(world, person: int = 0, count: int = 2) -> list:
    return [world / f"people/person_{person}/{i}.png" for i in range(count)]


def apart(some, others) -> int:
    """Returns the largest difference of images, of 255."""
    pairs = zip(some, others, strict=True)
    return max(int(abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in pairs)


def test_five_lines(world, pipe, adapter, tmp_path):
    images = pipe(PROMPT, photos=photos(world), adapter=adapter, num=4, seed=0, **FEW)
    images[0].save(tmp_path / "out.png")
    assert [image.size for image in images] == [(16, 16)] * 4
    assert [len(own) for own in images.references] == [2]
    assert images.grid().size[1] > 2 * 16
    images.save(tmp_path / "all")
    assert apart([Image.open(tmp_path / "all/0003.png")], images[3:]) == 0
    attribution = images.attribution()
    assert attribution.shares.sum() == pytest.approx(1, abs=1e-5)
    assert (attribution.influence > 0).all()
    assert images.attribution() is attribution


def test_the_images_are_those_of_the_sampler_and_of_the_command(world, pipe, adapter, tmp_path):
    """One seed gives the same images by the sampler, the API and the command."""
    files = photos(world)
    sampler = generation.make_sampler(pipe.parts, steps=2)
    seen = adapter.encoder.encode([Image.open(file).convert("RGB") for file in files])
    ids, negative = (pipe.parts.tokenize([text])[0] for text in (PROMPT, ""))
    request = generation.Request(
        keys=generation.picture_keys(3, 2),
        ids=jnp.repeat(jnp.asarray(ids), 2, axis=0),
        negative_ids=jnp.repeat(jnp.asarray(negative), 2, axis=0),
        references=(
            generation.References(
                jnp.repeat(jnp.asarray(seen)[None], 2, axis=0), jnp.ones((2, 2)), 1.0
            ),
        ),
        guidance=2.0,
    )
    pixels = sampler(generation.sampler_params(pipe.parts), (adapter.model,), request)
    by_hand = pictures.to_uint8(np.asarray(pixels))
    called = pipe(PROMPT, photos=files, adapter=adapter, num=2, seed=3, **FEW)
    assert apart(by_hand, called) <= 1
    argv = ["sample", "--workdir", world / "sa", "--photos", *files, "--prompt", PROMPT]
    argv += ["--num", 2, "--seed", 3, "--steps", 2, "--guidance", 2, "--out", tmp_path / "out"]
    run_with_arguments(sample.parser(), sample.main, list(map(str, argv)))
    assert apart([Image.open(tmp_path / f"out/000{i}.png") for i in range(2)], called) == 0


def test_photos_in_any_form(world, pipe, adapter):
    files = photos(world)
    opened = [Image.open(file) for file in files]
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    floats = [(x / 255).astype(np.float32) for x in arrays]
    known = pipe(PROMPT, photos=files, adapter=adapter, **FEW)
    for form in (opened, arrays, floats, [str(files[0]), opened[1]]):
        assert apart(pipe(PROMPT, photos=form, adapter=adapter, **FEW), known) == 0
    turned = opened[0].transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a turn by 270 degrees
    turned.getexif().update(exif)
    again = pipe(PROMPT, photos=[turned, opened[1]], adapter=adapter, **FEW)
    assert apart(again, known) == 0


@pytest.mark.parametrize(
    ("photo", "words"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"photo 1: .*shape \(4, 4, 2\)"),
        (np.zeros((4, 4, 3), np.int32), "photo 1: .*int32"),
        (np.full((4, 4), 2.0), "photo 1: .*beyond 0 to 1"),
        (np.full((4, 4), np.nan), "photo 1: .*beyond 0 to 1"),
        (np.zeros((0, 4, 3), np.uint8), "without pixels"),
        ("nowhere.png", "nowhere.png"),
    ],
)
def test_invalid_photos(pipe, adapter, photo, words):
    with pytest.raises(pj.UserError, match=words):
        pipe(PROMPT, photos=[photo], adapter=adapter)


def test_several_people_each_with_their_own(world, pipe, adapter):
    left = np.zeros((32, 32), np.uint8)
    left[:, :16] = 255
    sets = [
        pj.ReferenceSet(photos(world, 0), mask=left, scale={"mid": 1.0, "up": 0.5}),
        pj.ReferenceSet(photos(world, 1), [1, 2], mask=255 - left, window=(0.0, 0.5)),
    ]
    both = pipe(PROMPT, references=sets, adapter=adapter, **FEW)
    each = pipe(PROMPT, references=sets, adapter=[adapter, adapter], **FEW)
    assert apart(both, each) == 0
    assert [len(own) for own in both.references] == [2, 2]
    swapped = pipe(PROMPT, references=sets[::-1], adapter=adapter, **FEW)
    assert apart(both, swapped) <= 1
    other = [pj.ReferenceSet(photos(world, 0), mask=255 - left), sets[1]]
    assert apart(both, pipe(PROMPT, references=other, adapter=adapter, **FEW)) > 2


def test_arguments_for_one_person_are_those_of_a_set(world, pipe, adapter):
    settings = {"weights": [1, 0.5], "scale": 0.7, "window": (0.0, 0.6)}
    one = pipe(
        PROMPT,
        photos=photos(world),
        adapter=adapter,
        negative_photos=photos(world, 1, 1),
        **settings,
        **FEW,
    )
    same = pj.ReferenceSet(photos(world), negative=photos(world, 1, 1), **settings)
    assert apart(one, pipe(PROMPT, references=[same], adapter=adapter, **FEW)) == 0
    assert apart(one, pipe(PROMPT, photos=photos(world), adapter=adapter, **FEW)) > 2


def test_an_exported_folder_is_the_run(world, pipe, adapter):
    exported = pj.load_adapter(world / "out", pipe, crop=adapter.crop)
    assert exported.kind == adapter.kind == "self_attention"
    one, other = (
        pipe(PROMPT, photos=photos(world), adapter=x, scale=1.0, eta=0.0, **FEW)
        for x in (adapter, exported)
    )
    assert apart(one, other) <= 1


def test_loras_and_people(world, pipe):
    plain, file = pipe(PROMPT, **FEW), world / "style.safetensors"
    assert apart(plain, pipe(PROMPT, loras=[file], **FEW)) > 2
    assert apart(plain, pipe(PROMPT, loras=[(file, 0.0)], **FEW)) == 0
    ann = pj.load_person(world / "lora", "ann", pipe)
    images = pipe(PROMPT, person=ann, **FEW)
    assert images.prompts == ["a photo of a smiling sks woman"]
    assert apart(plain, images) > 2
    with pytest.raises(pj.UserError, match="cannot be combined"):
        pipe(PROMPT, person=ann, loras=[file])


def test_progress_changes_nothing_and_can_stop(world, pipe, adapter):
    seen = []
    settings = {"photos": photos(world), "adapter": adapter, "num": 3, "batch_size": 2, "eta": 0.5}
    images = pipe(PROMPT, callback=seen.append, **settings, **FEW)
    assert apart(images, pipe(PROMPT, **settings, **FEW)) <= 1
    assert [(x.step, x.first, x.last) for x in seen] == [(1, 0, 2), (2, 0, 2), (1, 2, 3), (2, 2, 3)]
    assert [x.fraction for x in seen] == pytest.approx([1 / 3, 2 / 3, 5 / 6, 1])
    assert apart(pipe.decode(seen[-1].latents), images[2:]) <= 1

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, callback=stop, **settings, **FEW)


def test_latents_in_and_out(world, pipe):
    """Given noise of two seeds equals one call; the decoded latents are the call's images."""
    noise = np.random.default_rng(0).standard_normal((2, *pipe.parts.latent_shape), np.float32)
    images = pipe(PROMPT, latents=noise, num=2, **FEW)
    second = pipe(PROMPT, latents=noise[1:], **FEW)
    assert apart(images[1:], second) <= 1
    latents = pipe.generate_latents(PROMPT, latents=noise, num=2, **FEW)
    assert latents.shape == noise.shape
    assert apart(pipe.decode(latents), images) <= 1
    with pytest.raises(pj.UserError, match="latents: 2 for 1 images"):
        pipe(PROMPT, latents=noise)


def test_height_and_width_are_those_of_diffusers(world, pipe):
    """Latents equal those of stock diffusers from the same noise, in a portrait format."""
    noise = np.random.default_rng(0).standard_normal((1, 12, 8, 4), np.float32)
    ours = pipe.generate_latents(PROMPT, latents=noise, height=24, steps=4, guidance=3.0)
    theirs = torch_models.open_diffusers(world / "base")(
        PROMPT,
        height=24,
        width=16,
        latents=torch_models.nchw(noise),
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    assert torch_models.relative(ours, torch_models.nhwc(torch.as_tensor(theirs))) < 1e-4
    mask = np.zeros((24, 16), np.uint8)
    (image,) = pipe(PROMPT, height=24, width=32, **FEW)
    assert image.size == (32, 24)
    adapter = pj.load_adapter(world / "sa", pipe)
    plain, masked = (
        pipe(PROMPT, photos=photos(world), adapter=adapter, mask=x, height=24, width=16, **FEW)
        for x in (mask + 255, mask)
    )
    assert plain[0].size == (16, 24)
    assert apart(plain, masked) > 2


def test_a_prompt_for_each_image(pipe):
    prompts = [PROMPT, "a portrait of an angry man"]
    images = pipe(prompts, seed=1, **FEW)
    assert apart(images[:1], pipe(PROMPT, seed=1, **FEW)) <= 1
    assert apart(images, pipe(prompts[0], num=2, seed=1, **FEW)) > 0
    with pytest.warns(UserWarning, match="cut to 16"):
        pipe(PROMPT + " and" * 20, **FEW)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num": 0}, "num 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"steps": 0}, "steps 0"),
        ({"height": 17}, "height 17: expected a multiple of 4"),
        ({"photos": ["a.png"]}, "adapter: none"),
        ({"photos": []}, "photos: none"),
        ({"weights": [1]}, "go with photos"),
        ({"photos": "a.png"}, "give a list"),
        ({"photos": ["a.png"], "weights": [1, 2]}, "weights: 2 of them for 1 photos"),
        ({"photos": ["a.png"], "weights": [-1]}, "weights: each must be"),
        ({"photos": ["a.png"], "window": (0.5, 0.2)}, "window 0.5 0.2"),
        ({"latents": np.zeros((1, 8, 8, 3))}, "latents: .*expected"),
        ({"latents": np.zeros((1, 8, 8, 4)), "width": 32}, "width 32: the latents are of 16"),
        ({"loras": ["nowhere.safetensors"]}, "nowhere.safetensors: no such file"),
    ],
)
def test_invalid_arguments(pipe, arguments, words):
    with pytest.raises(pj.UserError, match=words) as error:
        pipe(PROMPT, **arguments)
    assert "--" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("wrong", ["nowhere", "a person's run", "no person", "nobody"])
def test_missing_runs_and_people(world, pipe, wrong):
    opened = {
        "nowhere": (lambda: pj.load_adapter("nowhere", pipe), "no such adapter"),
        "a person's run": (lambda: pj.load_adapter(world / "lora", pipe), "with load_person"),
        "no person": (lambda: pj.load_person(world / "sa", "ann", pipe), "with load_adapter"),
        "nobody": (lambda: pj.load_person(world / "lora", "bob", pipe), "there are: ann"),
    }
    call, words = opened[wrong]
    with pytest.raises(pj.UserError, match=words):
        call()


def test_each_photo_is_decoded_once(world, pipe, adapter, monkeypatch):
    decoded, read = [], photo_decoding.open_photo

    def counted(photo, name):
        decoded.append(name)
        return read(photo, name)

    monkeypatch.setattr(photo_decoding, "open_photo", counted)
    job = pipe.prepare(PROMPT, photos=photos(world), adapter=adapter, **FEW)
    assert decoded == ["photo 1", "photo 2"]
    assert [square.size for square in job.references[0]] == 2 * [job.references[0][0].size]


def test_the_options_are_those_of_prepare():
    parameters = inspect.signature(pj.PersonaPipeline.prepare).parameters
    keywords = {n: p.annotation for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == typing.get_type_hints(Options)
    for method in (pj.PersonaPipeline.__call__, pj.PersonaPipeline.generate_latents):
        assert inspect.signature(method).parameters == parameters
