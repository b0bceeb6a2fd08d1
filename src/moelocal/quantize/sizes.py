"""What a model weighs: bytes by class of tensor, bits per weight, bytes that a token reads, and what fits in a memory.

The rule for "fits": weights + delta-net states + cache of one conversation + `WORKING` bytes for the activations of a
prefill chunk and MLX's own buffers stay within what macOS lets the GPU use (`gpu_share`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import mlx.core as mx

from moelocal import machine
from moelocal.cache.layers import kv_nbytes
from moelocal.config import AttentionSpec, DenseSpec, ModelConfig, MoESpec
from moelocal.errors import RequestError
from moelocal.formats import QuantSpec
from moelocal.quantize.recipe import class_of
from moelocal.survey import Survey
from moelocal.units import GIB

WORKING: Final = 1_000_000_000
"""Bytes beside weights, states and cache. An assumption: not measured on a Mac."""

_SHARES: Final = ((24 * GIB, 0.74), (48 * GIB, 0.78), (64 * GIB, 0.81))


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the text model by our name, with its shape before packing, in the order of the network."""
    hidden = config.hidden
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab, hidden)}
    for index, layer in enumerate(config.layers):
        found: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
        mixer, mlp = layer.mixer, layer.mlp
        if isinstance(mixer, AttentionSpec):
            queries, pairs = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
            found |= {
                "self_attn.q_proj.weight": (queries * (2 if mixer.gated else 1), hidden),
                "self_attn.k_proj.weight": (pairs, hidden),
                "self_attn.v_proj.weight": (pairs, hidden),
                "self_attn.o_proj.weight": (hidden, queries),
                "self_attn.q_norm.weight": (mixer.head_dim,),
                "self_attn.k_norm.weight": (mixer.head_dim,),
            }
        else:
            values = mixer.value_heads * mixer.value_dim
            found |= {
                "linear_attn.in_proj_qkv.weight": (mixer.conv_channels, hidden),
                "linear_attn.in_proj_z.weight": (values, hidden),
                "linear_attn.in_proj_b.weight": (mixer.value_heads, hidden),
                "linear_attn.in_proj_a.weight": (mixer.value_heads, hidden),
                "linear_attn.conv1d.weight": (mixer.conv_channels, mixer.conv_width, 1),
                "linear_attn.A_log": (mixer.value_heads,),
                "linear_attn.dt_bias": (mixer.value_heads,),
                "linear_attn.norm.weight": (mixer.value_dim,),
                "linear_attn.out_proj.weight": (hidden, values),
            }
        found["post_attention_layernorm.weight"] = (hidden,)
        if isinstance(mlp, DenseSpec):
            found |= _swiglu("mlp", (), mlp.width, hidden)
        else:
            found["mlp.gate.weight"] = (mlp.experts, hidden)
            found |= _swiglu("mlp.switch_mlp", (mlp.experts,), mlp.width, hidden)
            if mlp.shared_width:
                found["mlp.shared_expert_gate.weight"] = (1, hidden)
                found |= _swiglu("mlp.shared_expert", (), mlp.shared_width, hidden)
        shapes |= {f"layers.{index}.{name}": shape for name, shape in found.items()}
    shapes["norm.weight"] = (hidden,)
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab, hidden)
    return shapes


def _swiglu(stem: str, lead: tuple[int, ...], width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{stem}.gate_proj.weight": (*lead, width, hidden),
        f"{stem}.up_proj.weight": (*lead, width, hidden),
        f"{stem}.down_proj.weight": (*lead, hidden, width),
    }


def packed_nbytes(shape: tuple[int, ...], spec: QuantSpec | None, dtype_size: int) -> int:
    """Bytes of a tensor in a format: codes, and per group a scale and (affine) a bias of `dtype_size` bytes."""
    count = math.prod(shape)
    if spec is None:
        return count * dtype_size
    per_group = 2 * dtype_size if spec.has_biases else 1
    return count * spec.bits // 8 + count // spec.group * per_group


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of one class (`recipe.CLASSES`, or "other": norms, convolutions, gates): how many weights, bytes, and
    bytes that one token reads of them; `formats`: those that occur ("4 bits in groups of 64", "16-bit float") and in
    how many tensors, the most frequent first."""

    name: str
    parameters: int
    nbytes: int
    read: int
    formats: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a text model in some formats. `cache_per_token`: bytes of keys and values; `state`: bytes of the delta nets'
    states and convolution rows, whatever the context."""

    parts: tuple[Part, ...]
    cache_per_token: int
    state: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def read_per_token(self) -> int:
        """Bytes of weights that one token reads: of the experts those that run, of the embedding one row, the head
        whole."""
        return sum(part.read for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


def sizes(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    plan: Mapping[str, QuantSpec | None],
    dtype_size: int = 2,
    stored: Mapping[str, int] | None = None,
) -> Sizes:
    """Sizes of the tensors in `shapes` (our names, shapes before packing) in the formats of `plan`; what is not in the
    plan, scales, biases and activations have `dtype_size` bytes. `stored`: bytes of tensors as a file has them."""
    parts: dict[str, list[_Tensor]] = {}
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        kind, spec = class_of(path), plan.get(path)
        nbytes = packed_nbytes(shape, spec, dtype_size) if stored is None else stored[name]
        tensor = _Tensor(math.prod(shape), nbytes, round(nbytes * _read_share(config, kind)), spec)
        parts.setdefault(kind or "other", []).append(tensor)
    return Sizes(
        tuple(
            Part(
                kind,
                sum(tensor.parameters for tensor in members),
                sum(tensor.nbytes for tensor in members),
                sum(tensor.read for tensor in members),
                tuple(Counter(tensor.words for tensor in members).most_common()),
            )
            for kind, members in parts.items()
        ),
        *_cache(config, dtype_size),
    )


def stored_sizes(found: Survey) -> Sizes:
    """Sizes of a checkpoint as its files have them, scales and biases with their weight."""
    shapes, stored = shapes_of(found.config), dict[str, int]()
    for name in shapes:
        path = name.removesuffix(".weight")
        stored[name] = sum(found.stored.get(n, 0) for n in {name, f"{path}.scales", f"{path}.biases"})
    return sizes(found.config, shapes, found.packed, found.dtype.size, stored)


class _Tensor(NamedTuple):
    parameters: int
    nbytes: int
    read: int
    spec: QuantSpec | None

    @property
    def words(self) -> str:
        if self.spec is None:
            return f"{8 * self.nbytes // self.parameters}-bit float"
        affine = self.spec.mode == "affine"
        return f"{self.spec.bits} bits in groups of {self.spec.group}" if affine else self.spec.mode


def _read_share(config: ModelConfig, kind: str | None) -> float:
    """The share of a class that one token reads."""
    mlp = config.layers[0].mlp
    if kind is not None and kind.startswith("experts.") and isinstance(mlp, MoESpec):
        return mlp.per_token / mlp.experts
    return 1 / config.vocab if kind == "embedding" and not config.tied else 1.0


def cache_per_token(config: ModelConfig, dtype_size: int, kv_bits: int | None = None) -> int:
    """Bytes of the keys and values of one position, as they are (None) or in `kv_bits`."""
    mixers = [layer.mixer for layer in config.layers]
    return sum(kv_nbytes(m, dtype_size, kv_bits) for m in mixers if isinstance(m, AttentionSpec))


def _cache(config: ModelConfig, dtype_size: int) -> tuple[int, int]:
    per_token, state = cache_per_token(config, dtype_size), 0
    for layer in config.layers:
        mixer = layer.mixer
        if not isinstance(mixer, AttentionSpec):
            state += mixer.value_heads * mixer.value_dim * mixer.key_dim * 4  # float32 whatever the dtype
            state += (mixer.conv_width - 1) * mixer.conv_channels * dtype_size
    return per_token, state


def gpu_share(memory: int) -> float:
    """The share of a Mac's memory that macOS lets the GPU use unless told otherwise.

    As Metal's `recommendedMaxWorkingSetSize` is reported from machines with 16 and 24 GB (0.74), 32 and 48 (0.78), 64
    (0.81) and 128 (0.84) under macOS 15 and 26: sgl-project/sglang#29949, antirez/ds4#893, logs of llama.cpp. Earlier
    versions gave 2/3 up to 32 GB and 3/4 above. Not measured by this project.
    """
    return next((share for most, share in _SHARES if memory <= most), 0.84)


@dataclass(frozen=True, slots=True)
class Memory:
    """`total` bytes, of which weights and caches may take `usable`; `source` says who says so."""

    total: int
    usable: int
    source: str

    @classmethod
    def of(cls, total: int) -> Memory:
        """A Mac with `total` bytes."""
        share = gpu_share(total)
        return cls(total, int(total * share), f"on a Mac the GPU may use about {share:.0%} of it")

    @classmethod
    def here(cls) -> Memory:
        """This machine: on a Mac what Metal itself says. Raises `RequestError` if the system does not say."""
        total = machine.memory()
        if not total:
            raise RequestError("memory: this system does not say how much it has; name it with --memory 32GB")
        limit = mx.device_info().get("max_recommended_working_set_size") if mx.metal.is_available() else None
        if isinstance(limit, int) and limit:
            return cls(total, limit, "of it, Metal says, the GPU may use")
        return cls.of(total)


def context_that_fits(config: ModelConfig, found: Sizes, usable: int) -> int | None:
    """Tokens of context that fit into `usable` bytes by the rule above, at most the model's own; None if the weights
    alone do not fit."""
    room = usable - found.nbytes - found.state - WORKING
    if room < 0:
        return None
    return min(config.context, room // found.cache_per_token) if found.cache_per_token else config.context
