"""The benchmark items in PyTorch: diffusers and transformers."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sizes import MATRIX, PHOTOS, SCHEDULE, TEXT_LENGTH, Size

ON_GPU = torch.cuda.is_available()


def make(
    what: str, size: Size, folder: Path, dtype: str, *, compiled: bool = False
) -> Callable[[], None]:
    """Returns the function that runs an item, on the GPU if there is one.

    Args:
      compiled: use ``torch.compile``.
    """
    torch.manual_seed(0)
    torch.set_default_device("cuda" if ON_GPU else "cpu")

    def load(cls: type, name: str) -> torch.nn.Module:
        return _load(cls, folder / name, getattr(torch, dtype), compiled)

    work = {
        "matmul": _matmul,
        "unet": _unet,
        "sampling": _sampling,
        "step": _step,
        "whole_step": _whole_step,
        "vae_encode": _vae_encode,
        "vae_decode": _vae_decode,
        "clip": _clip,
    }[what](size, load, getattr(torch, dtype))

    def once() -> None:
        work()
        if ON_GPU:
            torch.cuda.synchronize()

    return once


def device_memory() -> int | None:
    """Returns the GPU's peak memory in bytes; None without a GPU."""
    return torch.cuda.max_memory_allocated() if ON_GPU else None


def count(work: Callable[[], None]) -> int:
    """Returns the floating-point operations of one call: products, convolutions, attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


Loader = Callable[[type, str], torch.nn.Module]
"""(class, name of its folder) → the network."""


def _load(cls: type, folder: Path, dtype: torch.dtype, compiled: bool) -> torch.nn.Module:
    network = cls.from_pretrained(folder, dtype=dtype).eval()
    if ON_GPU:
        network.to("cuda")
    if compiled:
        network.to(memory_format=torch.channels_last)
        network.compile()
        if isinstance(network, diffusers.AutoencoderKL):
            network.encode, network.decode = map(torch.compile, (network.encode, network.decode))
    return network


def _matmul(size: Size, load: Loader, dtype: torch.dtype) -> Callable[[], None]:
    a, b = torch.randn(2, *(MATRIX["gpu" if ON_GPU else "cpu"],) * 2).to(dtype)
    return _no_grad(lambda: a @ b)


def _inputs(size: Size, dtype: torch.dtype) -> tuple:
    side, text = size.unet["sample_size"], size.unet["cross_attention_dim"]
    latents = torch.randn(size.batch, size.vae["latent_channels"], side, side, dtype=dtype)
    hidden = torch.randn(size.batch, TEXT_LENGTH, text, dtype=dtype)
    photos = torch.randn(size.batch, PHOTOS, size.image_encoder["projection_dim"], dtype=dtype)
    return latents, hidden, photos


def _no_grad(run: Callable[[], object]) -> Callable[[], None]:
    def once() -> None:
        with torch.inference_mode():
            run()

    return once


def _unet(size: Size, load: Loader, dtype: torch.dtype) -> Callable[[], None]:
    unet = load(diffusers.UNet2DConditionModel, "unet")
    latents, hidden, _ = _inputs(size, dtype)
    return _no_grad(lambda: unet(latents, torch.tensor(500), hidden))


def _with_adapter(unet: diffusers.UNet2DConditionModel, size: Size) -> None:
    """Loads a random plain IP-Adapter with diffusers' own loader."""
    dim, text = size.image_encoder["projection_dim"], size.unet["cross_attention_dim"]
    projection = {
        "proj.weight": torch.randn(4 * text, dim) * dim**-0.5,
        "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    keys = {
        f"{number}.to_{part}_ip.weight": unet.get_submodule(
            f"{name[:-10]}.to_{part}"
        ).weight.clone()
        for number, name in enumerate(unet.attn_processors)
        if "attn2" in name
        for part in "kv"
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])
    unet.to(unet.dtype)


def _sampling(size: Size, load: Loader, dtype: torch.dtype) -> Callable[[], None]:
    unet = load(diffusers.UNet2DConditionModel, "unet")
    vae = load(diffusers.AutoencoderKL, "vae")
    _with_adapter(unet, size)
    latents, hidden, photos = _inputs(size, dtype)
    scheduler = diffusers.DDIMScheduler.from_config(SCHEDULE)
    hidden = torch.cat([hidden, hidden])
    image = photos.mean(dim=1)
    embeds = {"image_embeds": [torch.cat([torch.zeros_like(image), image])[:, None]]}

    def generate() -> None:
        scheduler.set_timesteps(size.steps)
        z = latents
        for t in scheduler.timesteps:
            both = unet(torch.cat([z, z]), t, hidden, added_cond_kwargs=embeds).sample
            negative, positive = both.chunk(2)
            z = scheduler.step(negative + 7.5 * (positive - negative), t, z).prev_sample
        vae.decode(z / vae.config.scaling_factor)

    return _no_grad(generate)


def _whole_step(size: Size, load: Loader, dtype: torch.dtype) -> Callable[[], None]:
    unet = load(diffusers.UNet2DConditionModel, "unet").train()
    latents, hidden, _ = _inputs(size, dtype)
    return _training(size, [*unet.parameters()], latents, lambda z, t: unet(z, t, hidden))


def _step(size: Size, load: Loader, dtype: torch.dtype) -> Callable[[], None]:
    unet = load(diffusers.UNet2DConditionModel, "unet")
    unet.requires_grad_(False)
    _with_adapter(unet, size)
    latents, hidden, photos = _inputs(size, dtype)
    trainable = [*unet.encoder_hid_proj.parameters()]
    for processor in unet.attn_processors.values():
        if isinstance(processor, torch.nn.Module):
            trainable += processor.parameters()
    for parameter in trainable:
        parameter.requires_grad_(True)

    def predict(z: torch.Tensor, t: torch.Tensor):
        embeds = {"image_embeds": [photos.mean(dim=1)[:, None]]}
        return unet(z, t, hidden, added_cond_kwargs=embeds)

    return _training(size, trainable, latents, predict)


def _training(
    size: Size, trainable: list, latents: torch.Tensor, predict: Callable
) -> Callable[[], None]:
    scheduler = diffusers.DDPMScheduler.from_config(SCHEDULE)
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.01)
    t, noise = torch.full((size.batch,), 500), torch.randn_like(latents)

    def once() -> None:
        z = scheduler.add_noise(latents, noise, t)
        loss = torch.nn.functional.mse_loss(predict(z, t).sample.float(), noise.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return once


def _vae_encode(size: Size, load: Loader, dtype: torch.dtype) -> Callable[[], None]:
    vae, side = load(diffusers.AutoencoderKL, "vae"), size.vae["sample_size"]
    pixels = torch.randn(1, 3, side, side, dtype=dtype)
    return _no_grad(lambda: vae.encode(pixels))


def _vae_decode(size: Size, load: Loader, dtype: torch.dtype) -> Callable[[], None]:
    vae, side = load(diffusers.AutoencoderKL, "vae"), size.unet["sample_size"]
    latents = torch.randn(1, size.vae["latent_channels"], side, side, dtype=dtype)
    return _no_grad(lambda: vae.decode(latents))


def _clip(size: Size, load: Loader, dtype: torch.dtype) -> Callable[[], None]:
    cls = transformers.CLIPVisionModelWithProjection
    encoder, side = load(cls, "image_encoder"), size.image_encoder["image_size"]
    pixels = torch.randn(1, 3, side, side, dtype=dtype)
    return _no_grad(lambda: encoder(pixels))
