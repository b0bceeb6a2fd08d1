"""Random tiny checkpoints of every family, written with the names, layouts and config keys of the original
releases.

Only numpy: the light suite builds them too. Values come from `RandomState`, whose stream is frozen, and
each tensor has its own seed made from its name, so a recipe stands for the same weights on every machine
and at every numpy version (recorded logits rely on it). Nothing is trivial on purpose: norm weights, A_log
and dt_bias are random, so that a missing + 1 or a forgotten bias shows; the projections that write to the
residual stream are small, because a random net of full gain is chaotic and would turn rounding into error;
logits have a standard deviation of about 1.6.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from parity.storage import Tensor, encode, write_shards, write_tensors

Family = Literal["qwen3_5_moe", "qwen3_5", "qwen3_next", "qwen3_moe"]


@dataclass(frozen=True)
class Recipe:
    """One random checkpoint. `text_only`: the config and names of the text-only class instead of the
    wrapper with a vision tower; `per_expert`: routed experts one by one instead of fused (qwen3_next,
    qwen3_moe always have them so); `sensitive`: the dtype of A_log and of the gated norm, F32 in Qwen3.5
    whatever the rest is."""

    family: Family
    seed: int = 1
    layers: int = 4
    hidden: int = 128
    vocab: int = 320
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    key_heads: int = 2
    value_heads: int = 4
    key_dim: int = 32
    value_dim: int = 32
    experts: int = 16
    per_token: int = 4
    width: int = 128
    shared_width: int = 128
    tied: bool = False
    text_only: bool = False
    per_expert: bool = False
    mtp: bool = True
    normalize: bool = True
    rope: dict[str, Any] = field(default_factory=dict)
    context: int = 4096
    dtype: str = "F32"
    sensitive: str = "F32"

    @property
    def wrapper(self) -> bool:
        return self.family in ("qwen3_5_moe", "qwen3_5") and not self.text_only

    @property
    def hybrid(self) -> bool:
        return self.family != "qwen3_moe"

    @property
    def kinds(self) -> list[str]:
        return ["full" if not self.hybrid or i % 4 == 3 else "linear" for i in range(self.layers)]

    @property
    def prefix(self) -> str:
        return "model.language_model." if self.wrapper else "model."


SMALL: dict[str, Any] = {
    "hidden": 32, "vocab": 96, "head_dim": 16, "key_heads": 1, "value_heads": 2, "key_dim": 16,
    "value_dim": 16, "experts": 4, "per_token": 2, "width": 32, "shared_width": 32,
}  # fmt: skip
"""Sizes for tests that load a checkpoint hundreds of times."""


def write(folder: Path, recipe: Recipe, shards: int = 3) -> Path:
    """Write config.json and the weights (one file, or several with an index) without tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(recipe), indent=1))
    tensors = {name: encode(array, _dtype(recipe, name)) for name, array in weights(recipe).items()}
    if shards == 1:
        write_tensors(folder / "model.safetensors", tensors)
    else:
        write_shards(folder, tensors, shards)
    return folder


def encode_all(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays by name as float32 tensors."""
    return {name: encode(array) for name, array in arrays.items()}


def _dtype(recipe: Recipe, name: str) -> str:
    sensitive = name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))
    return recipe.sensitive if sensitive and recipe.dtype == "BF16" else recipe.dtype


def config(recipe: Recipe) -> dict[str, Any]:
    """config.json as the releases of the family have it."""
    text: dict[str, Any] = {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "head_dim": recipe.head_dim, "hidden_act": "silu", "hidden_size": recipe.hidden,
        "initializer_range": 0.02, "max_position_embeddings": recipe.context,
        "num_attention_heads": recipe.heads, "num_hidden_layers": recipe.layers,
        "num_key_value_heads": recipe.kv_heads, "rms_norm_eps": 1e-06, "use_cache": True,
        "vocab_size": recipe.vocab, "tie_word_embeddings": recipe.tied,
    }  # fmt: skip
    if recipe.family == "qwen3_5":
        text["intermediate_size"] = recipe.width
    else:
        text |= {
            "moe_intermediate_size": recipe.width, "num_experts": recipe.experts,
            "router_aux_loss_coef": 0.001, "num_experts_per_tok": recipe.per_token,
            "output_router_logits": False,
        }  # fmt: skip
    if recipe.family in ("qwen3_5_moe", "qwen3_next"):
        text["shared_expert_intermediate_size"] = recipe.shared_width
    if recipe.hybrid:
        text |= {
            "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": recipe.key_dim, "linear_num_key_heads": recipe.key_heads,
            "linear_num_value_heads": recipe.value_heads, "linear_value_head_dim": recipe.value_dim,
        }  # fmt: skip
    if recipe.family in ("qwen3_5_moe", "qwen3_5"):
        return _config_of_3_5(recipe, text)
    # the older families: flat, with the rope keys of transformers 4
    text |= {
        "architectures": ["Qwen3NextForCausalLM" if recipe.hybrid else "Qwen3MoeForCausalLM"],
        "model_type": recipe.family, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "intermediate_size": 4 * recipe.hidden, "norm_topk_prob": recipe.normalize, "rope_theta": 1e6,
        "rope_scaling": recipe.rope or None, "use_sliding_window": False, "torch_dtype": "float32",
        "transformers_version": "4.57.0.dev0",
    }  # fmt: skip
    text |= (
        {"partial_rotary_factor": 0.25} if recipe.hybrid else {"sliding_window": None, "max_window_layers": 4}
    )
    return text


def _config_of_3_5(recipe: Recipe, text: dict[str, Any]) -> dict[str, Any]:
    pairs = recipe.head_dim // 8
    text |= {
        "attn_output_gate": True, "dtype": "float32", "mamba_ssm_dtype": "float32",
        "model_type": recipe.family + "_text",
        "layer_types": [f"{kind}_attention" for kind in recipe.kinds], "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False, "pad_token_id": None,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3],
            "partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "default", **recipe.rope,
        },
    }  # fmt: skip
    stem = "Qwen3_5Moe" if recipe.family == "qwen3_5_moe" else "Qwen3_5"
    if recipe.text_only:
        return {"architectures": [f"{stem}ForCausalLM"], "transformers_version": "5.23.0"} | text
    return {
        "architectures": [f"{stem}ForConditionalGeneration"], "model_type": recipe.family,
        "text_config": text,
        "image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13,
        "tie_word_embeddings": recipe.tied, "transformers_version": "4.57.1",
        "vision_config": {
            "deepstack_visual_indexes": [], "depth": 1, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 16,
            "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 24, "model_type": recipe.family,
            "num_heads": 2, "num_position_embeddings": 16, "out_hidden_size": recipe.hidden, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    }  # fmt: skip


class _Draw:
    """Random tensors by name."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tensors: dict[str, np.ndarray] = {}

    def normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> np.ndarray:
        state = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * self.recipe.seed) % 2**32)
        self.tensors[name] = (mean + std * state.standard_normal(shape)).astype(np.float32)
        return self.tensors[name]

    def linear(self, name: str, rows: int, cols: int, gain: float = 1.0) -> np.ndarray:
        return self.normal(f"{name}.weight", (rows, cols), gain / cols**0.5)

    def norm(self, name: str, size: int) -> None:
        """A norm weight as stored: around 0 where the model adds 1."""
        self.normal(f"{name}.weight", (size,), 0.3, 0.0 if self.recipe.hybrid else 1.0)


_OUT: float = 0.35
"""gain of the projections that write to the residual stream"""


def weights(recipe: Recipe) -> dict[str, np.ndarray]:
    """All tensors by the names of the original release."""
    draw = _Draw(recipe)
    draw.normal(
        f"{recipe.prefix}embed_tokens.weight", (recipe.vocab, recipe.hidden), 1.6 / recipe.hidden**0.5
    )
    for index, kind in enumerate(recipe.kinds):
        _layer(draw, f"{recipe.prefix}layers.{index}.", kind)
    draw.norm(f"{recipe.prefix}norm", recipe.hidden)
    if not recipe.tied:
        draw.linear("lm_head", recipe.vocab, recipe.hidden, 1.6)
    if recipe.mtp and recipe.hybrid:
        draw.linear("mtp.fc", recipe.hidden, 2 * recipe.hidden)
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            draw.norm(f"mtp.{name}", recipe.hidden)
        _layer(draw, "mtp.layers.0.", "full")
    if recipe.wrapper:
        _vision(draw)
    return draw.tensors


def _layer(draw: _Draw, at: str, kind: str) -> None:
    recipe = draw.recipe
    draw.norm(f"{at}input_layernorm", recipe.hidden)
    draw.norm(f"{at}post_attention_layernorm", recipe.hidden)
    if kind == "full":
        _attention(draw, f"{at}self_attn.")
    else:
        _delta_net(draw, f"{at}linear_attn.")
    if recipe.family == "qwen3_5":
        _swiglu(draw, f"{at}mlp.", recipe.width)
        return
    draw.linear(f"{at}mlp.gate", recipe.experts, recipe.hidden, 2.0)
    _experts(draw, f"{at}mlp.experts.")
    if recipe.hybrid and recipe.shared_width:
        _swiglu(draw, f"{at}mlp.shared_expert.", recipe.shared_width)
        draw.linear(f"{at}mlp.shared_expert_gate", 1, recipe.hidden)


def _attention(draw: _Draw, at: str) -> None:
    recipe = draw.recipe
    # rows of a gated q_proj are, per head, [q | gate]
    draw.linear(f"{at}q_proj", recipe.heads * recipe.head_dim * (2 if recipe.hybrid else 1), recipe.hidden)
    draw.linear(f"{at}k_proj", recipe.kv_heads * recipe.head_dim, recipe.hidden)
    draw.linear(f"{at}v_proj", recipe.kv_heads * recipe.head_dim, recipe.hidden)
    draw.linear(f"{at}o_proj", recipe.hidden, recipe.heads * recipe.head_dim, _OUT)
    draw.norm(f"{at}q_norm", recipe.head_dim)
    draw.norm(f"{at}k_norm", recipe.head_dim)


def _delta_net(draw: _Draw, at: str) -> None:
    recipe = draw.recipe
    keys, values = recipe.key_heads * recipe.key_dim, recipe.value_heads * recipe.value_dim
    draw.normal(f"{at}A_log", (recipe.value_heads,), 0.8, 0.2)
    draw.normal(f"{at}dt_bias", (recipe.value_heads,), 0.8, -0.5)
    draw.normal(f"{at}conv1d.weight", (2 * keys + values, 1, 4), 0.6)
    draw.normal(f"{at}norm.weight", (recipe.value_dim,), 0.3, 1.0)
    draw.linear(f"{at}out_proj", recipe.hidden, values, _OUT)
    if recipe.family == "qwen3_next":
        # one matrix each, rows per key head: [q | k | v of its value heads | z of them] and [b | a]
        draw.linear(f"{at}in_proj_qkvz", 2 * keys + 2 * values, recipe.hidden)
        draw.linear(f"{at}in_proj_ba", 2 * recipe.value_heads, recipe.hidden)
        return
    draw.linear(f"{at}in_proj_qkv", 2 * keys + values, recipe.hidden)
    draw.linear(f"{at}in_proj_z", values, recipe.hidden)
    draw.linear(f"{at}in_proj_b", recipe.value_heads, recipe.hidden)
    draw.linear(f"{at}in_proj_a", recipe.value_heads, recipe.hidden)


def _swiglu(draw: _Draw, at: str, width: int) -> None:
    draw.linear(f"{at}gate_proj", width, draw.recipe.hidden)
    draw.linear(f"{at}up_proj", width, draw.recipe.hidden)
    draw.linear(f"{at}down_proj", draw.recipe.hidden, width, _OUT)


def _experts(draw: _Draw, at: str) -> None:
    recipe = draw.recipe
    shape = (recipe.experts, 2 * recipe.width, recipe.hidden)
    gate_up = draw.normal(f"{at}gate_up_proj", shape, recipe.hidden**-0.5)
    down = draw.normal(
        f"{at}down_proj", (recipe.experts, recipe.hidden, recipe.width), _OUT / recipe.width**0.5
    )
    if recipe.family != "qwen3_5_moe" or recipe.per_expert:
        # the same values under the per-expert names, so that both forms must give the same logits
        del draw.tensors[f"{at}gate_up_proj"], draw.tensors[f"{at}down_proj"]
        for expert in range(recipe.experts):
            gate, up = np.split(gate_up[expert], 2)
            draw.tensors[f"{at}{expert}.gate_proj.weight"] = gate
            draw.tensors[f"{at}{expert}.up_proj.weight"] = up
            draw.tensors[f"{at}{expert}.down_proj.weight"] = down[expert]


def _vision(draw: _Draw) -> None:
    hidden, inner, merged = 16, 24, 64
    at = "model.visual."
    shapes = {
        "patch_embed.proj.weight": (hidden, 3, 2, 4, 4), "patch_embed.proj.bias": (hidden,),
        "pos_embed.weight": (16, hidden), "blocks.0.norm1.weight": (hidden,),
        "blocks.0.norm1.bias": (hidden,), "blocks.0.norm2.weight": (hidden,),
        "blocks.0.norm2.bias": (hidden,), "blocks.0.attn.qkv.weight": (3 * hidden, hidden),
        "blocks.0.attn.qkv.bias": (3 * hidden,), "blocks.0.attn.proj.weight": (hidden, hidden),
        "blocks.0.attn.proj.bias": (hidden,), "blocks.0.mlp.linear_fc1.weight": (inner, hidden),
        "blocks.0.mlp.linear_fc1.bias": (inner,), "blocks.0.mlp.linear_fc2.weight": (hidden, inner),
        "blocks.0.mlp.linear_fc2.bias": (hidden,), "merger.norm.weight": (hidden,),
        "merger.norm.bias": (hidden,), "merger.linear_fc1.weight": (merged, merged),
        "merger.linear_fc1.bias": (merged,), "merger.linear_fc2.weight": (draw.recipe.hidden, merged),
        "merger.linear_fc2.bias": (draw.recipe.hidden,),
    }  # fmt: skip
    for name, shape in shapes.items():
        draw.normal(at + name, shape, 0.1)


def tokens(count: int, vocab: int, seed: int = 0) -> np.ndarray:
    """`count` random token ids above the special ones."""
    return np.random.RandomState(seed).randint(14, vocab, count)
