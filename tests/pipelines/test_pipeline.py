"""Pipeline folders: stock diffusers and persona_jax open each other's and generate the same."""

import json
import shutil
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
import transformers
from safetensors.numpy import load_file

from persona_jax.errors import UserError
from persona_jax.pipelines import pipeline

PROMPTS = ["a photo of a smiling woman", "an angry man"]
SIDE = 16


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder saved by stock diffusers."""
    folder = tmp_path_factory.mktemp("stock")
    torch_models.write_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """The same folder, loaded and saved by persona_jax."""
    folder = tmp_path_factory.mktemp("ours") / "new" / "place"
    pipeline.save(pipeline.load(str(theirs)), folder)
    return folder


@pytest.fixture
def copy(ours, tmp_path):
    return shutil.copytree(ours, tmp_path / "copy")


def generate(folder) -> np.ndarray:
    latents = torch_models.nchw(torch_models.normal(1, 8, 8, 4))
    size = {"height": SIDE, "width": SIDE}
    pipe = torch_models.open_diffusers(folder)
    return pipe(PROMPTS[0], latents=latents, num_inference_steps=2, output_type="np", **size).images


def test_stock_diffusers_generates_the_same_from_what_we_save(theirs, ours):
    np.testing.assert_array_equal(generate(ours), generate(theirs))
    opened = torch_models.open_diffusers(ours)
    assert isinstance(opened.image_encoder, transformers.CLIPVisionModelWithProjection)
    assert opened.feature_extractor.size == {"shortest_edge": 16}
    assert isinstance(opened.scheduler, diffusers.DDIMScheduler)
    assert opened.safety_checker is None


def test_saving_what_was_loaded_is_the_identity(ours, theirs, tmp_path):
    pipeline.save(pipeline.load(str(ours)), tmp_path)
    for tower in pipeline.TOWERS:
        (file,) = (ours / tower).glob("*.safetensors")
        first, again = load_file(file), load_file(tmp_path / tower / file.name)
        published = load_file(theirs / tower / file.name)
        assert first.keys() == again.keys()
        for name, array in first.items():
            np.testing.assert_array_equal(array, again[name])
            # transformers 5 omits the prefix; older versions need it.
            bare = name if name in published else name.removeprefix("text_model.")
            np.testing.assert_array_equal(array, published[bare])
    for file in sorted(ours.rglob("*.json")):
        assert file.read_text() == (tmp_path / file.relative_to(ours)).read_text(), file


def test_the_tokenizer_is_saved_for_old_and_new_readers(theirs, ours, tmp_path, caplog):
    original = pipeline.load_tokenizer(theirs / "tokenizer")
    old = tmp_path / "old"
    old.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(ours / "tokenizer" / name, old)
    prompts = [*PROMPTS, "", "Ünï, 4 dogs' & \n", "one two " * 30]
    expected, warnings = pipeline.tokenize(original, prompts)
    for folder in (ours / "tokenizer", old):
        ids, again = pipeline.tokenize(pipeline.load_tokenizer(folder), prompts)
        np.testing.assert_array_equal(ids, expected)
        assert again == warnings
    assert len(warnings) == 1
    assert "cut to 16" in warnings[0]
    assert "one two" in warnings[0]
    assert not caplog.records  # nor a warning from transformers


def test_a_token_beyond_the_table_is_refused(copy):
    """Textual inversion adds such tokens; an embedding beyond the table would be NaN."""
    tokenizer = pipeline.load_tokenizer(copy / "tokenizer")
    rows = json.loads((copy / "text_encoder/config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<cat{i}>" for i in range(rows + 1 - len(tokenizer))])
    tokenizer.save_pretrained(copy / "tokenizer")
    loaded = pipeline.load(str(copy), only=["text_encoder"])
    assert loaded.tokenize(["a man"])[0].max() < rows
    with pytest.raises(UserError, match=rf"<cat\d+>.* id {rows}, .* {rows} rows"):
        loaded.tokenize(["a man", f"a photo of <cat{rows - len(loaded.tokenizer) + 1}>"])


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (("vocab.json", "merges.txt"), None),
        (("tokenizer.json",), None),
        (("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"), None),
        (("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"), 200),
    ],
)
def test_the_text_towers_length_counts_where_the_tokenizer_has_none(
    ours, copy, tmp_path, kept, said
):
    expected, _ = pipeline.load(str(ours), only=["text_encoder"]).tokenize(PROMPTS)
    for file in (copy / "tokenizer").iterdir():
        if file.name not in kept:
            file.unlink()
    config = copy / "tokenizer/tokenizer_config.json"
    if config.exists():
        settings = json.loads(config.read_text()) | {"model_max_length": said}
        config.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    loaded = pipeline.load(str(copy))
    np.testing.assert_array_equal(loaded.tokenize(PROMPTS)[0], expected)
    # The saved tokenizer states the length, so that stock can open it.
    pipeline.save(loaded, tmp_path / "saved")
    assert torch_models.open_diffusers(tmp_path / "saved").tokenizer.model_max_length == 16


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_a_damaged_tokenizer_is_named(copy, file):
    for other in (copy / "tokenizer").iterdir():
        if other.name != file and (file == "tokenizer.json" or other.name == "tokenizer.json"):
            other.unlink()
    (copy / "tokenizer" / file).write_text("{" if file.endswith("json") else "#\nwords")
    with pytest.raises(UserError, match="tokenizer: not a readable CLIP tokenizer") as error:
        pipeline.load(str(copy), only=["text_encoder"])
    assert "\n" not in str(error.value)


def test_a_pipeline_without_image_encoder(theirs, tmp_path):
    """Like Stable Diffusion 1.5 on the hub; the image encoder may come from another folder."""
    bare = shutil.copytree(theirs, tmp_path / "bare")
    shutil.rmtree(bare / "image_encoder")
    shutil.rmtree(bare / "feature_extractor")
    with pytest.raises(UserError, match=r"bare: it has no image_encoder/.*image_encoder\.path"):
        pipeline.load(str(bare))
    towers = [tower for tower in pipeline.TOWERS if tower != "image_encoder"]
    loaded = pipeline.load(str(bare), only=towers)
    assert loaded.image_encoder is None
    assert loaded.feature_extractor is None
    pipeline.save(loaded, tmp_path / "saved")
    opened = torch_models.open_diffusers(tmp_path / "saved")
    assert opened.image_encoder is None
    assert opened.feature_extractor is None

    encoder = pipeline.load(str(theirs), only=["image_encoder"]).image_encoder
    for place in (theirs, theirs / "image_encoder"):
        other = pipeline.load(str(bare), only=["image_encoder"], image_encoder=str(place))
        assert other.image_encoder.hash == encoder.hash


def test_only_what_is_asked_for_is_loaded(theirs):
    loaded = pipeline.load(str(theirs), only=["vae"], dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert loaded.unet is loaded.text_encoder is loaded.image_encoder is None
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.vae.params)} == {jnp.dtype("bfloat16")}
    assert loaded.tower("vae") is loaded.vae
    with pytest.raises(ValueError, match="without its unet"):
        loaded.tower("unet")


def test_half_precision_opens_in_stock(theirs, tmp_path):
    loaded = pipeline.load(str(theirs), param_dtype=jnp.bfloat16)
    pipeline.save(loaded, tmp_path)
    opened = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    weight = opened.unet.conv_in.weight
    assert weight.dtype == torch.bfloat16
    expected = load_file(theirs / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    np.testing.assert_array_equal(weight.float().detach(), expected.astype(jnp.bfloat16))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "changes", [{"clip_sample": True}, {"clip_sample": None}, {"steps_offset": 0}]
)
def test_the_schedule_is_the_one_that_stock_would_use(changes, copy):
    """StableDiffusionPipeline disables clipping and sets the offset, whatever the file says."""
    file = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    schedule = pipeline.load(str(copy), only=[]).schedule
    config = torch_models.open_diffusers(copy).scheduler.config
    assert schedule.clip_sample is config.clip_sample is False
    assert schedule.steps_offset == config.steps_offset == 1


OTHERS = [
    *("PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("LMSDiscreteScheduler", "HeunDiscreteScheduler", "DDPMScheduler", "LCMScheduler"),
    *("DEISMultistepScheduler", "KDPM2DiscreteScheduler", "TCDScheduler", "DDIMInverseScheduler"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_sampler_is_read_as_ddim_from_config_reads_it(name, copy):
    """Files as the other sampler saves them, with settings added or left out."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    getattr(diffusers, name).from_config(betas).save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    file = copy / "scheduler/scheduler_config.json"
    saved = json.loads(file.read_text())
    left_out = {key: saved[key] for key in ("_class_name", *betas)}
    for settings in (
        saved,
        left_out,
        left_out | {"clip_sample": True},
        left_out | {"clip_sample": False, "steps_offset": 1},
        saved | {"steps_offset": 3, "timestep_spacing": "trailing", "set_alpha_to_one": False},
    ):
        file.write_text(json.dumps(settings))
        stock = diffusers.DDIMScheduler.from_config(
            torch_models.open_diffusers(copy).scheduler.config
        )
        loaded = pipeline.load(str(copy), only=[])
        ours, theirs = loaded.schedule, stock.config
        assert ours.clip_sample is theirs.clip_sample
        assert ours.steps_offset == theirs.steps_offset
        assert ours.spacing == theirs.timestep_spacing
        assert ours.prediction == theirs.prediction_type
        assert ours.final_alpha_cumprod == pytest.approx(float(stock.final_alpha_cumprod))
        np.testing.assert_allclose(ours.alphas_cumprod, stock.alphas_cumprod, rtol=1e-4)
        note = pipeline.sampler_note(loaded)
        assert f"DDIM samples in place of {name}" in note
        assert ("clip_sample" in note) is ours.clip_sample


@pytest.mark.parametrize(
    ("tower", "make", "changes", "words"),
    [
        (
            "unet",
            torch_models.make_unet,
            {"in_channels": 6, "out_channels": 6},
            "latent_channels=4",
        ),
        ("unet", torch_models.make_unet, {"cross_attention_dim": 24}, "hidden_size=16"),
    ],
)
def test_parts_of_two_pipelines_are_refused(copy, tower, make, changes, words):
    make(torch_models.TINY_UNET | changes).save_pretrained(copy / tower)
    with pytest.raises(UserError, match=words):
        pipeline.load(str(copy))


def test_sizes(theirs):
    loaded = pipeline.load(str(theirs), only=["unet", "vae"])
    assert loaded.latent_shape == (8, 8, 4)
    assert loaded.image_size == SIDE


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("scheduler/scheduler_config.json", r"scheduler_config\.json: missing"),
        ("tokenizer", r"tokenizer: no vocab\.json and no merges\.txt"),
        ("vae", r"vae/config\.json: missing"),
        ("unet/diffusion_pytorch_model.safetensors", r"unet: no diffusion_pytorch_model"),
    ],
)
def test_what_is_missing_is_named(gone, named, copy):
    if (copy / gone).is_dir():
        shutil.rmtree(copy / gone)
    else:
        (copy / gone).unlink()
    with pytest.raises(UserError, match=named) as error:
        pipeline.load(str(copy))
    assert "\n" not in str(error.value)


def test_loading_and_tokenizing_leave_torch_alone(theirs):
    script = (
        "import sys; from persona_jax.pipelines import generation, pipeline; "
        f"pipeline.load({str(theirs)!r}).tokenize(['a man']); "
        "print([m for m in ('torch', 'diffusers', 'tensorflow') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip().splitlines()[-1:] == ["[]"], run.stderr
