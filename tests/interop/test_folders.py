"""Tower folders as diffusers and transformers write them, new and old, whole and damaged."""

import json

import diffusers
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
import transformers
from flax import traverse_util
from safetensors.torch import load_file, save_file

from persona_jax.errors import UserError
from persona_jax.interop import folders
from persona_jax.interop.tensors import to_torch, torch_name
from persona_jax.models import towers

SETTINGS = {
    "unet": torch_models.TINY_UNET,
    "vae": torch_models.TINY_VAE,
    "text_encoder": torch_models.TINY_TEXT | {"vocab_size": 40, "eos_token_id": 39},
    "image_encoder": torch_models.TINY_VISION,
}
MAKE = {
    "unet": torch_models.make_unet,
    "vae": torch_models.make_vae,
    "text_encoder": torch_models.make_text_encoder,
    "image_encoder": torch_models.make_image_encoder,
}
FILES = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model.safetensors")
FILES |= dict.fromkeys(("text_encoder", "image_encoder"), "model.safetensors")


@pytest.fixture(scope="module")
def models():
    return {tower: MAKE[tower](SETTINGS[tower]) for tower in towers.TOWERS}


@pytest.fixture
def folder(models, tmp_path):
    for tower, model in models.items():
        model.save_pretrained(tmp_path / tower)
    return tmp_path


def assert_is(params, model: torch.nn.Module) -> None:
    """Asserts that our parameters and the stock model's are the same."""
    ours = {
        torch_name(path): to_torch(path, np.asarray(leaf))
        for path, leaf in traverse_util.flatten_dict(params).items()
    }
    theirs = dict(model.named_parameters())
    if not set(ours) <= set(theirs):  # files and our names have a prefix that transformers 5 lacks
        ours = {name.removeprefix("text_model."): array for name, array in ours.items()}
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name].detach().numpy(), err_msg=name)


def edit(file, change) -> None:
    """Rewrites a safetensors file with ``change(tensors)``."""
    tensors = change(load_file(file))
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("tower", towers.TOWERS)
def test_load_save_load_is_the_identity_and_stock_opens_ours(tower, models, folder, tmp_path):
    first = folders.load_tower(folder / tower, tower)
    assert_is(first.params, models[tower])
    again = tmp_path / "again"
    folders.save_tower(again, tower, first.config, first.params)
    second = folders.load_tower(again, tower)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert first.module == second.module
    assert_is(second.params, type(models[tower]).from_pretrained(again))


@pytest.mark.parametrize("tower", ["unet", "text_encoder"])
def test_sharded_files(tower, models, folder):
    (folder / tower / FILES[tower]).unlink()
    models[tower].save_pretrained(folder / tower, max_shard_size="20KB")
    shards = sorted((folder / tower).glob("*-of-*.safetensors"))
    assert len(shards) > 1
    loaded = folders.load_tower(folder / tower, tower)
    assert_is(loaded.params, models[tower])
    shards[1].rename(folder / "elsewhere")
    with pytest.raises(UserError, match=rf"shards {shards[1].name} are missing"):
        folders.load_tower(folder / tower, tower)


@pytest.mark.parametrize("tower", ["unet", "text_encoder"])
@pytest.mark.parametrize("shards", [None, "20KB"])
def test_weights_of_a_variant_alone_are_read(tower, shards, models, folder):
    (folder / tower / FILES[tower]).unlink()
    more = {"max_shard_size": shards} if shards else {}
    models[tower].save_pretrained(folder / tower, variant="fp16", **more)
    assert not (folder / tower / FILES[tower]).exists()
    loaded = folders.load_tower(folder / tower, tower)
    assert_is(loaded.params, models[tower])
    if not shards:  # with two variants, the user must choose
        name = FILES[tower].replace(".safetensors", ".{}.safetensors")
        (folder / tower / name.format("ema")).touch()
        with pytest.raises(UserError, match=r"variants ema, fp16, and none without"):
            folders.load_tower(folder / tower, tower)


def test_weights_of_another_kind_of_file_are_named(folder):
    (folder / "unet" / FILES["unet"]).rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"there is diffusion_pytorch_model\.bin: save it as"):
        folders.load_tower(folder / "unet", "unet")


def test_the_vision_half_of_a_whole_clip_model(folder):
    """Published CLIP models have a nested config; old ones list all of transformers' settings."""
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=SETTINGS["text_encoder"],
        vision_config=SETTINGS["image_encoder"],
        projection_dim=12,
    )
    whole = transformers.CLIPModel(config)
    whole.save_pretrained(folder / "clip")
    file = folder / "clip/config.json"
    settings = json.loads(file.read_text())
    settings["vision_config"] |= {
        **{
            "length_penalty": 1.0,
            "max_length": 20,
            "num_beams": 1,
            "temperature": 1.0,
            "top_k": 50,
        },
        **{"top_p": 1.0, "repetition_penalty": 1.0, "typical_p": 1.0, "pruned_heads": {}},
        **{"diversity_penalty": 0.0, "num_beam_groups": 1, "architectures": None},
    }
    file.write_text(json.dumps(settings))
    loaded = folders.load_tower(folder / "clip", "image_encoder")
    folders.save_tower(folder / "half", "image_encoder", loaded.config, loaded.params)
    half = transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "half").eval()
    pixels = torch.from_numpy(torch_models.normal(1, 3, 16, 16))
    with torch.no_grad():
        expected = whole.eval().get_image_features(pixels)
        expected = getattr(expected, "pooler_output", expected)
        embeds = half(pixels).image_embeds
    np.testing.assert_allclose(embeds, expected, atol=1e-6)
    seen = jnp.asarray(torch_models.nhwc(pixels))
    ours = loaded.module.apply({"params": loaded.params}, seen).embedding
    assert torch_models.relative(ours, expected) < 1e-5


def test_a_projection_inside_a_text_encoder_is_passed_over_as_stock_does(models, folder):
    edit(
        folder / "text_encoder" / FILES["text_encoder"],
        lambda tensors: tensors | {"text_projection.weight": torch.zeros(16, 16)},
    )
    loaded = folders.load_tower(folder / "text_encoder", "text_encoder")
    assert_is(loaded.params, models["text_encoder"])


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("convolutions", [False, True], ids=["dense", "1×1 convolutions"])
def test_old_vae_attention_names(convolutions, models, folder):
    def age(tensors):
        out = {}
        for name, tensor in tensors.items():
            for new, old in OLD.items():
                if f"attentions.0.{new}." in name:
                    name = name.replace(new, old)
                    if convolutions and tensor.ndim == 2:
                        tensor = tensor[..., None, None]
            out[name] = tensor
        assert "encoder.mid_block.attentions.0.proj_attn.weight" in out
        return out

    edit(folder / "vae" / FILES["vae"], age)
    assert_is(folders.load_tower(folder / "vae", "vae").params, models["vae"])


PREFIX = {"text_encoder": "text_model.", "image_encoder": "vision_model."}


@pytest.mark.parametrize("tower", PREFIX)
@pytest.mark.parametrize("prefixed", [True, False])
def test_clip_names_with_and_without_prefix_and_position_ids(tower, prefixed, models, folder):
    prefix, outside = PREFIX[tower], "visual_projection."

    def name(old: str) -> str:
        bare = old.removeprefix(prefix)
        return prefix + bare if prefixed and not bare.startswith(outside) else bare

    def rename(tensors):
        position_ids = {name("embeddings.position_ids"): torch.arange(16)[None]}
        return {name(old): tensor for old, tensor in tensors.items()} | position_ids

    edit(folder / tower / FILES[tower], rename)
    assert_is(folders.load_tower(folder / tower, tower).params, models[tower])


DAMAGE = {
    "unet": "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "vae": "decoder.mid_block.attentions.0.to_q.weight",
    "text_encoder": "encoder.layers.0.mlp.fc1.weight",
    "image_encoder": "vision_model.encoder.layers.0.mlp.fc1.weight",
}


@pytest.mark.parametrize("tower", DAMAGE)
def test_what_does_not_fit_is_named_in_one_error(tower, folder):
    """One tensor is removed, one renamed, one reshaped."""
    renamed = DAMAGE[tower]

    def damage(tensors):
        assert renamed in tensors
        removed, reshaped, *_ = (k for k in tensors if k.endswith(".bias"))
        expected.extend([removed, renamed, f"{renamed}s", reshaped])
        del tensors[removed]
        tensors[f"{renamed}s"] = tensors.pop(renamed)
        tensors[reshaped] = torch.cat([tensors[reshaped]] * 2)
        return tensors

    expected: list[str] = []
    edit(folder / tower / FILES[tower], damage)
    with pytest.raises(UserError, match=rf"{tower}: the tensors do not fit") as error:
        folders.load_tower(folder / tower, tower)
    message = str(error.value)
    assert "2 missing" in message
    assert "1 unexpected" in message
    assert "1 misshapen" in message
    details = "\n".join(error.value.details)
    assert all(name in details for name in expected)
    assert renamed in message
    assert "\n" not in message
    assert len(message) < 500


KINDS = [
    ({"unet_config": {"in_channels": 9}}, "in_channels=9, out_channels=4 .inpainting"),
    ({"unet_config": {"in_channels": 5}}, "depth to image"),
    ({"unet_config": {"in_channels": 8}}, "instruct-pix2pix"),
    ({"unet_config": {"out_channels": 8}}, "in_channels=4, out_channels=8"),
]


@pytest.mark.parametrize(("changes", "words"), KINDS)
def test_unets_for_something_else_are_named(changes, words, folder):
    settings = SETTINGS["unet"] | changes["unet_config"]
    diffusers.UNet2DConditionModel(**settings).save_pretrained(folder / "unet")
    with pytest.raises(UserError, match=words):
        folders.load_tower(folder / "unet", "unet")


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda name: f"_orig_mod.{name}", "torch.compile"),
        (lambda name: f"module.{name}", "DistributedDataParallel"),
        (lambda name: f"model.diffusion_model.{name}", "single-file layout"),
        (lambda name: f"state_dict.{name}", "trainer's whole checkpoint"),
        (lambda name: f"nobody.knows.{name}", "of them|unexpected"),
    ],
)
def test_files_of_another_kind_are_named_in_few_words(rename, words, folder):
    file = folder / "unet" / FILES["unet"]
    edit(file, lambda tensors: {rename(name): x for name, x in tensors.items()})
    with pytest.raises(UserError, match=words) as error:
        folders.load_tower(folder / "unet", "unet")
    assert len(str(error.value)) < 500
    assert len(error.value.details) > 100


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("StableDiffusionXLPipeline", None),
        ("StableDiffusion3Pipeline", None),
        ("FluxPipeline", None),
        (None, "text_encoder_2"),
        (None, "transformer"),
    ],
)
def test_folders_of_another_family_are_named(name, part, folder):
    folders.refuse_other_families(folder)
    if name:
        folders.write_json(folder / "model_index.json", {"_class_name": name})
    if part:
        (folder / part).mkdir()
    with pytest.raises(UserError, match=name or part):
        folders.refuse_other_families(folder)
    for known in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
        folders.write_json(folder / "model_index.json", {"_class_name": known})
        if not part:
            folders.refuse_other_families(folder)


def test_half_precision_towers_cast_on_loading_are_what_stock_reads_after_saving(models, folder):
    """transformers casts to the dtype in config.json, so it must be that of the weights."""
    tower = "text_encoder"
    half = MAKE[tower](SETTINGS[tower]).half()
    half.save_pretrained(folder / tower)
    assert jax.tree.leaves(folders.load_tower(folder / tower, tower).params)[0].dtype == jnp.float16
    loaded = folders.load_tower(folder / tower, tower, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    again = folder / "again"
    folders.save_tower(again, tower, loaded.config, loaded.params)
    opened = type(half).from_pretrained(again)
    assert opened.dtype == torch.float32
    assert_is(loaded.params, opened)
    assert_is(loaded.params, half.float())


def test_content_hash_tells_weights_and_settings_apart(folder):
    def hashed() -> str:
        return folders.content_hash(folder / "vae")

    first = hashed()
    assert folders.load_tower(folder / "vae", "vae").hash == first
    edit(folder / "vae" / FILES["vae"], lambda t: t | {"quant_conv.bias": t["quant_conv.bias"] + 1})
    second = hashed()
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.2}))
    assert len({first, second, hashed()}) == 3


@pytest.mark.parametrize("content", [None, "", "{"], ids=["missing", "empty", "cut short"])
def test_a_damaged_config_is_named(content, folder):
    file = folder / "vae" / "config.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(UserError, match=r"vae/config\.json: (missing|not readable)") as error:
        folders.load_tower(folder / "vae", "vae")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["/nowhere/at/all", "nowhere", "../nowhere", "~/nowhere", ""])
def test_paths_that_are_not_there(where):
    with pytest.raises(UserError, match="no such folder"):
        folders.find(where)


def test_a_file_is_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    with pytest.raises(UserError, match=r"a/file: a single file.*from_single_file"):
        folders.find("a/file")


def test_a_hub_id_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="owner/name: no local folder of that name") as error:
        folders.find("owner/name")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("inside", ["", "/models/image_encoder"])
def test_a_hub_id_may_name_a_folder_within(inside, tmp_path, monkeypatch):
    """Checks the arguments of the hub's client, which is replaced."""
    published = [
        "README.md",
        "v1-5-pruned-emaonly.safetensors",
        "model_index.json",
        "safety_checker/model.safetensors",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "models/image_encoder/config.json",
        "models/image_encoder/model.safetensors",
        "models/ip-adapter_sd15.safetensors",
    ]
    asked = {}

    def snapshot_download(repo, *, allow_patterns, ignore_patterns):
        asked[repo] = set(
            huggingface_hub.utils.filter_repo_objects(
                published, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert folders.find(f"owner/name{inside}") == tmp_path / inside.strip("/")
    encoder = {"models/image_encoder/config.json", "models/image_encoder/model.safetensors"}
    if inside:
        assert asked == {"owner/name": encoder}
    else:
        assert asked["owner/name"] - encoder == {
            "model_index.json",
            "tokenizer/merges.txt",
            "unet/config.json",
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model.safetensors.index.json",
            "text_encoder/model.safetensors",
        }
