"""The code in exported READMEs, run as printed: stock diffusers generates the same pictures."""

import re
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from diffusers import StableDiffusionPipeline
from PIL import Image
from world import adapter_config, config_of, portrait, write_adapter

from persona_jax import export
from persona_jax.data import images, photo_decoding
from persona_jax.methods import finetuning, finetuning_loop
from persona_jax.pipelines import generation
from persona_jax.runs import diffusers_check, finished_run
from persona_jax.runtime.command_line import run_with_arguments


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with an image encoder, one without, and photos of phones (rotated by EXIF)."""
    root = tmp_path_factory.mktemp("world")
    torch_models.write_pipeline(root / "base")
    shutil.copytree(root / "base", root / "bare")
    for part in ("image_encoder", "feature_extractor"):
        shutil.rmtree(root / "bare" / part)
    (root / "photos").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6  # rotated by EXIF
    portrait(0, 0, 60).resize((80, 60)).save(root / "photos/turned.jpg", exif=turned)
    portrait(0, 1, 60).resize((97, 61)).save(root / "photos/landscape.png")
    portrait(0, 2, 60).resize((53, 90)).save(root / "photos/portrait.png")
    return root


PHOTOS = ("turned.jpg", "landscape.png", "portrait.png")
CASES = [
    # kind, base, guidance, crop
    ("self_attention", "base", 3.0, 0.6),
    ("avg", "bare", 1.0, 1.0),
    ("resampler", "base", 1.0, 0.6),
    ("plus", "bare", 3.0, 0.6),
]


@pytest.mark.parametrize(("kind", "base", "guidance", "crop"), CASES)
def test_the_readme_of_an_adapter_runs(world, tmp_path, monkeypatch, kind, base, guidance, crop):
    like = {"self_attention": "sa", "plus": "ip"}.get(kind, kind)
    config = adapter_config(like, world, tmp_path / "data", world / base)
    config.aggregator.update({"kind": kind, "pooling_heads": 3})
    config.data.crop, config.sampling.guidance, config.sampling.scale = crop, guidance, 0.7
    if base == "bare":
        config.image_encoder.path = str(world / "base/image_encoder")
    write_adapter(config, tmp_path / "run")
    export_(tmp_path, "--format", "ip-adapter")

    run = finished_run.open_run(tmp_path / "run")
    photos = [world / "photos" / name for name in PHOTOS]
    seen = run.encoder.encode([photo_decoding.load_photo(photo) for photo in photos])
    references = generation.References(jnp.asarray(seen)[None], jnp.ones((1, 3)), 0.7)
    expected = sampled_here(run, [run.adapter], (references,), {})
    generated = run_readme(tmp_path, monkeypatch, run, PHOTOS=[str(photo) for photo in photos])
    assert np.abs(generated - expected).max() <= 1
    # the photos change the picture
    assert np.abs(sampled_here(run, [], (), {}) - expected).max() > 3


@pytest.mark.parametrize(
    ("method", "form"), [("lora", "lora"), ("lora", "diffusers"), ("dreambooth", "diffusers")]
)
def test_the_readme_of_a_person_runs(world, tmp_path, monkeypatch, method, form):
    from test_export import write_person

    config = config_of(method, "lfw")
    config.pipeline, config.sampling.steps = str(world / "base"), 2
    if method == "lora":
        config.lora.alpha = 16.0
    write_person(config, tmp_path / "run")
    export_(tmp_path, "--format", form, "--person", "ann")
    run = finished_run.open_run(tmp_path / "run")
    towers = finetuning_loop.load_person(tmp_path / "run", "ann", run.pipeline, run.config)
    expected = sampled_here(run, [], (), {name: towers[name] for name in finetuning.TOWERS})
    assert np.abs(run_readme(tmp_path, monkeypatch, run) - expected).max() <= 1


def export_(folder, *flags: str) -> None:
    argv = ["export", "--workdir", str(folder / "run"), "--out", str(folder / "out"), *flags]
    run_with_arguments(export.parser(), export.main, argv)


def sampled_here(run, adapters, references, towers) -> np.ndarray:
    settings = run.sampling_settings()
    sampler = generation.make_sampler(run.pipeline, steps=settings.steps)
    ids, negative = (
        jnp.asarray(run.pipeline.tokenize([text])[0])
        for text in (run.prompt("a photo of a person"), "")
    )
    request = generation.Request(
        keys=generation.picture_keys(0, 1),
        ids=ids,
        negative_ids=negative,
        references=references,
        guidance=settings.guidance,
        eta=settings.eta,
        noise=jnp.asarray(diffusers_check.noise_for(run.pipeline)),
    )
    frozen = generation.sampler_params(run.pipeline) | towers
    return images.to_uint8(np.asarray(sampler(frozen, tuple(adapters), request)))[0].astype(int)


def run_readme(folder, monkeypatch, run, **changes) -> np.ndarray:
    """Runs the README's code with given noise; returns its picture.

    Args:
      changes: values to replace in lines ``NAME = value``.
    """
    (code,) = re.findall("```python\n(.*?)```", (folder / "out/README.md").read_text(), re.DOTALL)
    for name, value in changes.items():
        code, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", code, flags=re.MULTILINE)
        assert count == 1
    noise = diffusers_check.noise_for(run.pipeline).transpose(0, 3, 1, 2)
    call = StableDiffusionPipeline.__call__

    def with_noise(self, *args, **settings):
        latents = torch.from_numpy(np.ascontiguousarray(noise))
        return call(self, *args, latents=latents, **settings)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", with_noise)
    monkeypatch.chdir(folder / "out")
    monkeypatch.syspath_prepend(str(folder / "out"))
    sys.modules.pop("aggregator", None)
    exec(compile(code, "README.md", "exec"), {})
    return np.asarray(Image.open("out.png"), int)
