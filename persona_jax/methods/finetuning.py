"""Per-person fine-tuning: DreamBooth and LoRA.

Both train on a person's photos, whose prompts contain a rare token ("a photo of sks person"), and
on class images that the frozen base generates ("a photo of a person"), so that the noun keeps its
meaning (prior preservation, Ruiz et al. 2023). DreamBooth trains the UNet, and the text encoder
with ``train_text_encoder``; LoRA trains low-rank updates of the UNet's attention projections.

Q people are trained independently in one compiled program. Q is the first axis of the trainable
tree and the second axis of the photos; their first axis, the batch, is sharded over devices.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from persona_jax.diffusion.loss import denoising_loss, draw_steps, example_keys
from persona_jax.errors import UserError
from persona_jax.interop import folders
from persona_jax.interop.lora_files import load_lora
from persona_jax.methods.adapter_training import trained_unet
from persona_jax.models import lora
from persona_jax.models.attention import Source, project_keys_values
from persona_jax.models.clip import TextOutput
from persona_jax.models.unet import text_kernels
from persona_jax.models.vae import draw_latents
from persona_jax.pipelines.pipeline import Pipeline, load, require_trained_on
from persona_jax.runtime import buckets
from persona_jax.training.state import LossFn, StepFn, make_optimizer, make_step

METHODS = ("dreambooth", "lora")
TOWERS = ("unet", "text_encoder")
"""The parts of the base that fine-tuning may replace or update."""


def insert_token(prompt: str, token: str, nouns: Sequence[str]) -> str:
    """Inserts the rare token before the first of the nouns in the prompt: "a sks person".

    A prompt that contains the token before a noun is returned unchanged.

    Raises:
      UserError: none of the nouns is in the prompt.
    """
    noun = f"({'|'.join(map(re.escape, nouns))})"
    if re.search(rf"\b{re.escape(token)} {noun}\b", prompt):
        return prompt
    renamed, count = re.subn(rf"\b{noun}\b", rf"{token} \1", prompt, count=1)
    if not count:
        known = " or ".join(map(repr, nouns))
        raise UserError(f"prompt {prompt!r}: no {known} to put {token!r} before; add one")
    return renamed


def require_trained_on_base(person: Path, pipeline: Pipeline) -> None:
    """Raises UserError if a person's ``person.json`` names another base."""
    trained = folders.read_json(person / "person.json")
    for tower in TOWERS:
        now = pipeline.tower(tower).hash
        require_trained_on(person.parents[1], pipeline.source, now, trained.get(tower))


def init(config: ConfigDict, pipeline: Pipeline, keys: Key[Array, " Q"]) -> dict:
    """Initialises the trainable trees of Q people from the base, or from ``config.init_from``.

    Args:
      config: of the run.
      pipeline: the base.
      keys: one per person.

    Returns:
      A float32 tree whose arrays have first axis Q. dreambooth: ``{"unet": …}``, with
      ``"text_encoder"`` if ``config.train_text_encoder``; lora: ``{"lora": …}``, of rank
      ``config.lora.rank``.

    Raises:
      UserError: a rank below 1, or weights that do not fit (:func:`init_from_weights`).
    """
    fresh = _fresh(config, pipeline, keys)
    return init_from_weights(config, pipeline, fresh) if config.init_from else fresh


def _fresh(config: ConfigDict, pipeline: Pipeline, keys: Key[Array, " Q"]) -> dict:
    if config.method == "lora":
        if config.lora.rank < 1:
            raise UserError(f"config.lora.rank={config.lora.rank}; at least 1")
        unet = pipeline.tower("unet")
        return {"lora": jax.vmap(lambda k: lora.init(k, unet.params, config.lora.rank))(keys)}
    return {
        name: jax.tree.map(
            lambda x: jnp.repeat(jnp.asarray(x, jnp.float32)[None], len(keys), axis=0),
            pipeline.tower(name).params,
        )
        for name in trained(config)
    }


def init_from_weights(config: ConfigDict, pipeline: Pipeline, fresh: Mapping) -> dict:
    """Initialises all Q people from the weights that ``config.init_from`` names.

    For lora this is a LoRA file of the same rank and layers; for dreambooth, a pipeline folder with
    the base's shapes.

    Args:
      config: of the run.
      pipeline: the base.
      fresh: the trainable tree that :func:`init` makes without ``init_from``, first axis Q.

    Returns:
      A float32 tree of the shapes of `fresh`.

    Raises:
      UserError: the weights do not fit, or cannot be read.
    """
    source = config.init_from
    if config.method == "lora":
        frozen = {name: pipeline.tower(name).params for name in TOWERS}
        loaded = load_lora(buckets.local(source), frozen)
        scale = config.lora.alpha / config.lora.rank  # load_lora has multiplied B by it
        learnt = {
            layer: {**update, "lora_B": {"kernel": update["lora_B"]["kernel"] / scale}}
            for layer, update in loaded.pop("unet", {}).items()
        }
        one = {"lora": learnt, **loaded}
    else:
        other = load(source, only=trained(config), dtype=jnp.float32, param_dtype=jnp.float32)
        one = {name: other.tower(name).params for name in trained(config)}

    def shapes(tree: Mapping, first: int) -> dict:
        flat = traverse_util.flatten_dict(dict(tree))
        return {".".join(path): np.shape(leaf)[first:] for path, leaf in flat.items()}

    have, want = shapes(one, 0), shapes(fresh, 1)
    if have != want:
        mismatches = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
        listed = ", ".join(f"{k}: {have.get(k)} there, {want.get(k)} here" for k in mismatches[:6])
        raise UserError(f"config.init_from={source}: it does not fit ({listed})")
    return jax.tree.map(
        lambda x, like: jnp.broadcast_to(jnp.asarray(x, jnp.float32), like.shape), one, dict(fresh)
    )


def trained(config: ConfigDict) -> tuple[str, ...]:
    """The towers whose full weights are trained; none for LoRA."""
    if config.method == "lora":
        return ()
    return ("unet", "text_encoder") if config.train_text_encoder else ("unet",)


def apply(config: ConfigDict, frozen: Mapping, learnt: Mapping) -> dict:
    """One person's towers, ``{"unet", "text_encoder"}``: the base's with the trained weights.

    Args:
      config: of the run.
      frozen: the base's towers; those of :func:`trained` may be left out.
      learnt: one person's trainable tree, without the axis Q.
    """
    if "lora" in learnt:
        scale = config.lora.alpha / config.lora.rank
        learnt = {"unet": lora.merge(frozen["unet"], learnt["lora"], scale)}
    return {name: (learnt if name in learnt else frozen)[name] for name in TOWERS}


def loss(config: ConfigDict, pipeline: Pipeline) -> LossFn:
    """The loss E ‖ε − ε_θ(z_t, t, c)‖² + λ E ‖ε' − ε_θ(z'_t', t', c')‖², the mean over people.

    The batch holds "moments" ``[B, Q, h, w, 2C]`` and "tokens" ``[B, Q, T]`` of each person's
    photos, "class_latents" ``[B, h, w, C]`` and "class_tokens" ``[B, T]`` of the class, and "index"
    ``[B]``, the example's position in the global order. The frozen tree is
    :func:`person_frozen_params`; λ is ``config.prior.weight``.

    Source: Ruiz et al. 2023, DreamBooth (prior preservation).
    """
    unet, text = trained_unet(config, pipeline), pipeline.tower("text_encoder").module
    schedule = pipeline.schedule
    scaling = pipeline.tower("vae").module.config.scaling_factor
    weight = config.prior.weight

    def errors(towers: Mapping, latents: Array, ids: Array, keys: Array) -> Array:
        """The denoising loss of each example ``[B]``."""
        noise_key, t_key = jax.vmap(jax.random.split)(keys).T
        # apply returns a tuple where collections are mutable
        hidden = cast(TextOutput, text.apply({"params": towers["text_encoder"]}, ids)).hidden
        kernels = text_kernels(towers["unet"], unet.config)
        source = Source(*project_keys_values(kernels, hidden))
        noise = jax.vmap(lambda k: jax.random.normal(k, latents.shape[1:]))(noise_key)

        def predict(z: Array, t: Array) -> Array:
            return cast(Array, unet.apply({"params": towers["unet"]}, z, t, (source,)))

        return denoising_loss(predict, schedule, latents, noise, draw_steps(t_key, schedule))

    def of_one(learnt: Mapping, frozen: Mapping, batch: Mapping, step: Array | int):
        towers = apply(config, frozen, learnt)
        keys = example_keys(config.seed, step, batch["index"])
        own_key, class_key, latent_key = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
        own = jax.vmap(lambda k, m: draw_latents(k, m, scaling))(latent_key, batch["moments"])
        # One UNet call for the person's photos and the class images.
        both = errors(
            towers,
            jnp.concatenate([own, batch["class_latents"]]),
            jnp.concatenate([batch["tokens"], batch["class_tokens"]]),
            jnp.concatenate([own_key, class_key]),
        )
        person, prior = jnp.split(both, 2)
        return person.mean() + weight * prior.mean(), {
            "person": person.mean(),
            "prior": prior.mean(),
        }

    def mean(learnt: Mapping, frozen: Mapping, batch: Mapping, step: Array | int):
        own = {name: 1 if name in ("moments", "tokens") else None for name in batch}
        total, parts = jax.vmap(of_one, in_axes=(0, None, own, None))(learnt, frozen, batch, step)
        return total.mean(), jax.tree.map(jnp.mean, parts)

    return mean


def person_frozen_params(config: ConfigDict, pipeline: Pipeline) -> dict:
    """The frozen tree of :func:`loss`: those of :data:`TOWERS` that are not :func:`trained`."""
    kept = set(TOWERS) - set(trained(config))
    return {name: pipeline.tower(name).params for name in sorted(kept)}


def make_people_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of ``config.people.at_once`` people."""
    return for_each(make_optimizer(config.optimizer), config.people.at_once)


def people_step(
    config: ConfigDict, pipeline: Pipeline, optimizer: optax.GradientTransformation, mesh: Mesh
) -> StepFn:
    """The compiled training step of :func:`loss`: what train runs and plan compiles."""
    return make_step(loss(config, pipeline), optimizer, mesh, accumulate=config.accumulate)


def for_each(optimizer: optax.GradientTransformation, count: int) -> optax.GradientTransformation:
    """Applies an optimizer to each person separately, so that clipping and scaling are per person.

    Args:
      optimizer: of one person.
      count: Q, the first axis of every array. :func:`loss` is a mean over Q, so gradients are
        multiplied by it.
    """

    def update(updates, state, params=None):
        own = jax.tree.map(lambda x: x * count, updates)
        return jax.vmap(optimizer.update)(own, state, params)

    return optax.GradientTransformation(jax.vmap(optimizer.init), update)
