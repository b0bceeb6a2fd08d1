"""What the layers of a model look like: specs, dtypes and formats, without any values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig, MoESpec
from moelocal.formats import QuantizedArray, QuantSpec, Weight
from moelocal.layers.mlp import MoE
from moelocal.model import Decoder
from moelocal.ops.experts import SwiGLU
from moelocal.ops.router import RouterWeights

QUANTIZED: Final = QuantSpec(4, 64)
"""The format of the flagship, but for its routers, and the one that the quantizer is measured with."""

ROUTERS: Final = QuantSpec(8, 64)


def arrays(value: Any) -> list[mx.array]:
    """Every array in arguments or results, those of weights included."""
    if isinstance(value, mx.array):
        return [value]
    inner = getattr(value, "arrays", value)
    return [array for member in inner for array in arrays(member)] if isinstance(inner, list | tuple) else []


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer of experts. Shapes and formats of its weights count; the values are never read."""

    router: RouterWeights
    routed: SwiGLU
    shared: SwiGLU | None

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.router.arrays, *self.routed.arrays, *(self.shared.arrays if self.shared else [])]


@dataclass(frozen=True, slots=True)
class Shapes:
    """The specs of `config`, activations in `dtype`, and each kind of expert layer that occurs."""

    config: ModelConfig
    dtype: mx.Dtype
    experts: tuple[Experts, ...]


def flagship() -> Shapes:
    """Qwen3.5 and 3.6 35B-A3B, as converted for MLX with 4 bits in groups of 64."""
    config = ModelConfig.parse(
        {
            "model_type": "qwen3_5_moe_text",
            **{"hidden_size": 2048, "vocab_size": 248320, "num_hidden_layers": 40},
            **{"max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "head_dim": 256},
            **{"num_attention_heads": 16, "num_key_value_heads": 2, "partial_rotary_factor": 0.25},
            **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_conv_kernel_dim": 4},
            **{"linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_experts": 256},
            **{"num_experts_per_tok": 8, "moe_intermediate_size": 512},
            **{"shared_expert_intermediate_size": 512},
        }
    )
    mlp = config.layers[0].mlp
    assert isinstance(mlp, MoESpec)
    return Shapes(config, mx.bfloat16, (packed_experts(mlp, config.hidden, mx.bfloat16),))


def packed_experts(spec: MoESpec, hidden: int, dtype: mx.Dtype) -> Experts:
    """A layer in the formats of the flagship, with a shared expert."""

    def packed(*lead: int, cols: int, form: QuantSpec = QUANTIZED) -> QuantizedArray:
        scales = mx.zeros((*lead, cols // form.group), dtype)
        return QuantizedArray(mx.zeros((*lead, cols * form.bits // 32), mx.uint32), scales, scales, form)

    return Experts(
        RouterWeights.build([packed(rows, cols=hidden, form=ROUTERS) for rows in (spec.experts, 1)]),
        SwiGLU(
            (packed(spec.experts, 2 * spec.width, cols=hidden),),
            packed(spec.experts, hidden, cols=spec.width),
        ),
        SwiGLU((packed(2 * spec.shared_width, cols=hidden),), packed(hidden, cols=spec.shared_width)),
    )


def of_checkpoint(folder: Path, dtype: mx.Dtype | None = None) -> Shapes:
    """Of the model in a folder, in its own dtype unless told; no weight is read. Raises `ConfigError`,
    `CheckpointError`."""
    checkpoint = Checkpoint.open(folder, ModelConfig.read(folder))
    decoder = Decoder(checkpoint, dtype or checkpoint.compute_dtype, evaluate=False)
    kinds: dict[str, Experts] = {}
    for block in decoder.blocks:
        if isinstance(block.mlp, MoE):
            kind = Experts(block.mlp.router, block.mlp.routed, block.mlp.shared)
            kinds.setdefault(str([(a.shape, a.dtype) for a in kind.arrays]), kind)
    return Shapes(decoder.config, decoder.dtype, tuple(kinds.values()))


def random_router(weights: RouterWeights) -> RouterWeights:
    """Random values in the shapes and formats of `weights`."""
    return RouterWeights.build(
        [random_weight(w) for w in (weights.wide if weights.stored is None else [weights.stored])]
    )


def random_block(block: SwiGLU) -> SwiGLU:
    """Random values in the shapes and formats of `block`."""
    return replace(
        block, gate_up=tuple(random_weight(w) for w in block.gate_up), down=random_weight(block.down)
    )


def random_weight(weight: Weight) -> Weight:
    """Random values in the shape and format of `weight`, scaled so that outputs are of the size of inputs."""
    if isinstance(weight, mx.array):
        return (mx.random.normal(weight.shape) / math.sqrt(weight.shape[-1])).astype(weight.dtype)
    codes = mx.random.randint(0, 0xFFFFFFFF, weight.weight.shape, mx.uint32)
    if weight.biases is None:
        mode = weight.spec.mode
        codes = codes & 0xBFBFBFBF if mode == "mxfp8" else codes  # no NaN among its 8-bit floats
        # nvfp4 scales are 8-bit floats, the others powers of two with a bias of 127
        low, high = (0x10, 0x20) if mode == "nvfp4" else (121, 125)
        return replace(
            weight, weight=codes, scales=mx.random.randint(low, high, weight.scales.shape, mx.uint8)
        )
    columns = weight.scales.shape[-1] * weight.spec.group
    step = 1 / math.sqrt(columns) / 2 ** (weight.spec.bits - 2)
    scales = (mx.random.uniform(0.5, 1.5, weight.scales.shape) * step).astype(weight.scales.dtype)
    return replace(weight, weight=codes, scales=scales, biases=scales * -(2 ** (weight.spec.bits - 1)))
