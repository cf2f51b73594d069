"""Verification of exported files: diffusers samples from them, and the latents are compared.

Needs the extra ``torch``. Both sample in float32, ten DDIM steps from the same noise. The measure
is the norm of the difference of the final latents, relative to their norm.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from persona_jax.errors import UserError
from persona_jax.interop import lora_files
from persona_jax.models.adapter import Adapter
from persona_jax.models.aggregators import KINDS
from persona_jax.pipelines import generation, pipeline
from persona_jax.pipelines.pipeline import Pipeline
from persona_jax.runs import finished_run

PROMPT, STEPS, GUIDANCE = "a photo of a person", 10, 3.0
SETS = (1, 3, 9)
"""Numbers of references that an adapter is verified with."""
MOST = 1e-3
"""Maximal relative difference of the latents."""


def adapter_difference(run: finished_run.Run, folder: Path, base: Path) -> float:
    """The difference for an exported adapter, the largest over sets of random references.

    The reference uses the exported files alone, with the PyTorch aggregator.

    Args:
      run: that was exported.
      folder: of the exported files.
      base: folder of the base.

    Raises:
      UserError: diffusers is missing, or the latents differ too much.
    """
    reference = open_diffusers(base)
    import torch

    from persona_jax.interop import torch_aggregator

    reference.load_ip_adapter(
        str(folder), subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None
    )
    reference.set_ip_adapter_scale(1.0)
    adapter, encoder = run.adapter, run.encoder
    assert adapter is not None  # a run of an adapter has both
    assert encoder is not None
    blank, kind = adapter.blank, adapter.aggregator.kind

    def their_embeds(seen: torch.Tensor) -> torch.Tensor:
        """diffusers' embeddings of [1, n, D] or [1, n, L, D], the unconditional ones first."""
        if KINDS[kind].patches:
            nothing = torch.from_numpy(np.array(blank)).expand(seen.shape)
            return torch.cat([nothing, seen])
        if KINDS[kind].layout == "Plus":
            return torch.cat([torch.zeros_like(seen), seen])[:, None]
        with torch.no_grad():
            image = torch_aggregator.load(folder / "aggregator.json")(seen)
        return torch.cat([torch.zeros_like(image), image])[:, None]

    ours, worst = our_sampler(run.pipeline), 0.0
    shape = (1, max(SETS), *(() if blank is None else blank.shape[:1]), encoder.dim)
    seen = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for count in SETS:
        both = their_embeds(torch.from_numpy(seen[:, :count]))
        weights = jnp.asarray(np.arange(max(SETS)) < count, jnp.float32)[None]
        latents = ours([adapter], [generation.References(jnp.asarray(seen), weights)])
        theirs = diffusers_latents(reference, run.pipeline, ip_adapter_image_embeds=[both])
        worst = max(worst, apart(latents, theirs))
    return accepted(worst, run.pipeline)


def lora_difference(run: finished_run.Run, towers: Mapping, folder: Path, base: Path) -> float:
    """The difference for a LoRA file that diffusers loads on the base.

    Args:
      run: that was exported.
      towers: this package's, with the LoRA merged.
      folder: of the exported file.
      base: folder of the base.

    Raises:
      UserError: diffusers or PEFT is missing, or the latents differ too much.
    """
    reference = open_diffusers(base)
    try:
        reference.load_lora_weights(str(folder), weight_name=lora_files.FILE)
    except ValueError as error:
        raise UserError(
            f"verify: diffusers cannot load a LoRA ({error}); pip install peft", argument="verify"
        ) from error
    ours = our_sampler(run.pipeline, towers)()
    return accepted(apart(ours, diffusers_latents(reference, run.pipeline)), run.pipeline)


def base_difference(folder: Path) -> float:
    """The difference for a pipeline folder. Raises as :func:`adapter_difference`."""
    towers = [tower for tower in pipeline.TOWERS if tower != "image_encoder"]
    parts = pipeline.load(str(folder), only=towers, dtype=jnp.float32, param_dtype=jnp.float32)
    ours = our_sampler(parts)()
    return accepted(apart(ours, diffusers_latents(open_diffusers(folder), parts)), parts)


def open_diffusers(folder: Path) -> Any:
    """diffusers' StableDiffusionPipeline of a folder, float32."""
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise UserError(
            "verify: needs diffusers and torch; pip install 'persona-jax[torch]'",
            argument="verify",
        ) from error
    reference = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    if type(reference.scheduler) is not diffusers.DDIMScheduler:
        reference.scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config)
    reference.set_progress_bar_config(disable=True)
    return reference


def noise_for(parts: Pipeline) -> Float[np.ndarray, "1 h w C"]:
    """The initial noise of both samplers."""
    return np.random.default_rng(0).standard_normal((1, *parts.latent_shape), np.float32)


def our_sampler(
    parts: Pipeline, towers: Mapping | None = None
) -> Callable[..., Float[np.ndarray, "1 h w C"]]:
    """Makes this package's sampler, compiled once.

    Args:
      parts: the pipeline.
      towers: parameters that replace the pipeline's, by name.

    Returns:
      (adapters, references of each) → the final latents.
    """
    sampler = jax.jit(generation.make_latent_sampler(parts, steps=STEPS))
    frozen = generation.sampler_params(parts) | dict(towers or {})
    ids, negative_ids = (parts.tokenize([text])[0] for text in (PROMPT, ""))

    def latents(
        adapters: Sequence[Adapter] = (), references: Sequence[generation.References] = ()
    ) -> np.ndarray:
        request = generation.make_request(
            generation.picture_keys(0, 1),
            ids,
            negative_ids,
            references=references,
            guidance=GUIDANCE,
            noise=noise_for(parts),
        )
        with jax.default_matmul_precision("highest"):
            return np.asarray(sampler(frozen, tuple(adapters), request))

    return latents


def diffusers_latents(reference: Any, parts: Pipeline, **more: Any) -> Float[np.ndarray, "1 h w C"]:
    """The final latents of diffusers."""
    import torch

    noise = torch.from_numpy(np.ascontiguousarray(noise_for(parts).transpose(0, 3, 1, 2)))
    latents = reference(
        PROMPT,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=parts.image_size,
        width=parts.image_size,
        output_type="latent",
        **more,
    ).images
    return latents.numpy().transpose(0, 2, 3, 1)


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    reference = theirs.astype(np.float64)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def accepted(difference: float, parts: Pipeline) -> float:
    """Returns the difference of latents of a pipeline if it is small enough.

    Raises:
      UserError: it is above :data:`MOST`.
    """
    if difference <= MOST:
        return difference
    dtype = parts.tower("unet").module.dtype
    half = dtype not in (None, jnp.float32)
    cause = f"; it was sampled in {dtype}, use float32 (config.dtype)"
    raise UserError(
        f"verify: latents differ by {difference:.1e} from stock diffusers', more than "
        f"{MOST:.0e}; nothing was written{cause if half else ''}",
        argument="verify",
    )
