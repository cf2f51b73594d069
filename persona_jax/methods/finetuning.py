"""Methods whose weights belong to one person: DreamBooth and LoRA.

Both learn from a person's photos, called by a rare token ("a photo of sks person"), and from
pictures of the class that the frozen base paints ("a photo of a person"), so that the noun keeps
its meaning (prior preservation, Ruiz et al. 2023). DreamBooth trains the UNet, and the text tower
if asked to; LoRA trains low-rank updates of the UNet's attention projections.

Q people are trained side by side, in one program, and know nothing of each other: Q is the first
axis of the trainable tree and the second of their photos, whose first is shared out among devices.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

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
from persona_jax.models.unet import text_kernels
from persona_jax.models.vae import draw_latents
from persona_jax.pipelines.pipeline import Pipeline, load, require_trained_on
from persona_jax.runtime import buckets
from persona_jax.training.state import LossFn, StepFn, make_optimizer, make_step

METHODS = ("dreambooth", "lora")
TOWERS = ("unet", "text_encoder")
"""What a person's weights may replace or update."""


def insert_token(prompt: str, token: str, nouns: Sequence[str]) -> str:
    """The prompt with the person's rare token before whichever of the nouns comes first: "a sks
    person". One that has it already stays as it is.

    Raises:
      UserError: none of the nouns is in the prompt.
    """
    noun = f"({'|'.join(map(re.escape, nouns))})"
    if re.search(rf"\b{re.escape(token)} {noun}\b", prompt):
        return prompt
    called, count = re.subn(rf"\b{noun}\b", rf"{token} \1", prompt, count=1)
    if not count:
        known = " or ".join(map(repr, nouns))
        raise UserError(f"prompt {prompt!r}: it has no {known} to call {token!r}; say one")
    return called


def require_trained_on_base(person: Path, pipeline: Pipeline) -> None:
    """Refuses a person's folder whose ``person.json`` names another base; raises UserError."""
    trained = folders.read_json(person / "person.json")
    for tower in TOWERS:
        now = getattr(pipeline, tower).hash
        require_trained_on(person.parents[1], pipeline.source, now, trained.get(tower))


def init(config: ConfigDict, pipeline: Pipeline, keys: Key[Array, " Q"]) -> dict:
    """The trainable tree of Q people, float32, first axis Q, each at the base.

    dreambooth: ``{"unet": …}``, with ``"text_encoder"`` where ``config.train_text_encoder``; lora:
    ``{"lora": …}``, of rank ``config.lora.rank``.

    Where ``config.init_from`` is given, see :func:`init_from_weights`.

    Raises:
      UserError: a rank below 1.
    """
    fresh = _fresh(config, pipeline, keys)
    return init_from_weights(config, pipeline, fresh) if config.init_from else fresh


def _fresh(config: ConfigDict, pipeline: Pipeline, keys: Key[Array, " Q"]) -> dict:
    if config.method == "lora":
        if config.lora.rank < 1:
            raise UserError(f"config.lora.rank={config.lora.rank}; at least 1")
        return {
            "lora": jax.vmap(lambda k: lora.init(k, pipeline.unet.params, config.lora.rank))(keys)
        }
    return {
        name: jax.tree.map(
            lambda x: jnp.repeat(jnp.asarray(x, jnp.float32)[None], len(keys), axis=0),
            getattr(pipeline, name).params,
        )
        for name in trained(config)
    }


def init_from_weights(config: ConfigDict, pipeline: Pipeline, fresh: Mapping) -> dict:
    """`fresh`, of Q people, with what ``config.init_from`` names for each of them: a LoRA file for
    lora, of the same rank and layers; a pipeline folder for dreambooth, of the base's shape.

    Raises:
      UserError: it does not fit, or cannot be read.
    """
    place = config.init_from
    if config.method == "lora":
        frozen = {name: getattr(pipeline, name).params for name in TOWERS}
        found = load_lora(buckets.local(place), frozen)
        scale = config.lora.alpha / config.lora.rank  # it is counted in, there
        learnt = {
            layer: {**update, "lora_B": {"kernel": update["lora_B"]["kernel"] / scale}}
            for layer, update in found.pop("unet", {}).items()
        }
        one = {"lora": learnt, **found}
    else:
        other = load(place, only=trained(config), dtype=jnp.float32, param_dtype=jnp.float32)
        one = {name: getattr(other, name).params for name in trained(config)}

    def shapes(tree: Mapping, first: int) -> dict:
        flat = traverse_util.flatten_dict(dict(tree))
        return {".".join(path): np.shape(leaf)[first:] for path, leaf in flat.items()}

    have, want = shapes(one, 0), shapes(fresh, 1)
    if have != want:
        wrong = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
        told = ", ".join(f"{k}: {have.get(k)} there, {want.get(k)} here" for k in wrong[:6])
        raise UserError(f"config.init_from={place}: it does not fit ({told})")
    return jax.tree.map(
        lambda x, like: jnp.broadcast_to(jnp.asarray(x, jnp.float32), like.shape), one, dict(fresh)
    )


def trained(config: ConfigDict) -> tuple[str, ...]:
    """The towers that are trained whole, in place of the base's."""
    if config.method == "lora":
        return ()
    return ("unet", "text_encoder") if config.train_text_encoder else ("unet",)


def apply(config: ConfigDict, frozen: Mapping, learnt: Mapping) -> dict:
    """One person's towers, ``{"unet", "text_encoder"}``: what was learnt in place of the base's.

    Args:
      config: of the run.
      frozen: the base's towers; those that are trained whole may be left out.
      learnt: one person's trainable tree (no axis of people).
    """
    if "lora" in learnt:
        scale = config.lora.alpha / config.lora.rank
        learnt = {"unet": lora.merge(frozen["unet"], learnt["lora"], scale)}
    return {name: (learnt if name in learnt else frozen)[name] for name in TOWERS}


def loss(config: ConfigDict, pipeline: Pipeline) -> LossFn:
    """E ‖ε − ε_θ(z_t, t, c)‖² + λ E ‖ε' − ε_θ(z'_t', t', c')‖², the mean over people.

    The batch: "moments" ``[B, Q, h, w, 2C]`` and "tokens" ``[B, Q, T]`` of each person's photos,
    "class_latents" ``[B, h, w, C]`` and "class_tokens" ``[B, T]`` of the class, and "index"
    ``[B]``, the example's place in the global order. The frozen tree: those of the base's
    :data:`TOWERS` that are not :func:`trained`.
    """
    unet, text = trained_unet(config, pipeline), pipeline.text_encoder.module
    schedule = pipeline.schedule
    scaling, weight = pipeline.vae.module.config.scaling_factor, config.prior.weight

    def errors(towers: Mapping, latents: Array, ids: Array, keys: Array) -> Array:
        """Of each example ``[B]``."""
        noise_key, t_key = jax.vmap(jax.random.split)(keys).T
        hidden = text.apply({"params": towers["text_encoder"]}, ids).hidden
        kernels = text_kernels(towers["unet"], unet.config)
        source = Source(*project_keys_values(kernels, hidden))
        noise = jax.vmap(lambda k: jax.random.normal(k, latents.shape[1:]))(noise_key)

        def predict(z: Array, t: Array) -> Array:
            return unet.apply({"params": towers["unet"]}, z, t, (source,))

        return denoising_loss(predict, schedule, latents, noise, draw_steps(t_key, schedule))

    def of_one(learnt: Mapping, frozen: Mapping, batch: Mapping, step: Array | int):
        towers = apply(config, frozen, learnt)
        keys = example_keys(config.seed, step, batch["index"])
        own_key, class_key, latent_key = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
        own = jax.vmap(lambda k, m: draw_latents(k, m, scaling))(latent_key, batch["moments"])
        # Person and class go through the UNet as one batch.
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
    """The frozen tree of :func:`loss`."""
    kept = set(TOWERS) - set(trained(config))
    return {name: getattr(pipeline, name).params for name in sorted(kept)}


def make_people_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser of ``config.people.at_once`` people."""
    return for_each(make_optimizer(config.optimizer), config.people.at_once)


def people_step(
    config: ConfigDict, pipeline: Pipeline, optimizer: optax.GradientTransformation, mesh: Mesh
) -> StepFn:
    """The compiled training step of :func:`loss`: what train runs and plan compiles."""
    return make_step(loss(config, pipeline), optimizer, mesh, accumulate=config.accumulate)


def for_each(optimizer: optax.GradientTransformation, count: int) -> optax.GradientTransformation:
    """The optimiser for `count` people side by side: each clipped and scaled by their own gradient.

    Args:
      optimizer: of one person.
      count: Q, the first axis of every array; :func:`loss` is a mean over them.
    """

    def update(updates, state, params=None):
        own = jax.tree.map(lambda x: x * count, updates)
        return jax.vmap(optimizer.update)(own, state, params)

    return optax.GradientTransformation(jax.vmap(optimizer.init), update)
