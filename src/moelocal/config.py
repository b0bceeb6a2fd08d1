"""`ModelConfig`: what a checkpoint's config.json says about the model, checked and in our words.

The only place that knows the key names of Hugging Face configs. One file because each value is checked against others.
Supported `model_type`s: `qwen3_5_moe`, `qwen3_5`
(both nested under `text_config` or flat with `_text`), `qwen3_next`, `qwen3_moe`. A key that we neither use nor know
to be harmless is an error: a config value that is silently ignored is a different model that still talks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from moelocal.errors import ConfigError, RequestError, UnsupportedModel

FAMILIES: Final = ("qwen3_5_moe", "qwen3_5", "qwen3_next", "qwen3_moe")

# keys that carry no information about the text forward pass
_HARMLESS: Final = frozenset(
    """architectures bos_token_id pad_token_id dtype torch_dtype transformers_version initializer_range use_cache
    output_router_logits router_aux_loss_coef attention_dropout model_type full_attention_interval vision_config
    image_token_id video_token_id vision_start_token_id vision_end_token_id audio_token_id language_model_only
    mamba_ssm_dtype mtp_num_hidden_layers mtp_use_dedicated_embeddings quantization quantization_config
    return_dict output_hidden_states output_attentions chunk_size_feed_forward is_encoder_decoder id2label label2id
    problem_type tie_encoder_decoder _name_or_path name_or_path max_window_layers sliding_window tokenizer_class
    pruned_heads finetuning_task task_specific_params torchscript auto_map unsloth_fixed unsloth_version
    intermediate_size eos_token_id text_config tie_word_embeddings head_dim attn_implementation
    _attn_implementation_autoset transformers.js_config num_nextn_predict_layers gradient_checkpointing
    cross_attention_hidden_size add_cross_attention is_decoder tie_weights_keys return_dict_in_generate""".split()
)

# keys that are understood for one value only: anything else is another architecture
_ONLY: Final[dict[str, tuple[object, ...]]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "output_gate_type": ("swish", "silu"),
    "use_sliding_window": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
}


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN rope scaling (arXiv 2309.00071): context stretched by `factor` past `original_context` positions.

    `attention_factor` multiplies the rotated dims of queries and keys; 0.1 ln(factor) + 1 unless the config says.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Softmax attention: grouped heads, q/k norm, rotary embedding on the first `rotary_dim` of each head."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_base: float
    gated: bool
    yarn: Yarn | None = None


@dataclass(frozen=True, slots=True)
class DeltaNetSpec:
    """Gated delta net: Hk key heads of size Dk shared by Hv value heads of size Dv, short causal convolution."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: queries, keys and values side by side."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """One SwiGLU feed-forward of `width`."""

    width: int


@dataclass(frozen=True, slots=True)
class MoESpec:
    """`per_token` of `experts` SwiGLU experts of `width`, plus a gated shared one of `shared_width` (0: none)."""

    experts: int
    per_token: int
    width: int
    shared_width: int
    normalize: bool


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: a mixer (attention or delta net), then a feed-forward."""

    mixer: AttentionSpec | DeltaNetSpec
    mlp: MoESpec | DenseSpec


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The text model of a checkpoint. `context` is in tokens; `raw_norm_offset` says that the original release
    stores norm weights w for y = x̂·(1 + w); `quantization` is config.json's own dict, read by `formats`."""

    architecture: str
    hidden: int
    vocab: int
    norm_eps: float
    context: int
    tied: bool
    raw_norm_offset: bool
    layers: tuple[LayerSpec, ...]
    eos: frozenset[int]
    quantization: Mapping[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> ModelConfig:
        """Read `folder`/config.json.

        Raises `ConfigError` (missing file, malformed or impossible value), `UnsupportedModel` (another architecture).
        """
        return cls.parse(read_json(folder / "config.json"))

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build from the parsed config.json. Raises as `read` does."""
        family = _family(raw)
        text = _Fields(raw, "config.json")
        if "text_config" in raw:
            if not isinstance(raw["text_config"], dict):
                raise ConfigError(f"config.json: text_config: expected an object, got {raw['text_config']!r}")
            text = _Fields(raw["text_config"], "config.json: text_config")
        text.check_known()
        hybrid = family != "qwen3_moe"
        count = text.integer("num_hidden_layers", most=10_000)
        attention = _attention(text, family)
        mlp = _mlp(text, family)
        delta = _delta_net(text) if hybrid else None
        kinds = _layer_types(text, count, hybrid)
        layers = tuple(
            LayerSpec(attention if kind == "full_attention" or not delta else delta, mlp) for kind in kinds
        )
        context = text.integer("max_position_embeddings")
        if attention.yarn:
            context = max(context, int(attention.yarn.original_context * attention.yarn.factor))
        quantization = raw.get("quantization") or raw.get("quantization_config") or None
        if quantization is not None and not isinstance(quantization, dict):
            raise ConfigError(f"config.json: quantization: expected an object, got {quantization!r}")
        return cls(
            architecture=family,
            hidden=text.integer("hidden_size"),
            vocab=text.integer("vocab_size"),
            norm_eps=text.number("rms_norm_eps", 1e-6),
            context=context,
            tied=text.boolean(
                "tie_word_embeddings", _Fields(raw, "config.json").boolean("tie_word_embeddings", False)
            ),
            raw_norm_offset=hybrid,
            layers=layers,
            eos=text.token_ids("eos_token_id") | _Fields(raw, "config.json").token_ids("eos_token_id"),
            quantization=quantization,
        )

    def with_context(self, context: int) -> ModelConfig:
        """The same model for `context` tokens: fewer than it has, as a limit; more by YaRN, whose factor then is
        `context` over the positions that it was trained with.

        Raises `RequestError` for a number below 1 or beyond `MOST_STRETCHED` times those positions.
        """
        yarns = [each.mixer.yarn for each in self.layers if isinstance(each.mixer, AttentionSpec)]
        trained = yarns[0].original_context if yarns and yarns[0] else self.context
        most = max(self.context, MOST_STRETCHED * trained) if yarns else self.context
        if not isinstance(context, int) or isinstance(context, bool) or not 1 <= context <= most:
            raise RequestError(
                f"context: expected 1 to {most} tokens (trained with {trained}; YaRN stretches that at most "
                f"{MOST_STRETCHED} times), got {context!r}"
            )
        if context <= self.context:
            return replace(self, context=context)
        factor = context / trained
        yarn = replace(
            yarns[0] or Yarn(factor, trained), factor=factor, attention_factor=_attention_factor(factor)
        )
        layers = tuple(
            replace(each, mixer=replace(each.mixer, yarn=yarn))
            if isinstance(each.mixer, AttentionSpec)
            else each
            for each in self.layers
        )
        return replace(self, context=context, layers=layers)


MOST_STRETCHED: Final = 4
"""How many times the trained context YaRN may give: what Qwen's model cards name and were measured with."""


def _attention_factor(factor: float) -> float:
    """arXiv 2309.00071, section 3.3."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ConfigError` if it is missing, unreadable, not JSON or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found; a model folder needs it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


class _Fields:
    """Typed access to one JSON object, with errors that name the place."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = 1 << 40) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ConfigError(f"{self.where}: {key}: expected an integer of at least {least}, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        # the upper bound keeps products of two such numbers finite
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise ConfigError(f"{self.where}: {key}: expected a positive number, got {value!r}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key}: expected true or false, got {value!r}")
        return value

    def token_ids(self, key: str) -> frozenset[int]:
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ConfigError(f"{self.where}: {key}: expected a token id or a list of them, got {value!r}")
        return frozenset(ids)

    def check_known(self) -> None:
        """Refuse values of another architecture, and keys that nobody here knows."""
        for key, allowed in _ONLY.items():
            value = self.get(key, allowed[0])
            if value not in allowed:
                raise UnsupportedModel(
                    f"{self.where}: {key}: only {allowed[0]!r} is supported, got {value!r}"
                )
        for key, value in self.values.items():
            empty = value is None or value is False or value in ({}, [], 0)
            if key not in _USED and key not in _ONLY and key not in _HARMLESS and not empty:
                raise UnsupportedModel(
                    f"{self.where}: {key}: unknown key (value {value!r}); it may change the model. "
                    "If it does not, remove it from config.json"
                )


_USED: Final = frozenset(
    """hidden_size vocab_size rms_norm_eps max_position_embeddings num_hidden_layers num_attention_heads
    num_key_value_heads layer_types rope_parameters rope_scaling rope_theta partial_rotary_factor attn_output_gate
    linear_conv_kernel_dim linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim
    num_experts num_local_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size
    norm_topk_prob""".split()
)


def _family(raw: Mapping[str, Any]) -> str:
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"config.json: model_type: expected a string, got {kind!r}")
    if kind.removesuffix("_text") not in FAMILIES:
        raise UnsupportedModel(
            f"config.json: model_type: {kind!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return kind.removesuffix("_text")


def _layer_types(text: _Fields, count: int, hybrid: bool) -> list[str]:
    interval = text.integer("full_attention_interval", 4 if hybrid else 1)
    default = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(count)]
    kinds = text.get("layer_types", default)
    allowed = {"full_attention", "linear_attention"} if hybrid else {"full_attention"}
    if not isinstance(kinds, list) or len(kinds) != count:
        raise ConfigError(f"{text.where}: layer_types: expected a list of {count} names, got {kinds!r}")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in allowed:
            raise UnsupportedModel(
                f"{text.where}: layer_types: expected one of {sorted(allowed)}, got {kind!r}"
            )
    return kinds


def _attention(text: _Fields, family: str) -> AttentionSpec:
    heads = text.integer("num_attention_heads")
    kv_heads = text.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{text.where}: num_attention_heads: {heads} is no multiple of {kv_heads} key-value heads"
        )
    head_dim = text.integer("head_dim", max(1, text.integer("hidden_size") // heads))
    rope = _rope(text)
    partial = rope.number("partial_rotary_factor", text.number("partial_rotary_factor", _PARTIAL[family]))
    rotary_dim = int(head_dim * partial)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise ConfigError(
            f"{text.where}: partial_rotary_factor: {partial} of head_dim {head_dim} is no even size"
        )
    gated = text.boolean("attn_output_gate", family != "qwen3_moe")
    if gated != (family != "qwen3_moe"):
        raise UnsupportedModel(f"{text.where}: attn_output_gate: {gated} is not supported for {family}")
    base = rope.number("rope_theta", text.number("rope_theta", 10_000.0))
    return AttentionSpec(heads, kv_heads, head_dim, rotary_dim, base, gated, _yarn(rope, text))


_PARTIAL: Final = {"qwen3_5_moe": 0.25, "qwen3_5": 0.25, "qwen3_next": 0.25, "qwen3_moe": 1.0}


def _rope(text: _Fields) -> _Fields:
    """The rope dict, under its new (`rope_parameters`) or old (`rope_scaling`) name; empty when absent."""
    name = "rope_parameters" if text.get("rope_parameters") is not None else "rope_scaling"
    rope = text.get(name, {})
    if not isinstance(rope, dict):
        raise ConfigError(f"{text.where}: {name}: expected an object, got {rope!r}")
    known = set(
        """rope_type type rope_theta partial_rotary_factor mrope_interleaved mrope_section factor
        original_max_position_embeddings beta_fast beta_slow attention_factor""".split()
    )
    if unknown := sorted(set(rope) - known):
        raise UnsupportedModel(f"{text.where}: {name}: unknown key {unknown[0]!r}")
    return _Fields(rope, f"{text.where}: {name}")


def _yarn(rope: _Fields, text: _Fields) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise UnsupportedModel(
            f"{rope.where}: rope_type: only 'default' and 'yarn' are supported, got {kind!r}"
        )
    factor = rope.number("factor")
    return Yarn(
        factor=factor,
        original_context=rope.integer(
            "original_max_position_embeddings", text.integer("max_position_embeddings")
        ),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor", _attention_factor(factor)),
    )


def _delta_net(text: _Fields) -> DeltaNetSpec:
    spec = DeltaNetSpec(
        key_heads=text.integer("linear_num_key_heads"),
        value_heads=text.integer("linear_num_value_heads"),
        key_dim=text.integer("linear_key_head_dim"),
        value_dim=text.integer("linear_value_head_dim"),
        conv_width=text.integer("linear_conv_kernel_dim", 4, least=2),
    )
    if spec.value_heads % spec.key_heads:
        raise ConfigError(
            f"{text.where}: linear_num_value_heads: {spec.value_heads} is no multiple of {spec.key_heads} key heads"
        )
    return spec


def _mlp(text: _Fields, family: str) -> MoESpec | DenseSpec:
    if family == "qwen3_5":
        return DenseSpec(text.integer("intermediate_size"))
    name = "num_experts" if text.get("num_experts") is not None else "num_local_experts"
    experts = text.integer(name)
    per_token = text.integer("num_experts_per_tok")
    if per_token > experts:
        raise ConfigError(f"{text.where}: num_experts_per_tok: {per_token} of only {experts} experts")
    shared = 0 if family == "qwen3_moe" else text.integer("shared_expert_intermediate_size", 0, least=0)
    # the hybrid 3.5 line renormalises always and has no such key
    normalize = True if family == "qwen3_5_moe" else text.boolean("norm_topk_prob", family == "qwen3_next")
    return MoESpec(experts, per_token, text.integer("moe_intermediate_size"), shared, normalize)
