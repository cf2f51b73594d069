"""Exports, loaded by stock diffusers, generate the pictures that persona_jax generates."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from world import adapter_config, config_of, shaken, write_adapter, write_people

from persona_jax import export, sample
from persona_jax.interop.checkpoints import load_params
from persona_jax.interop.lora_files import FILE
from persona_jax.methods import finetuning, finetuning_loop
from persona_jax.pipelines import generation
from persona_jax.pipelines.pipeline import open_pipeline
from persona_jax.runs import diffusers_check, finished_run
from persona_jax.runtime import checksums
from persona_jax.runtime.command_line import run_with_arguments
from persona_jax.runtime.run_folder import write_run_files


def write_person(config, workdir) -> None:
    """Writes a run of per-person fine-tuning with one finished person, ann."""
    parts = open_pipeline(config)
    (learnt,) = [finetuning.init(config, parts, jax.random.split(jax.random.key(0), 1))]
    write_run_files(workdir, config)
    finetuning_loop.save_person(
        workdir, "ann", shaken(jax.tree.map(lambda x: x[0], learnt), 0), parts, config
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with people, a random base, and a run of every kind."""
    root = tmp_path_factory.mktemp("world")
    write_people(root / "people", people=1)
    torch_models.write_pipeline(root / "base")
    for name in ("ip", "max", "avg", "sa", "resampler", "plus"):
        like = "ip" if name == "plus" else name
        config = adapter_config(like, root / "people", root / "data", root / "base")
        config.aggregator.pooling_heads = 3  # of 12 features
        if name == "plus":
            config.aggregator.kind = "plus"
        write_adapter(config, root / name)
    for name in ("dreambooth", "lora"):
        config = config_of(name, "lfw")
        if name == "lora":
            config.lora.alpha = 16.0  # of rank 4
        config.pipeline = str(root / "base")
        write_person(config, root / name)
    return root


def run_export(world, name: str, out, *flags: str) -> None:
    argv = ["export", "--workdir", str(world / name), "--out", str(out), *flags]
    run_with_arguments(export.parser(), export.main, argv)


@pytest.mark.parametrize("name", ["ip", "max", "avg", "sa"])
def test_an_adapter_generates_the_same_in_stock_diffusers(world, tmp_path, capsys, name):
    photos = [str(world / f"people/person_0/{i}.png") for i in range(3)]
    out = tmp_path / "a" / "out"
    flags = ["--format", "ip-adapter", "--verify", "--bin", "--photos", *photos]
    run_export(world, name, out, *flags)
    assert "verified: latents differ" in capsys.readouterr().out
    files = {"README.md", "aggregator.json", "aggregator.py", "image_embeds.safetensors"}
    files |= {checksums.NAME}
    files |= {"ip_adapter.safetensors", "ip_adapter.bin"}
    assert {p.name for p in out.iterdir()} - {"aggregator.safetensors"} == files
    assert (out / "aggregator.safetensors").exists() == (name == "sa")

    run = finished_run.open_run(world / name)
    assert run.pipeline.unet.hash in (out / "README.md").read_text()
    seen = run.encoder.encode([Image.open(photo) for photo in photos])
    learnt = run.adapter
    image = learnt.aggregator.apply(
        learnt.params["aggregator"], jnp.asarray(seen)[None], jnp.ones((1, 3))
    )
    both = load_file(out / "image_embeds.safetensors")["image_embeds"]
    assert both.shape == (2, 1, run.encoder.dim)
    np.testing.assert_array_equal(both[0], 0)
    np.testing.assert_allclose(both[1], image, rtol=1e-5, atol=1e-6)

    flat = load_file(out / "ip_adapter.safetensors")
    nested = torch.load(out / "ip_adapter.bin", weights_only=True)
    assert {f"{part}.{key}" for part, tensors in nested.items() for key in tensors} == set(flat)
    key = "ip_adapter.1.to_k_ip.weight"
    np.testing.assert_array_equal(nested["ip_adapter"]["1.to_k_ip.weight"], flat[key])


@pytest.mark.parametrize("name", ["resampler", "plus"])
def test_a_resampler_generates_the_same_in_stock_diffusers(world, tmp_path, capsys, name):
    """Checks 1, 3 and 9 references; the unconditional branch depends on their number."""
    photos = [str(world / f"people/person_0/{i}.png") for i in range(3)]
    out = tmp_path / "out"
    run_export(world, name, out, "--format", "ip-adapter", "--verify", "--photos", *photos)
    assert "verified: latents differ" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {
        "README.md", "aggregator.json", "checksums.json", "image_embeds.safetensors",
        "ip_adapter.safetensors",
    }  # fmt: skip
    both = load_file(out / "image_embeds.safetensors")["image_embeds"]
    blank = finished_run.open_run(world / name).adapter.blank
    if name == "plus":
        assert both.shape[:2] == (2, 3)
        np.testing.assert_array_equal(both[0], np.broadcast_to(blank, both[0].shape))
    else:
        assert both.shape[:3] == (2, 1, 3)
        np.testing.assert_array_equal(both[0], 0)


def test_a_plus_file_takes_photos_as_stock_diffusers_does(world, tmp_path):
    """Stock diffusers gets the photos, and no picture for the unconditional branch."""
    run_export(world, "plus", tmp_path / "out", "--format", "ip-adapter", "--bin")
    run = finished_run.open_adapter(tmp_path / "out/ip_adapter.bin", str(world / "base"))
    assert run.adapter.aggregator.kind == "plus"
    photos = [Image.open(world / f"people/person_0/{i}.png") for i in range(2)]
    ours = diffusers_check.our_sampler(run.pipeline)
    references = generation.References(
        jnp.asarray(run.encoder.encode(photos))[None], jnp.ones((1, 2))
    )
    pipe = diffusers_check.open_diffusers(world / "base")
    pipe.load_ip_adapter(
        str(tmp_path / "out"), subfolder="", weight_name="ip_adapter.bin", image_encoder_folder=None
    )
    theirs = diffusers_check.diffusers_latents(pipe, run.pipeline, ip_adapter_image=[photos])
    assert diffusers_check.apart(ours([run.adapter], [references]), theirs) < 1e-3


@pytest.mark.parametrize("name", ["max", "sa", "resampler", "plus"])
def test_an_export_generates_the_same_here(world, tmp_path, name):
    run_export(world, name, tmp_path / "out", "--format", "ip-adapter")
    photos = [str(world / f"people/person_0/{i}.png") for i in range(3)]
    base = ["--pipeline", str(world / "base")]
    for place, flags in (
        ("a", ["--workdir", str(world / name)]),
        ("b", ["--adapter", str(tmp_path / "out"), *base]),
    ):
        argv = ["sample", "--out", str(tmp_path / place), "--photos", *photos, *flags]
        argv += ["--num", "1", "--steps", "2", "--guidance", "3"]
        run_with_arguments(sample.parser(), sample.main, argv)
    one, other = (np.asarray(Image.open(tmp_path / p / "0000.png"), int) for p in "ab")
    assert abs(one - other).max() <= 1


def test_a_bare_file_takes_photos_as_stock_diffusers_does(world, tmp_path):
    """Several photos share one softmax."""
    run_export(world, "ip", tmp_path / "out", "--format", "ip-adapter", "--bin")
    run = finished_run.open_adapter(tmp_path / "out/ip_adapter.bin", str(world / "base"))
    seen = run.encoder.encode([Image.open(world / f"people/person_0/{i}.png") for i in range(3)])
    ours = diffusers_check.our_sampler(run.pipeline)
    references = generation.References(jnp.asarray(seen)[None], jnp.ones((1, 3)))
    pipe = diffusers_check.open_diffusers(world / "base")
    pipe.load_ip_adapter(
        str(tmp_path / "out"), subfolder="", weight_name="ip_adapter.bin", image_encoder_folder=None
    )
    both = torch.from_numpy(np.stack([np.zeros_like(seen), seen]))
    theirs = diffusers_check.diffusers_latents(pipe, run.pipeline, ip_adapter_image_embeds=[both])
    assert diffusers_check.apart(ours([run.adapter], [references]), theirs) < 1e-3


PLAIN = ["--adapter", "{tmp}/out/ip_adapter.safetensors"]
BASE = ["--pipeline", "{world}/base"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter", "a.bin"], "or --pipeline, a base"),
        ([], "give --workdir"),
        (["--adapter", "{world}/people", *BASE], "aggregator.json|no such file"),
        (["--adapter", "{world}/none.bin", *BASE], "no such adapter"),
        (["--adapter", "{tmp}/out", "--pipeline", "tiny"], "image encoder has 256"),
        ([*PLAIN, *BASE, "--weights", "2", "3"], "2 of them for 1 photos"),
        ([*PLAIN, *BASE, "--mask", "a.png", "b.png"], "--mask: 2 of them for 1 --photos"),
        ([*PLAIN, *BASE, "--window", "0.5", "0.2"], "--window 0.5 0.2"),
        ([*PLAIN, *BASE, "--scale", "much"], "neither a number nor JSON"),
        ([*PLAIN, *BASE, "--scale", '{{"up": {{"block_7": 1}}}}'], "up has no 'block_7'"),
        ([*PLAIN, *BASE, "--mask", "{world}/none.png"], "not a readable picture"),
        ([*PLAIN, "{tmp}/out", *BASE], "2 runs and adapters for 1 --photos"),
        ([*PLAIN, *BASE, "--person", "ann"], "--person"),
        ([*PLAIN, *BASE, "--workdir", "{world}/sa"], "--pipeline: only for --adapter"),
        ([*BASE], "give --workdir or --adapter, for the photos"),
        ([*PLAIN, *BASE, "--lora", "{world}/none.safetensors"], "no such file"),
    ],
)
def test_adapters_that_cannot_be_sampled(world, tmp_path, capsys, flags, words):
    run_export(world, "avg", tmp_path / "out", "--format", "ip-adapter")
    photo = str(world / "people/person_0/0.png")
    argv = ["sample", "--out", str(tmp_path / "pictures"), "--photos", photo]
    argv += [flag.format(world=world, tmp=tmp_path) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        run_with_arguments(sample.parser(), sample.main, argv)
    assert stop.value.code == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "pictures").exists()


def test_running_average_or_last_step(world, tmp_path):
    for which in ("ema", "params"):
        out = tmp_path / which
        run_export(world, "avg", out, "--format", "ip-adapter", "--weights", which)
        bias = load_params(world / "avg/checkpoints", which)["image_proj"]["norm"]["bias"]
        written = load_file(out / "ip_adapter.safetensors")["image_proj.norm.bias"]
        np.testing.assert_array_equal(written, bias)
    assert (out / "README.md").exists()


@pytest.mark.parametrize(
    ("name", "form"), [("dreambooth", "diffusers"), ("lora", "lora"), ("lora", "diffusers")]
)
def test_a_person_generates_the_same_in_stock_diffusers(world, tmp_path, capsys, name, form):
    flags = ["--format", form, "--person", "ann", "--verify"]
    run_export(world, name, tmp_path / "out", *flags)
    assert "verified: latents differ" in capsys.readouterr().out
    assert 'Call this person "sks person"' in (tmp_path / "out/README.md").read_text()
    if form == "lora":  # in a person's folder, too
        with safe_open(world / name / "people/ann" / FILE, framework="numpy") as handle:
            assert json.loads(handle.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 16


def test_a_base_is_exported_whole(world, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(world / "base", base / "pipeline")
    config = config_of("base", "lfw").to_dict()
    (base / "config.json").write_text(json.dumps(config))
    run_export(tmp_path, "base", tmp_path / "out", "--format", "diffusers", "--verify")
    assert "verified: latents differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("dreambooth", ["--format", "ip-adapter"], "is a run of dreambooth"),
        ("sa", ["--format", "diffusers"], "adapters are exported with --format ip-adapter"),
        ("dreambooth", ["--format", "diffusers"], "name the person"),
        ("dreambooth", ["--format", "lora", "--person", "ann"], "is a run of dreambooth"),
        ("lora", ["--format", "lora", "--person", "nobody"], "no such person"),
        ("sa", ["--format", "ip-adapter", "--photos", "nowhere.png"], "nowhere.png"),
        ("nothing", ["--format", "ip-adapter"], "nothing"),
        ("lora", ["--format", "lora", "--person", "ann", "--bin"], "no use for --bin"),
        ("lora", ["--format", "lora", "--person", "ann", "--weights", "ema"], "use for --weights"),
        ("lora", ["--format", "diffusers", "--person", "ann", "--photos", "a"], "for --photos"),
        ("sa", ["--format", "ip-adapter", "--person", "ann"], "no use for --person"),
    ],
)
def test_what_cannot_be_exported(world, tmp_path, capsys, name, flags, words):
    with pytest.raises(SystemExit) as stop:
        run_export(world, name, tmp_path / "out", *flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert words in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "form", "flags"),
    [
        ("avg", "ip-adapter", []),
        ("lora", "lora", ["--person", "ann"]),
        ("lora", "diffusers", ["--person", "ann"]),
        ("base", "diffusers", ["--verify"]),
    ],
)
def test_half_precision_is_written_where_it_is_asked_for(world, tmp_path, name, form, flags):
    if name == "base":
        write_base(world, tmp_path / "base")
    where = tmp_path if name == "base" else world
    run_export(where, name, tmp_path / "out", "--format", form, "--dtype", "float16", *flags)
    files = set((tmp_path / "out").rglob("*.safetensors"))
    files -= {tmp_path / "out/aggregator.safetensors"}
    assert files
    for file in files:
        dtypes = {x.dtype for key, x in load_file(file).items() if not key.endswith("alpha")}
        assert dtypes == {np.dtype("float16")}, file
    assert checksums.fault(tmp_path / "out") is None
    if form == "diffusers":
        torch_models.open_diffusers(tmp_path / "out")


def write_base(world, workdir) -> None:
    """Writes a finished run of pretrain."""
    shutil.copytree(world / "base", workdir / "pipeline")
    checksums.write(workdir / "pipeline")
    config = config_of("base", "lfw").to_dict()
    (workdir / "config.json").write_text(json.dumps(config))


def test_a_damaged_base_is_not_exported(world, tmp_path, capsys):
    write_base(world, tmp_path / "base")
    (file,) = (tmp_path / "base/pipeline/vae").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(SystemExit):
        run_export(tmp_path, "base", tmp_path / "out", "--format", "diffusers")
    assert "is not as it was written; run the training again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_existing_files_are_left_alone(world, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        run_export(world, "avg", tmp_path, "--format", "ip-adapter")
    assert "not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_another_base_is_refused(world, tmp_path, capsys):
    moved = tmp_path / "avg"
    shutil.copytree(world / "avg", moved)
    other = tmp_path / "base"
    shutil.copytree(world / "base", other)
    settings = (other / "unet/config.json").read_text()
    (other / "unet/config.json").write_text(settings + "\n")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"pipeline": str(other)}))
    with pytest.raises(SystemExit) as stop:
        run_export(tmp_path, "avg", tmp_path / "out", "--format", "ip-adapter")
    assert stop.value.code == 2
    assert f"the base at {other} now has hash" in capsys.readouterr().err
