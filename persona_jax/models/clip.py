"""CLIP's text and vision towers, with the parameter names of transformers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from persona_jax.errors import UserError
from persona_jax.models import configs
from persona_jax.models.attention import merge_heads, split_heads

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}

# Settings of training, of text generation and of bookkeeping. They do not change what the tower
# computes. (Files saved by old versions of transformers list every setting it has.)
_IGNORED = {
    "add_cross_attention",
    "architectures",
    "attention_dropout",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dropout",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "model_type",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_word_embeddings",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The settings of ``text_encoder/config.json`` that change the result; names and defaults are
    those of transformers."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    @classmethod
    def from_json(cls, raw: Mapping) -> "CLIPTextConfig":
        """From the content of ``config.json``. UserError names unsupported settings."""
        return _parse(cls, raw)


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The settings of ``image_encoder/config.json`` that change the result; names and defaults are
    those of transformers."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, raw: Mapping) -> "CLIPVisionConfig":
        """From the content of ``config.json``. UserError names unsupported settings."""
        return _parse(cls, raw)


Config = TypeVar("Config", CLIPTextConfig, CLIPVisionConfig)


def _parse(cls: type[Config], raw: Mapping) -> Config:
    relevant = {key: value for key, value in raw.items() if key not in _IGNORED}
    config = configs.parse(cls, relevant, {})
    if config.hidden_act not in _ACTIVATIONS:
        raise UserError(
            f"{cls.__name__}: hidden_act={config.hidden_act!r}; known: {sorted(_ACTIVATIONS)}"
        )
    configs.divides("hidden_size", config.hidden_size, config.num_attention_heads, "heads")
    if isinstance(config, CLIPVisionConfig) and config.image_size < config.patch_size:
        raise UserError(f"image_size={config.image_size}: expected patch_size or more")
    return config


class _Attention(nn.Module):
    heads: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], causal: bool) -> Float[Array, "B T D"]:
        q, k, v = (
            split_heads(nn.Dense(x.shape[-1], dtype=self.dtype, name=f"{name}_proj")(x), self.heads)
            for name in "qkv"
        )
        out = merge_heads(jax.nn.dot_product_attention(q, k, v, is_causal=causal))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out_proj")(out)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    config: CLIPTextConfig | CLIPVisionConfig
    causal: bool
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """[B, T, D] → [B, T, D]."""
        config, dtype = self.config, self.dtype
        attention = _Attention(config.num_attention_heads, dtype=dtype, name="self_attn")
        x += attention(_norm(config, dtype, "layer_norm1")(x), self.causal)
        y = _norm(config, dtype, "layer_norm2")(x)
        y = nn.Dense(config.intermediate_size, dtype=dtype, name="mlp.fc1")(y)
        y = _ACTIVATIONS[config.hidden_act](y)
        return x + nn.Dense(x.shape[-1], dtype=dtype, name="mlp.fc2")(y)


def _norm(config: CLIPTextConfig | CLIPVisionConfig, dtype: jnp.dtype | None, name: str):
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name
    )


class TextOutput(NamedTuple):
    """Outputs of the text tower."""

    hidden: Float[Array, "B T D"]
    """Hidden states after the last norm, which the UNet attends to."""
    pooled: Float[Array, "B D"]
    """The hidden state at the end-of-text token, which the contrastive loss projects."""


class CLIPTextModel(nn.Module):
    """Causal transformer over token ids."""

    config: CLIPTextConfig
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"]) -> TextOutput:
        """Token ids ``[B, T]`` → hidden states ``[B, T, D]`` and pooled ``[B, D]``."""
        config = self.config

        def embed(count: int, name: str) -> nn.Embed:
            return nn.Embed(
                count,
                config.hidden_size,
                dtype=self.dtype,
                embedding_init=nn.initializers.normal(0.02),
                name=f"text_model.embeddings.{name}",
            )

        x = embed(config.vocab_size, "token_embedding")(ids)
        positions = jnp.arange(ids.shape[1])
        x += embed(config.max_position_embeddings, "position_embedding")(positions)
        for i in range(config.num_hidden_layers):
            name = f"text_model.encoder.layers.{i}"
            x = EncoderLayer(config, causal=True, dtype=self.dtype, name=name)(x)
        x = _norm(config, self.dtype, "text_model.final_layer_norm")(x)
        # Old configs have eos_token_id=2, though the tokenizer's end token is its highest id.
        ends = ids if config.eos_token_id == 2 else ids == config.eos_token_id
        return TextOutput(x, x[jnp.arange(len(ids)), jnp.argmax(ends, axis=-1)])


class VisionOutput(NamedTuple):
    """Outputs of the vision tower."""

    embedding: Float[Array, "B E"]
    """The projected class token (CLIP's image embedding)."""
    pooled: Float[Array, "B D"]
    """The class token after the last norm, before the projection."""
    penultimate: Float[Array, "B T D"]
    """Hidden states before the last layer (``hidden_states[-2]``)."""


class CLIPVisionModelWithProjection(nn.Module):
    """Transformer over image patches."""

    config: CLIPVisionConfig
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, pixels: Float[Array, "B S S 3"]) -> VisionOutput:
        """Normalised pixels ``[B, S, S, 3]`` → embedding ``[B, projection_dim]`` and states."""
        config, patch = self.config, self.config.patch_size
        prefix = "vision_model.embeddings"
        x = nn.Conv(
            config.hidden_size,
            (patch, patch),
            strides=patch,
            padding="VALID",
            use_bias=False,
            dtype=self.dtype,
            name=f"{prefix}.patch_embedding",
        )(pixels)
        x = x.reshape(x.shape[0], -1, config.hidden_size)
        start = self.param(
            f"{prefix}.class_embedding", nn.initializers.normal(0.02), (config.hidden_size,)
        )
        start = jnp.broadcast_to(start.astype(x.dtype), (len(x), 1, config.hidden_size))
        x = jnp.concatenate([start, x], axis=1)
        x += nn.Embed(
            (config.image_size // patch) ** 2 + 1,
            config.hidden_size,
            dtype=self.dtype,
            # As large as the patch embeddings, so that attention can distinguish positions.
            embedding_init=nn.initializers.normal(0.5),
            name=f"{prefix}.position_embedding",
        )(jnp.arange(x.shape[1]))
        x = _norm(config, self.dtype, "vision_model.pre_layrnorm")(x)
        penultimate = x
        for i in range(config.num_hidden_layers):
            penultimate = x
            name = f"vision_model.encoder.layers.{i}"
            x = EncoderLayer(config, causal=False, dtype=self.dtype, name=name)(x)
        pooled = _norm(config, self.dtype, "vision_model.post_layernorm")(x[:, 0])
        embedding = nn.Dense(
            config.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection"
        )(pooled)
        return VisionOutput(embedding, pooled, penultimate)
