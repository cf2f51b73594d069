"""IP-Adapter's published layouts: ``image_proj.*`` and ``ip_adapter.{k}.to_k_ip/to_v_ip``.

``image_proj`` is a linear map in the plain layout, a resampler in the Plus layout. k is the layer's
index in diffusers' ``attn_processors``: cross-attention layers are odd, the mid block is last.
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
    """Writes an adapter without its aggregator as a safetensors file that diffusers loads.

    Args:
      params: ``{"image_proj": …, "ip_adapter": {layer: {"to_k", "to_v"}}}``.
      config: of the UNet.
      file: where to write.
      dtype: of the tensors.
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
    """Copies an adapter from safetensors to the nested ``.bin`` format for older programs.

    Args:
      file: safetensors, from :func:`save_ip_adapter`.
      nested: the ``.bin`` file to write.

    Raises:
      UserError: torch is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{nested}: needs torch; pip install -e '.[torch]'") from error
    from safetensors.torch import load_file

    out: dict[str, dict] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(file).items():
        part, _, rest = name.partition(".")
        out[part][rest] = tensor
    with files.whole_file(nested) as whole, files.as_os_error(nested, RuntimeError):
        torch.save(out, whole)


def plus_dim(file: Path) -> int | None:
    """D of the embeddings that an adapter in the Plus layout reads; None for a plain one.

    Raises:
      UserError: the file is missing, or not a tensor file.
    """
    shape = _open(file).shapes.get("image_proj.proj_in.weight", ())
    return shape[1] if len(shape) == 2 else None


def load_ip_adapter(file: Path, config: UNetConfig, kernels: Mapping, embedding_dim: int) -> dict:
    """Reads an adapter, float32.

    Args:
      file: safetensors, or the nested ``.bin``.
      config: of the UNet that it is for.
      kernels: that UNet's text W_k, W_v; the adapter's W'_k, W'_v must have the same shapes.
      embedding_dim: D of the image embeddings, or patches, that it will read.

    Returns:
      ``{"image_proj": …, "ip_adapter": {layer: {"to_k", "to_v"}}}``.

    Raises:
      UserError: the file is missing, or an adapter of another kind or for another base; tensors are
        missing, unexpected or misshapen (all named); numbers are not finite.
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
    loaded = tensors.load_tree(abstract, files, dtype=jnp.float32)
    if huge := finite.beyond(loaded, float(np.finfo(np.float16).max)):
        raise UserError(f"{file}: {huge}, which no adapter has; fetch or save it again")
    numbered = [loaded["ip_adapter"][str(2 * i + 1)] for i in range(len(layers))]
    renamed = {
        layer: {"to_k": pair["to_k_ip"], "to_v": pair["to_v_ip"]}
        for layer, pair in zip(layers, numbered, strict=True)
    }
    return {"image_proj": loaded["image_proj"], "ip_adapter": renamed}


def _open(file: Path) -> tensors.Tensors:
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected an IP-Adapter, .safetensors or .bin")
    return open_tensors(file)


def _projection(files: tensors.Tensors, token_dim: int, embedding_dim: int) -> dict:
    """Parameters with the shapes of the file's ``image_proj``; their values are arbitrary."""
    latents, to_q = (
        files.shapes.get(f"image_proj.{name}", ()) for name in ("latents", "layers.0.0.to_q.weight")
    )
    if not latents:
        plain = ImageProjection(token_dim, TOKENS)
        return plain.init(jax.random.key(0), jnp.zeros((1, embedding_dim)))["params"]
    network = resampler.for_tokens(token_dim)
    if len(latents) == 3 and len(to_q) == 2:  # width, tokens and heads as in the file
        network = resampler.Resampler(token_dim, latents[2], to_q[0], latents[1])
    inputs = jnp.zeros((1, 1, embedding_dim)), jnp.ones((1, 1))
    return network.init(jax.random.key(0), *inputs)["params"]


def _refuse_other_kinds(files: tensors.Tensors, config: UNetConfig) -> None:
    """Raises UserError for known kinds of adapters that are not supported."""
    names, where = files.shapes, files.where
    if "image_proj.latents" in names:
        depth = {name.split(".")[2] for name in names if name.startswith("image_proj.layers.")}
        if len(depth) != resampler.DEPTH:
            raise UserError(
                f"{where}: an IP-Adapter-Plus file of depth {len(depth)}; those for Stable "
                f"Diffusion 1.5 have {resampler.DEPTH}, and diffusers supports no other"
            )
        inner = names.get("image_proj.layers.0.0.to_q.weight", (resampler.HEAD,))[0]
        if inner % resampler.HEAD:
            raise UserError(
                f"{where}: image_proj.layers.0.0.to_q has width {inner}, which does not divide "
                f"into heads of {resampler.HEAD}"
            )
    if any(name.startswith(("image_proj.proj.0.", "image_proj.perceiver")) for name in names):
        raise UserError(
            f"{where}: an IP-Adapter-FaceID or full-face file; supported are the plain layout, "
            "whose image_proj.proj is one linear map, and Plus"
        )
    widths = {shape[1] for name, shape in names.items() if "to_k_ip" in name and len(shape) == 2}
    if widths and config.cross_attention_dim not in widths:
        raise UserError(
            f"{where}: made for text of width {', '.join(map(str, sorted(widths)))}, but this "
            f"base has {config.cross_attention_dim} (Stable Diffusion 1.5: 768, SDXL: 2048)"
        )
