"""LoRA files of diffusers and PEFT: the base with one merged is stock with it loaded."""

import json

import jax
import numpy as np
import pytest
import torch
import torch_models
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.numpy import load_file, save_file

from persona_jax.errors import UserError
from persona_jax.interop.lora_files import load_lora
from persona_jax.models import lora
from persona_jax.pipelines import generation, pipeline
from persona_jax.runs import diffusers_reference

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MORE = [*ATTENTION, "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut"]
KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch_models.write_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(base):
    return pipeline.load(str(base))


def write_lora(base, folder, targets, text: bool, alpha: float = 6.0, metadata: bool = True):
    """The file as PEFT and diffusers write it, and the pipeline that it was written from; nothing
    in it is zero."""
    pipe = diffusers_reference.open_diffusers(base)
    settings = {"r": 3, "lora_alpha": alpha, "init_lora_weights": "gaussian"}
    towers = {"unet": LoraConfig(**settings, target_modules=targets)}
    if text:
        towers["text_encoder"] = LoraConfig(**settings, target_modules=["q_proj", "fc1"])
    layers, about = {}, {}
    for name, config in towers.items():
        tower = inject_adapter_in_model(config, getattr(pipe, name))
        generator = torch.Generator().manual_seed(0)
        for key, parameter in tower.named_parameters():
            if "lora_B" in key:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(tower)
        if metadata:
            about[f"{name}_lora_adapter_metadata"] = tower.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **about)
    return folder / "pytorch_lora_weights.safetensors", pipe


@pytest.mark.parametrize(
    ("targets", "text", "alpha", "metadata"),
    [
        (ATTENTION, False, 3.0, False),  # α is r where nothing is said
        (MORE, True, 6.0, True),
    ],
)
def test_the_base_with_it_is_what_peft_makes(
    base, loaded, tmp_path, targets, text, alpha, metadata
):
    file, pipe = write_lora(base, tmp_path, targets, text, alpha, metadata)
    expected = diffusers_reference.diffusers_latents(pipe, loaded)
    frozen = generation.sampler_params(loaded)
    updates = load_lora(file, frozen)
    assert set(updates) == ({"unet", "text_encoder"} if text else {"unet"})
    towers = {name: lora.merge(frozen[name], update) for name, update in updates.items()}
    found = diffusers_reference.our_sampler(loaded, towers)()
    assert diffusers_reference.apart(found, expected) < 1e-3
    plain = diffusers_reference.diffusers_latents(diffusers_reference.open_diffusers(base), loaded)
    assert diffusers_reference.apart(plain, expected) > 1e-2


def test_half_of_it_is_what_stock_makes(base, loaded, tmp_path):
    """Stock diffusers' own loader and scale."""
    file, _ = write_lora(base, tmp_path, MORE, text=False)
    pipe = diffusers_reference.open_diffusers(base)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    expected = diffusers_reference.diffusers_latents(pipe, loaded)
    frozen = generation.sampler_params(loaded)
    half = {"unet": lora.merge(frozen["unet"], load_lora(file, frozen)["unet"], 0.5)}
    found = diffusers_reference.our_sampler(loaded, half)()
    assert diffusers_reference.apart(found, expected) < 1e-3


def renamed(tensors: dict, *pairs: tuple[str, str]) -> dict:
    out = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        out[name] = tensor
    return out


@pytest.mark.parametrize(
    "pairs",
    [
        [("lora_A", "lora.down"), ("lora_B", "lora.up")],
        [("lora_A", "lora_linear_layer.down"), ("lora_B", "lora_linear_layer.up")],
        [
            (".to_out.0.", ".to_out."),
            *((f".to_{x}.lora_A", f".processor.to_{x}_lora.down") for x in ("q", "k", "v", "out")),
            *((f".to_{x}.lora_B", f".processor.to_{x}_lora.up") for x in ("q", "k", "v", "out")),
        ],
    ],
)
def test_older_layouts_are_the_same_file(base, loaded, tmp_path, pairs):
    file, _ = write_lora(base, tmp_path, ATTENTION, text=False, alpha=3.0, metadata=False)
    old = tmp_path / "old.safetensors"
    save_file(renamed(load_file(file), *pairs), old)
    frozen = generation.sampler_params(loaded)
    one, other = load_lora(file, frozen), load_lora(old, frozen)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_alpha_beside_the_tensors_counts(base, loaded, tmp_path):
    file, _ = write_lora(base, tmp_path, ATTENTION, text=False, alpha=3.0, metadata=False)
    tensors = load_file(file) | {f"{KEY}.alpha": np.array(1.5, np.float32)}
    save_file(tensors, tmp_path / "alpha.safetensors")
    frozen = generation.sampler_params(loaded)
    one, other = (load_lora(f, frozen)["unet"] for f in (file, tmp_path / "alpha.safetensors"))
    name = KEY.removeprefix("unet.")
    np.testing.assert_allclose(other[name]["lora_B"]["kernel"], one[name]["lora_B"]["kernel"] / 2)


A, B = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"
GOOD = {A: np.ones((3, 64), np.float32), B: np.ones((64, 3), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({A: GOOD[A]}, "half of the update is missing, B"),
        (GOOD | {"image_proj.proj.weight": np.ones((2, 2), np.float32)}, "image_proj.proj.weight"),
        ({"lora_unet_mid_block.lora_down.weight": np.ones((2, 2), np.float32)}, "kohya"),
        (GOOD | {A: np.ones((3, 60), np.float32)}, r"\(3, 60\)"),
        (GOOD | {A: np.ones((2, 64), np.float32)}, r"\(2, 64\)"),
        (GOOD | {B: np.full((64, 3), np.nan, np.float32)}, "not finite"),
        ({k.replace("mid_block", "mid_block_9"): x for k, x in GOOD.items()}, "no such layer"),
        ({"words": np.ones(3, np.float32)}, "not a LoRA"),
        ({A: np.ones((3, 64), np.int8)}, "not a float"),
    ],
)
def test_files_that_do_not_fit(loaded, tmp_path, tensors, words):
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    with pytest.raises(UserError, match=words) as error:
        load_lora(file, generation.sampler_params(loaded))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [("words", "cannot be read"), (json.dumps({"unet.use_dora": True}), "use_dora")],
)
def test_settings_that_ask_for_more(loaded, tmp_path, metadata, words):
    file = tmp_path / "lora.safetensors"
    save_file(GOOD, file, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match=words):
        load_lora(file, generation.sampler_params(loaded))


def test_no_file_and_no_tensors(loaded, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    for name, words in (("none.safetensors", "no such file"), ("a.safetensors", "not a readable")):
        with pytest.raises(UserError, match=words):
            load_lora(tmp_path / name, generation.sampler_params(loaded))
