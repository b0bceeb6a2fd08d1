"""One decode step of this library and of mlx-lm, built without weights.

Every matrix is plain 4-bit in groups of 64, the router and the shared expert's gate 8-bit, as mlx_lm.convert makes it;
activations are bfloat16. Weights and caches are constants that take no memory (`forget`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from ledger.graph import Graph
from ledger.trace import as_on_metal, forget, hold, named, region, trace
from moelocal import metal
from moelocal.cache import AttentionCache
from moelocal.config import ModelConfig
from moelocal.engine.sampling import Sampler, Sampling
from moelocal.formats import QuantizedArray, QuantSpec, Weight, arrays_of
from moelocal.layers.attention import Attention
from moelocal.layers.block import Block
from moelocal.layers.delta_net import DeltaNet
from moelocal.layers.mlp import Dense, MoE
from moelocal.model import Decoder
from moelocal.ops.op import Op, force

GROUP = 64
EIGHT_BITS = ("gate", "shared_expert_gate")
FLOAT32 = ("A_log", "norm.weight")
"""Of a delta net, as the originals store them."""


@dataclass(frozen=True, slots=True)
class Blank:
    """A checkpoint and a scope of zeros: whatever a layer asks for is there, in the shape that it states. `asked`
    holds the weights handed out, by name."""

    config: ModelConfig
    prefix: str = ""
    asked: dict[str, tuple[mx.array, ...]] = field(default_factory=dict)

    def root(self) -> Blank:
        return self

    def at(self, name: str) -> Blank:
        return Blank(self.config, f"{self.prefix}{name}.", self.asked)

    def require_all_used(self) -> None:
        pass

    def array(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype | None = mx.float32) -> mx.array:
        wide = name in FLOAT32 and self.prefix.endswith("linear_attn.")
        stored = mx.zeros(shape, mx.float32 if wide else mx.bfloat16)
        self.asked[self.prefix + name] = (stored,)
        return stored if dtype is None else stored.astype(dtype)

    def matrix(
        self, name: str, rows: int, cols: int, dtype: mx.Dtype | None, experts: int | None = None
    ) -> Weight:
        lead = () if experts is None else (experts,)
        weight: Weight = mx.zeros((*lead, rows, cols), mx.bfloat16)
        if cols % GROUP == 0:
            spec = QuantSpec(8 if name in EIGHT_BITS else 4, GROUP)
            scales = mx.zeros((*lead, rows, cols // GROUP), mx.bfloat16)
            codes = mx.zeros((*lead, rows, cols * spec.bits // 32), mx.uint32)
            weight = QuantizedArray(codes, scales, mx.zeros_like(scales), spec)
        self.asked[self.prefix + name] = arrays_of(weight)
        return weight if dtype is None else weight.astype(dtype)


class Ours:
    """This library's step as `engine.generate` runs it, greedy."""

    name = "moelocal"

    def __init__(self, raw: Mapping[str, Any], dtype: mx.Dtype = mx.bfloat16) -> None:
        config = ModelConfig.parse(raw)
        self.decoder = Decoder(Blank(config), dtype, evaluate=False)
        for block in self.decoder.blocks:
            forget(block.arrays)
        forget([self.decoder.norm, *arrays_of(self.decoder.embedding), *arrays_of(self.decoder.head)])
        # the vocabularies of the family are padded: rows without a token are masked
        mask = np.arange(config.vocab) < config.vocab - 1
        self.sampler = Sampler(Sampling(temperature=0), token_mask=mask, seed=0, prompt=())

    def new_cache(self, context: int) -> Any:
        """A cache that holds `context` tokens."""
        cache = self.decoder.new_cache()
        self.decoder(mx.zeros((1, context), mx.int32), cache, rows=1)
        return cache

    def held(self, cache: Any) -> list[mx.array]:
        """The arrays of a cache."""
        found: list[mx.array] = cache.arrays
        return found

    def step(self, token: mx.array, cache: Any) -> list[mx.array]:
        """Token int32 [] -> the next one."""
        return [self.sampler(self.decoder(token.reshape(1, 1), cache, rows=1)[0, -1])]


class MlxLm:
    """mlx-lm's step as `mlx_lm.generate.generate_step` runs it, greedy."""

    name = "mlx-lm"

    def __init__(self, raw: Mapping[str, Any], dtype: mx.Dtype = mx.bfloat16) -> None:
        import mlx.nn as nn
        from mlx.utils import tree_flatten, tree_map_with_path
        from mlx_lm.models.cache import make_prompt_cache

        self._make_cache = make_prompt_cache
        family = importlib.import_module(f"mlx_lm.models.{raw['model_type'].removesuffix('_text')}")
        self.model = family.Model(family.ModelArgs.from_dict(dict(raw)))
        choose = getattr(self.model, "quant_predicate", None) or (lambda path, module: True)

        def predicate(path: str, module: Any) -> Any:
            fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP == 0
            return fits and choose(path, module)

        kept = getattr(self.model, "cast_predicate", lambda path: True)
        self.model.update(
            tree_map_with_path(
                lambda path, value: value.astype(dtype) if kept(path) else value, self.model.parameters()
            )
        )
        self.model.eval()
        nn.quantize(self.model, GROUP, 4, class_predicate=predicate)
        forget([array for _, array in tree_flatten(self.model.parameters())])

    def new_cache(self, context: int) -> Any:
        cache = self._make_cache(self.model)
        self.model(mx.zeros((1, context), mx.int32), cache=cache)
        return cache

    def step(self, token: mx.array, cache: Any) -> list[mx.array]:
        return self.sample(self.model(token.reshape(1, 1), cache=cache)[:, -1, :])

    def sample(self, logits: mx.array) -> list[mx.array]:
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return [mx.argmax(logprobs, axis=-1), logprobs]

    def held(self, cache: Sequence[Any]) -> list[mx.array]:
        found: list[mx.array] = []
        for layer in cache:
            values = [
                v for value in vars(layer).values() for v in (value if isinstance(value, list) else [value])
            ]
            found += [v for v in values if isinstance(v, mx.array)]
        return found


SIDES: dict[str, type[Ours] | type[MlxLm]] = {Ours.name: Ours, MlxLm.name: MlxLm}


@contextmanager
def with_kernels() -> Iterator[None]:
    """Our step as a Mac runs it whose every kernel has earned its place, the blocks compiled."""
    with metal.executing(mx.fast.metal_kernel), force("metal"):
        yield


@contextmanager
def _ops_named() -> Iterator[None]:
    call = Op.__call__

    def named_call(op: Op[..., Any], *args: Any, **kwargs: Any) -> Any:
        return region(f"op {op.name}", partial(call, op))(*args, **kwargs)

    with patch.object(Op, "__call__", named_call):
        yield


def traced(side: str, raw: Mapping[str, Any], context: int) -> Graph:
    """One step of a side behind `context` tokens."""
    with as_on_metal(), ExitStack() as stack:
        if side == Ours.name:
            stack.enter_context(with_kernels())
            stack.enter_context(named(our_methods()))
            stack.enter_context(_ops_named())
        else:
            stack.enter_context(named(their_methods()))
        token = mx.array(0)

        def step() -> tuple[list[mx.array], list[mx.array]]:
            made = SIDES[side](raw)
            cache = made.new_cache(context)
            hold(made.held(cache))
            return made.step(token, cache), made.held(cache)

        return trace(step)


def our_methods() -> list[tuple[type, str]]:
    """The methods whose calls are told apart in a trace of `Ours`."""
    found: list[tuple[type, str]] = [(Decoder, "embed"), (Decoder, "logits"), (Sampler, "__call__")]
    found.append((AttentionCache, "append"))
    for owner in (Block, Attention, DeltaNet, MoE, Dense):
        found += [
            (owner, name)
            for name, value in vars(owner).items()
            if callable(value) and not isinstance(value, type) and name != "__init__"
        ]
    return found


def their_methods() -> list[tuple[type, str]]:
    """The same for `MlxLm`: every kind of module below the whole model."""
    import mlx.nn as nn
    from mlx_lm.models import qwen3_5, qwen3_moe, qwen3_next, switch_layers

    kinds = {nn.RMSNorm, nn.QuantizedEmbedding, nn.QuantizedLinear}
    for module in (qwen3_5, qwen3_moe, qwen3_next, switch_layers):
        kinds |= {
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, nn.Module) and "Model" not in value.__name__
        }
    return [(MlxLm, "sample"), *((kind, "__call__") for kind in kinds if "__call__" in vars(kind))]
