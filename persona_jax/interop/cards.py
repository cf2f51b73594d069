"""What is written beside exported files: what they are, on which base, and how to use them."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

_AGGREGATES = {
    "resampler": "the set of the photos' embeddings, which its resampler reads together",
    "plus": "photos, whose patches its resampler reads one photo after the other",
    "first": "the first photo alone",
    "max": "the element-wise maximum of the photos' embeddings",
    "avg": "the average of the photos' embeddings",
    "self_attention": "self-attention over the set of the photos' embeddings",
}


PAGE = """
from aggregator import load  # the file beside this one
"""


def ip_adapter(config: ConfigDict, trained: Mapping[str, Any], kind: str, photos: bool) -> str:
    """Of an adapter.

    Args:
      config: of the run.
      trained: its checkpoint's fingerprint.
      kind: the aggregator's.
      photos: whether there are embeddings of photos beside it.
    """
    made = (
        ""
        if not photos
        else """
`image_embeds.safetensors` holds `image_embeds`, made of the photos that were named at the export:
`ip_adapter_image_embeds=[load_file("image_embeds.safetensors")["image_embeds"]]`.
"""
    )
    see = """photos = [Image.open(path).convert("RGB") for path in PHOTOS]
pixels = pipe.feature_extractor(photos, return_tensors="pt").pixel_values
with torch.no_grad():
    embeddings = pipe.image_encoder(pixels).image_embeds[None]"""
    if config.image_encoder.kind != "clip":
        see = f"""with torch.no_grad():
    embeddings = FACES  # [1, N, D]: what the {config.image_encoder.kind} network sees"""
    pool = """    image = load("aggregator.json")(embeddings)
both = torch.cat([torch.zeros_like(image), image])[:, None]"""
    needs, given = PAGE, "ip_adapter_image_embeds=[both]"
    if kind == "resampler":
        needs, pool = "", "both = torch.cat([torch.zeros_like(embeddings), embeddings])[:, None]"
    if kind == "plus":
        needs, pool, given = "", "", "ip_adapter_image=[photos]"
        see = 'photos = [Image.open(path).convert("RGB") for path in PHOTOS]'
    layout = "Plus" if kind in ("resampler", "plus") else "plain"
    return f"""{_head("ip-adapter")}
# An IP-Adapter for sets of photos

In IP-Adapter's {layout} layout. What it is given is {_AGGREGATES[kind]}.

{_base(config, trained["unet"])}
It reads image embeddings of the encoder of hash `{trained["eye"]}`.

```python
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
{needs}
pipe = StableDiffusionPipeline.from_pretrained(BASE)
pipe.load_ip_adapter(
    ".", subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None
)
{see}
{pool}
pipe(
    "a photo of a smiling person",
    {given},
    guidance_scale={config.sampling.guidance:g},
).images[0].save("out.png")
```

Photos are cut to their central part first, a fraction of {config.data.crop:g} of the shorter side.
{made}"""


def person(config: ConfigDict, about: Mapping[str, Any], name: str) -> str:
    """Of a pipeline that has learnt one person."""
    return f"""{_head("dreambooth")}
# A pipeline that knows {name}

Call this person "{about["called"]}" in prompts; `StableDiffusionPipeline.from_pretrained(".")`.

{_base(config, about["unet"])}"""


def lora(config: ConfigDict, about: Mapping[str, Any], name: str) -> str:
    """Of a LoRA file."""
    return f"""{_head("lora")}
# A LoRA of {name}

Call this person "{about["called"]}" in prompts. On the base, `pipe.load_lora_weights(".")`
(diffusers needs peft for it).

{_base(config, about["unet"])}"""


def base(config: ConfigDict) -> str:
    """Of a base."""
    return f"""{_head("stable-diffusion")}
# A small base in Stable Diffusion's layout

Trained on {config.data.dataset}, {config.image_size} pixels;
`StableDiffusionPipeline.from_pretrained(".")`.
"""


def _head(tag: str) -> str:
    return f"---\nlibrary_name: diffusers\ntags: [persona_jax, {tag}]\n---\n"


def _base(config: ConfigDict, unet: str) -> str:
    return f"It belongs to the base `{config.pipeline}`, whose UNet has the hash `{unet}`.\n"
