"""IP-Adapter's published layouts: ``image_proj.*`` and ``ip_adapter.{k}.to_k_ip/to_v_ip``.

Plain and Plus differ in ``image_proj``: a linear map, or a resampler. k numbers the layers as
diffusers' ``attn_processors`` does: odd for cross-attention, mid last.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from persona_jax.errors import UserError
from persona_jax.interop import tensors
from persona_jax.interop.torch_files import open_tensors
from persona_jax.models import resampler
from persona_jax.models.adapter import TOKENS, ImageProjection
from persona_jax.models.unet import UNetConfig, cross_attention_layers
from persona_jax.runtime import files, finite


def save_ip_adapter(
    params: Mapping, config: UNetConfig, file: Path, dtype: DTypeLike = np.float32
) -> None:
    """Writes an adapter without its aggregator as one safetensors file that stock diffusers loads.

    params: ``{"image_proj": …, "ip_adapter": {layer: {"to_k", "to_v"}}}``. config: of the UNet.
    """
    numbered = {
        str(2 * i + 1): {
            f"{name}_ip": params["ip_adapter"][layer][name] for name in ("to_k", "to_v")
        }
        for i, layer in enumerate(cross_attention_layers(config))
    }
    tree = {"image_proj": params["image_proj"], "ip_adapter": numbered}
    tensors.save_tree(jax.tree.map(lambda x: np.asarray(x, dtype), tree), file)


def save_ip_adapter_bin(file: Path, nested: Path) -> None:
    """Writes a safetensors adapter once more as the nested ``.bin`` that older readers take.

    Raises:
      UserError: torch is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{nested}: takes torch; pip install -e '.[torch]'") from error
    from safetensors.torch import load_file

    out: dict[str, dict] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(file).items():
        part, _, rest = name.partition(".")
        out[part][rest] = tensor
    with files.whole_file(nested) as part, files.as_os_error(nested, RuntimeError):
        torch.save(out, part)


def plus_dim(file: Path) -> int | None:
    """D of what an adapter in the Plus layout reads; None of a plain one.

    Raises:
      UserError: no such file, or none of tensors.
    """
    shape = _open(file).shapes.get("image_proj.proj_in.weight", ())
    return shape[1] if len(shape) == 2 else None


def load_ip_adapter(file: Path, config: UNetConfig, kernels: Mapping, embedding_dim: int) -> dict:
    """Reads such a file, float32.

    Args:
      file: safetensors, or the nested ``.bin``.
      config: of the UNet that it is for.
      kernels: that UNet's text W_k, W_v, whose shapes the adapter's must have.
      embedding_dim: D of the image embeddings, or of the patches, that it is to read.

    Raises:
      UserError: no such file; an adapter of another kind or for another base; every missing,
        unexpected and misshapen tensor, by name; numbers that are not finite.
    """
    files = _open(file)
    _refuse_other_kinds(files, config)
    layers = cross_attention_layers(config)
    abstract = jax.eval_shape(
        lambda: {
            "image_proj": _projection(files, config.cross_attention_dim, embedding_dim),
            "ip_adapter": {
                str(2 * i + 1): {f"{name}_ip": kernels[layer][name] for name in ("to_k", "to_v")}
                for i, layer in enumerate(layers)
            },
        }
    )
    found = tensors.load_tree(abstract, files, dtype=jnp.float32)
    if huge := finite.beyond(found, float(np.finfo(np.float16).max)):
        raise UserError(f"{file}: {huge}, which no adapter has; fetch or save it again")
    numbered = [found["ip_adapter"][str(2 * i + 1)] for i in range(len(layers))]
    renamed = {
        layer: {"to_k": its["to_k_ip"], "to_v": its["to_v_ip"]}
        for layer, its in zip(layers, numbered, strict=True)
    }
    return {"image_proj": found["image_proj"], "ip_adapter": renamed}


def _open(file: Path) -> tensors.Tensors:
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected an IP-Adapter, .safetensors or .bin")
    return open_tensors(file)


def _projection(files: tensors.Tensors, token_dim: int, embedding_dim: int) -> dict:
    """Parameters of such an ``image_proj`` as the file has; only their shapes count."""
    latents, to_q = (
        files.shapes.get(f"image_proj.{name}", ()) for name in ("latents", "layers.0.0.to_q.weight")
    )
    if not latents:
        plain = ImageProjection(token_dim, TOKENS)
        return plain.init(jax.random.key(0), jnp.zeros((1, embedding_dim)))["params"]
    network = resampler.for_tokens(token_dim)
    if len(latents) == 3 and len(to_q) == 2:  # of any width and number of tokens and heads
        network = resampler.Resampler(token_dim, latents[2], to_q[0], latents[1])
    nothing = jnp.zeros((1, 1, embedding_dim)), jnp.ones((1, 1))
    return network.init(jax.random.key(0), *nothing)["params"]


def _refuse_other_kinds(files: tensors.Tensors, config: UNetConfig) -> None:
    """Says what an adapter is that is known but not read here."""
    names, where = files.shapes, files.where
    if "image_proj.latents" in names:
        depth = {name.split(".")[2] for name in names if name.startswith("image_proj.layers.")}
        if len(depth) != resampler.DEPTH:
            raise UserError(
                f"{where}: an IP-Adapter-Plus file of depth {len(depth)}; those for Stable "
                f"Diffusion 1.5 have {resampler.DEPTH}, and stock diffusers reads no other"
            )
        inner = names.get("image_proj.layers.0.0.to_q.weight", (resampler.HEAD,))[0]
        if inner % resampler.HEAD:
            raise UserError(
                f"{where}: {inner} numbers in image_proj.layers.0.0.to_q do not make heads of "
                f"{resampler.HEAD}"
            )
    if any(name.startswith(("image_proj.proj.0.", "image_proj.perceiver")) for name in names):
        raise UserError(
            f"{where}: an IP-Adapter-FaceID or full-face file; what is read are the plain layout, "
            "whose image_proj.proj is one linear map, and Plus"
        )
    widths = {shape[1] for name, shape in names.items() if "to_k_ip" in name and len(shape) == 2}
    if widths and config.cross_attention_dim not in widths:
        raise UserError(
            f"{where}: made for text of width {', '.join(map(str, sorted(widths)))}, but this "
            f"base has {config.cross_attention_dim} (Stable Diffusion 1.5: 768, SDXL: 2048)"
        )
