"""README files of exports: what the files are, their base, and code that uses them.

The code runs as printed, once the lines that name the base and the photos are filled in.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ml_collections import ConfigDict

from persona_jax.interop.folders import SHIPPED
from persona_jax.interop.lora_files import FILE, KOHYA_FILE
from persona_jax.models.aggregators import KINDS

_LOAD_PHOTO = """
def load_photo(path):
    \"\"\"Rotated by its EXIF tag and cropped to the central square, as in training.\"\"\"
    photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    side = max(1, round(CROP * min(photo.size)))
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.crop((left, top, left + side, top + side))

"""

_DIFFUSERS_ONLY = """
**For diffusers only.** IP-Adapter's own code and ComfyUI expect that a Plus file reads the image
encoder's penultimate hidden states, one token per patch. This one reads `image_embeds`, one token
per photo. Where the sizes happen to agree, they load it without an error and generate nonsense.
"""

_PLUS = """
As published Plus files do, it reads the image encoder's penultimate hidden states, photo by photo.
"""


def ip_adapter(
    config: ConfigDict,
    trained: Mapping[str, Any],
    kind: str,
    photos: bool,
    extractor: Mapping[str, Any] | None = None,
) -> str:
    """The README of an adapter.

    Args:
      config: of the run.
      trained: the fingerprint of the run's checkpoint.
      kind: of the aggregator.
      photos: whether embeddings of photos are exported with it.
      extractor: settings of CLIPImageProcessor, if the base has none.
    """
    about = KINDS[kind]
    notes = "" if about.layout == "plain" else _PLUS if about.patches else _DIFFUSERS_ONLY
    clip = config.image_encoder.kind == "clip"
    parts = _reading(config, kind, extractor) if clip else _embeds_file(config)
    embeds = """
`image_embeds.safetensors` holds `image_embeds` of the photos given at the export, preceded by those
of the unconditional branch (of zeros, or of an empty image). Pass
`ip_adapter_image_embeds=[load_file("image_embeds.safetensors")["image_embeds"]]` in place of the
above; at a guidance of 1 pass the second half only, `[1:]`.
"""
    return f"""{_head("ip-adapter")}
# An IP-Adapter for sets of photos

In IP-Adapter's {about.layout} layout. Its input is {about.gives}.
{notes}
{_base(config, trained["unet"])}
Its image encoder has the hash `{trained["image_encoder"]}`.

```python
{parts}```

One person per call: diffusers uses the same photos for all images of a batch. Photos are cropped
to a central square, {config.data.crop:g} of the shorter side.
{embeds if photos else ""}"""


def _reading(config: ConfigDict, kind: str, extractor: Mapping[str, Any] | None) -> str:
    """Code from photos to an image, with CLIP's encoder."""
    plus, resampler = KINDS[kind].patches, KINDS[kind].layout == "Plus"
    encoder, more, classes = "", "", []
    if path := config.image_encoder.path:
        inside = PurePosixPath(path).parts[2:]
        hub = inside and not path.startswith((".", "/", "~"))
        place = f'"{"/".join(PurePosixPath(path).parts[:2])}", subfolder="{"/".join(inside)}"'
        encoder += (
            "image_encoder = CLIPVisionModelWithProjection.from_pretrained("
            f"{place if hub else repr(path)})  # of the hash above\n"
        )
        more += ", image_encoder=image_encoder"
        classes.append("CLIPVisionModelWithProjection")
    if extractor is not None:
        encoder += f"feature_extractor = CLIPImageProcessor(**{dict(extractor)!r})\n"
        more += ", feature_extractor=feature_extractor"
        classes.append("CLIPImageProcessor")
    imported = f"from transformers import {', '.join(sorted(classes))}\n" if classes else ""
    if not resampler:
        imported += "\nfrom aggregator import load  # the file beside this one\n"
    if plus:
        read = "photos = [load_photo(path) for path in PHOTOS]\n"
    else:
        pooled = "embeddings" if resampler else 'load("aggregator.json")(embeddings)'
        read = f"""photos = [load_photo(path) for path in PHOTOS]
pixels = pipe.feature_extractor(photos, return_tensors="pt")
with torch.no_grad():
    embeddings = pipe.image_encoder(pixels.pixel_values).image_embeds[None]  # [1, N, D]
    image = {pooled}[:, None]
# With guidance, the unconditional embedding (zeros: no photo) comes first.
embeds = torch.cat([torch.zeros_like(image), image]) if GUIDANCE > 1 else image
"""
    torch = "" if plus else "import torch\n"
    given = "ip_adapter_image=[photos]" if plus else "ip_adapter_image_embeds=[embeds]"
    return f"""{torch}from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageOps
{imported}
{_base_line(config)}
PHOTOS = ["1.jpg", "2.jpg", "3.jpg"]  # of one person
CROP, GUIDANCE = {config.data.crop:g}, {config.sampling.guidance:g}

{_LOAD_PHOTO}
{encoder}pipe = StableDiffusionPipeline.from_pretrained(BASE{more}, safety_checker=None)
{_ADAPTER}
{read}{_sampling_code(config, given)}"""


_DDIM = """if type(pipe.scheduler) is not DDIMScheduler:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"""

_ADAPTER = f"""{_DDIM}
pipe.load_ip_adapter(
    ".", subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None
)"""


def _embeds_file(config: ConfigDict) -> str:
    """Code from exported embeddings to an image, for encoders that diffusers cannot run."""
    return f"""from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

{_base_line(config)}
GUIDANCE = {config.sampling.guidance:g}
pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
{_ADAPTER}
# Of the photos given with --photos at the export: diffusers cannot run the image encoder
# ({config.image_encoder.kind}).
embeds = load_file("image_embeds.safetensors")["image_embeds"]
embeds = embeds if GUIDANCE > 1 else embeds[1:]
{_sampling_code(config, "ip_adapter_image_embeds=[embeds]")}"""


def _sampling_code(config: ConfigDict, given: str) -> str:
    sampling = config.sampling
    return f"""pipe.set_ip_adapter_scale({sampling.scale:g})
pipe(
    "a photo of a person",
    {given},
    guidance_scale=GUIDANCE,
    num_inference_steps={sampling.steps},
    eta={sampling.eta:g},
).images[0].save("out.png")
"""


def person(config: ConfigDict, about: Mapping[str, Any], name: str) -> str:
    """The README of a pipeline fine-tuned for one person."""
    return f"""{_head("dreambooth")}
# A pipeline fine-tuned for {name}

Call this person "{about["called"]}" in prompts.

{_base(config, about["unet"])}
```python
{_text_alone(config, about, 'BASE = "."  # this folder', "")}```
"""


def lora(config: ConfigDict, about: Mapping[str, Any], name: str) -> str:
    """The README of a LoRA file."""
    load = f'pipe.load_lora_weights(".", weight_name="{FILE}")  # needs peft\n'
    return f"""{_head("lora")}
# A LoRA of {name}

Call this person "{about["called"]}" in prompts.

`{FILE}` is in PEFT's layout, with its α of {config.lora.alpha:g} in the metadata, which
diffusers 0.34 and newer read. `{KOHYA_FILE}` is the same in kohya's layout with α as tensors, for
ComfyUI, A1111's web UI and older diffusers.

{_base(config, about["unet"])}
```python
{_text_alone(config, about, _base_line(config), load)}```
"""


def _text_alone(config: ConfigDict, about: Mapping[str, Any], base: str, load: str) -> str:
    sampling = config.sampling
    return f"""from diffusers import DDIMScheduler, StableDiffusionPipeline

{base}
pipe = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
{_DDIM}
{load}pipe(
    "a photo of a {about["called"]}",
    guidance_scale={sampling.guidance:g},
    num_inference_steps={sampling.steps},
    eta={sampling.eta:g},
).images[0].save("out.png")
"""


def base(config: ConfigDict) -> str:
    """The README of a base."""
    return f"""{_head("stable-diffusion")}
# A small base in Stable Diffusion's layout

Trained on {config.data.dataset}, {config.image_size} pixels;
`StableDiffusionPipeline.from_pretrained(".")`.
"""


def _head(tag: str) -> str:
    return f"---\nlibrary_name: diffusers\ntags: [persona_jax, {tag}]\n---\n"


def _base(config: ConfigDict, unet: str) -> str:
    return f"Its base is `{config.pipeline}`, whose UNet has the hash `{unet}`.\n"


def _base_line(config: ConfigDict) -> str:
    if config.pipeline in SHIPPED:
        inside = f'files("persona_jax") / "assets/{config.pipeline}/pipeline"'
        return f"from importlib.resources import files\n\nBASE = str({inside})"
    return f"BASE = {config.pipeline!r}"
