"""LoRA files of diffusers and PEFT: a merged LoRA equals stock diffusers with it loaded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
from diffusers import StableDiffusionPipeline
from flax import traverse_util
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.numpy import load_file, save_file
from world import shaken

from persona_jax.errors import UserError
from persona_jax.interop import tensors
from persona_jax.interop.lora_files import FILE, KOHYA_FILE, load_lora, save_kohya, save_lora
from persona_jax.models import lora
from persona_jax.pipelines import generation, pipeline
from persona_jax.runs import diffusers_check

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


def write_lora(
    base, folder, targets, text: bool, alpha: float = 6.0, metadata: bool = True, patterns=()
):
    """Writes a LoRA without zero factors by PEFT and diffusers; returns it and its pipeline."""
    pipe = diffusers_check.open_diffusers(base)
    settings = {"r": 3, "lora_alpha": alpha, "init_lora_weights": "gaussian"}
    settings["alpha_pattern"] = dict(patterns)
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
        (ATTENTION, False, 3.0, False),  # the default of α is r
        (MORE, True, 6.0, True),
    ],
)
def test_the_base_with_it_is_what_peft_makes(
    base, loaded, tmp_path, targets, text, alpha, metadata
):
    file, pipe = write_lora(base, tmp_path, targets, text, alpha, metadata)
    expected = diffusers_check.diffusers_latents(pipe, loaded)
    frozen = generation.sampler_params(loaded)
    updates = load_lora(file, frozen)
    assert set(updates) == ({"unet", "text_encoder"} if text else {"unet"})
    towers = {name: lora.merge(frozen[name], update) for name, update in updates.items()}
    latents = diffusers_check.our_sampler(loaded, towers)()
    assert diffusers_check.apart(latents, expected) < 1e-3
    plain = diffusers_check.diffusers_latents(diffusers_check.open_diffusers(base), loaded)
    assert diffusers_check.apart(plain, expected) > 1e-2


def test_half_strength_is_what_stock_makes(base, loaded, tmp_path):
    """Compares with stock diffusers' own loader and scale."""
    file, _ = write_lora(base, tmp_path, MORE, text=False)
    pipe = diffusers_check.open_diffusers(base)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    expected = diffusers_check.diffusers_latents(pipe, loaded)
    frozen = generation.sampler_params(loaded)
    half = {"unet": lora.merge(frozen["unet"], load_lora(file, frozen)["unet"], 0.5)}
    latents = diffusers_check.our_sampler(loaded, half)()
    assert diffusers_check.apart(latents, expected) < 1e-3


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


@pytest.mark.parametrize(("alpha", "dtype"), [(1.5, np.float32), (1, np.int64)])
def test_alpha_beside_the_tensors_counts(base, loaded, tmp_path, alpha, dtype):
    file, _ = write_lora(base, tmp_path, ATTENTION, text=False, alpha=3.0, metadata=False)
    more = load_file(file) | {f"{KEY}.alpha": np.array(alpha, dtype)}
    save_file(more, tmp_path / "alpha.safetensors")
    frozen = generation.sampler_params(loaded)
    one, other = (load_lora(f, frozen)["unet"] for f in (file, tmp_path / "alpha.safetensors"))
    name = KEY.removeprefix("unet.")
    expected = one[name]["lora_B"]["kernel"] * alpha / 3
    np.testing.assert_allclose(other[name]["lora_B"]["kernel"], expected, rtol=1e-6)


def kohya(tensors: dict, alphas: dict[str, float]) -> dict:
    """Writes the same update in the layout of kohya's trainers."""
    out = {}
    for name, tensor in tensors.items():
        tower, _, rest = name.partition(".")
        layer, half = rest.removesuffix(".weight").rsplit(".", 1)
        layer = layer if tower == "unet" else f"text_model.{layer.removeprefix('text_model.')}"
        stem = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[tower] + layer.replace(".", "_")
        out[f"{stem}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = tensor
        out[f"{stem}.alpha"] = np.array(alphas[tower], np.float32)
    return out


def test_kohyas_layout_is_what_stock_makes_of_it(base, loaded, tmp_path):
    """Compares with stock's loader, α per tower: linear layers, convolutions, the text tower's MLP.

    Stock with transformers 5 ignores the text tower's attention (to_q_lora: "unexpected"), so this
    part is compared with the same update in PEFT's layout.
    """
    file, _ = write_lora(base, tmp_path, MORE, text=True)
    whole = kohya(load_file(file), {"unet": 1.5, "text_encoder": 1.5})
    save_file(whole, tmp_path / "whole.safetensors")
    known = {name: x for name, x in whole.items() if "self_attn" not in name}
    save_file(known, tmp_path / "known.safetensors")
    pipe = diffusers_check.open_diffusers(base)
    pipe.load_lora_weights(str(tmp_path), weight_name="known.safetensors")
    expected = diffusers_check.diffusers_latents(pipe, loaded)
    frozen = generation.sampler_params(loaded)
    updates = load_lora(tmp_path / "known.safetensors", frozen)
    towers = {name: lora.merge(frozen[name], update) for name, update in updates.items()}
    latents = diffusers_check.our_sampler(loaded, towers)()
    assert diffusers_check.apart(latents, expected) < 1e-3
    # In PEFT's layout α is 6.
    one, other = load_lora(tmp_path / "whole.safetensors", frozen), load_lora(file, frozen)
    one, other = (
        {t: lora.merge(frozen[t], u, s) for t, u in x.items()}
        for x, s in ((one, 4.0), (other, 1.0))
    )
    assert one.keys() == other.keys() == {"unet", "text_encoder"}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one, other)


@pytest.mark.parametrize("alpha", [1.0, 16.0])
def test_what_is_written_carries_its_alpha(base, loaded, tmp_path, alpha):
    """Stock and this package read α, from metadata or, if a program ignores these, from tensors."""
    frozen = generation.sampler_params(loaded)
    update = jax.tree.map(jnp.asarray, shaken(lora.init(jax.random.key(0), frozen["unet"], 4), 0))
    ours = {"unet": lora.merge(frozen["unet"], update, alpha / 4)}
    latents = diffusers_check.our_sampler(loaded, ours)()
    for save, name in ((save_lora, FILE), (save_kohya, KOHYA_FILE)):
        save(update, tmp_path / name, alpha)
        pipe = diffusers_check.open_diffusers(base)
        pipe.load_lora_weights(str(tmp_path), weight_name=name)
        expected = diffusers_check.diffusers_latents(pipe, loaded)
        assert diffusers_check.apart(latents, expected) < 1e-3
        assert pipe.unet.peft_config["default_0"].lora_alpha == alpha
        again = load_lora(tmp_path / name, frozen)["unet"]
        for layer, halves in again.items():
            expected = update[layer]["lora_B"]["kernel"] * (alpha / 4)
            np.testing.assert_allclose(halves["lora_B"]["kernel"], expected, rtol=1e-6)
    assert {float(x) for k, x in load_file(tmp_path / KOHYA_FILE).items() if "alpha" in k} == {
        alpha
    }


PATTERNS = [
    {r"down_blocks\..*": 12.0},
    {r"^mid_block.*": 0.5, "to_q": 9.0},
    {"to_q": 9.0, r"^mid_block.*": 0.5},
    {r"attn[12]\.to_(q|k)": 1.0},
]


@pytest.mark.parametrize("patterns", PATTERNS)
def test_patterns_are_regular_expressions_as_in_peft(base, loaded, tmp_path, patterns):
    file, _ = write_lora(base, tmp_path, ATTENTION, text=False, patterns=patterns)
    pipe = diffusers_check.open_diffusers(base)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    expected = diffusers_check.diffusers_latents(pipe, loaded)
    frozen = generation.sampler_params(loaded)
    ours = {"unet": lora.merge(frozen["unet"], load_lora(file, frozen)["unet"])}
    assert diffusers_check.apart(diffusers_check.our_sampler(loaded, ours)(), expected) < 1e-3


@pytest.mark.parametrize("tower", ["unet", "text_encoder"])
def test_pefts_own_layout(base, loaded, tmp_path, tower):
    """Reads adapter_model.safetensors with its α in adapter_config.json."""
    pipe = diffusers_check.open_diffusers(base)
    targets = {"unet": MORE, "text_encoder": ["q_proj", "fc1"]}[tower]
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=targets,
        rank_pattern={"to_k": 2},
        alpha_pattern={"to_v": 1},
    )
    wrapped = get_peft_model(getattr(pipe, tower), config)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path)
    expected = {k: v.numpy() for k, v in wrapped.merge_and_unload().state_dict().items()}
    file = tmp_path / "adapter_model.safetensors"
    frozen = generation.sampler_params(loaded)
    updates = load_lora(file, frozen)
    assert set(updates) == {tower}
    merged = traverse_util.flatten_dict(lora.merge(frozen[tower], updates[tower]))
    ours = {
        tensors.torch_name(path): tensors.to_torch(path, np.asarray(x))
        for path, x in merged.items()
    }
    if not set(ours) <= set(expected):
        ours = {name.removeprefix("text_model."): x for name, x in ours.items()}
    for name, array in ours.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"α is in .*adapter_config\.json"):
        load_lora(file, frozen)


A, B = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"
GOOD_A = np.ones((3, 16), np.float32)
GOOD = {A: GOOD_A, B: np.ones((16, 3), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({A: GOOD[A]}, "half of the update is missing, B"),
        (GOOD | {"image_proj.proj.weight": np.ones((2, 2), np.float32)}, "image_proj.proj.weight"),
        ({"lora_unet_mid_block.lora_down.weight": np.ones((2, 2), np.float32)}, "no such layer"),
        ({"lora_unet_mid_block.hada_w1_a": np.ones((2, 2), np.float32)}, "LoHa"),
        ({"lora_unet_mid_block.lokr_w1": np.ones((2, 2), np.float32)}, "LoKr"),
        (GOOD | {f"{KEY}.lora_magnitude_vector": np.ones(64, np.float32)}, "DoRA"),
        ({"lora_te2_text_model.lora_down.weight": np.ones((2, 2), np.float32)}, "XL"),
        ({"transformer.x_embedder.lora_A.weight": np.ones((2, 2), np.float32)}, "FLUX"),
        (GOOD | {f"{KEY}.lora.down.weight": GOOD_A}, "twice"),
        (GOOD | {f"{KEY}.alpha": np.full(3, 2, np.float32)}, "expected a number"),
        (GOOD | {A: np.ones(3, np.float32)}, r"\(3,\)"),
        (GOOD | {A: np.ones((0, 64), np.float32), B: np.ones((64, 0), np.float32)}, r"\(0, 64\)"),
        ({f"unet.layer_{i}.lora_A.weight": GOOD_A for i in range(500)}, r"and 49\d more"),
        ({f"layer_{i}.lora_Q.weight": GOOD_A for i in range(500)}, r"and 49\d more"),
        (GOOD | {A: np.ones((3, 60), np.float32)}, r"\(3, 60\)"),
        (GOOD | {A: np.ones((2, 16), np.float32)}, r"\(2, 16\)"),
        (GOOD | {B: np.full((16, 3), np.nan, np.float32)}, "not finite"),
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
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("words", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({"unet.use_dora": True}), "use_dora"),
        (json.dumps({"unet.lora_alpha": "much"}), "α is much"),
        (json.dumps({"unet.lora_alpha": float("nan")}), "α is nan"),
        (json.dumps({"unet.alpha_pattern": {"(": 2}}), "alpha_pattern cannot be read"),
        (json.dumps({"unet.alpha_pattern": [1]}), "alpha_pattern cannot be read"),
    ],
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
