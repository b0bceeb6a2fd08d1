"""The full-attention mixer: q/k norm, partial rotary embedding, grouped heads, and (hybrid families) an output gate."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from moelocal.cache import AttentionCache
from moelocal.checkpoint.scope import AnyScope
from moelocal.config import AttentionSpec
from moelocal.formats import QuantizedArray, arrays_of, infer_spec
from moelocal.layers.projection import Projection
from moelocal.layers.rope import attention_factor, frequencies
from moelocal.ops.attend import attend
from moelocal.ops.attend_packed import attend_packed
from moelocal.ops.linear import linear
from moelocal.ops.prologue import PrologueWeights, prologue


class Attention:
    """x [B, T, H] -> [B, T, H]. With a gate, q_proj's rows are per head [q D | gate D], and the output of the heads is
    multiplied by σ(gate) before o_proj (transformers, modeling_qwen3_next.py)."""

    def __init__(
        self, scope: AnyScope, spec: AttentionSpec, hidden: int, eps: float, dtype: mx.Dtype
    ) -> None:
        self.spec, self.scale = spec, spec.head_dim**-0.5
        q_rows = spec.heads * spec.head_dim * (2 if spec.gated else 1)
        kv_rows = spec.kv_heads * spec.head_dim
        self.qkv = Projection(
            [
                scope.matrix("q_proj", q_rows, hidden, dtype),
                scope.matrix("k_proj", kv_rows, hidden, dtype),
                scope.matrix("v_proj", kv_rows, hidden, dtype),
            ]
        )
        self.out = scope.matrix("o_proj", hidden, spec.heads * spec.head_dim, dtype)
        factor, turns = attention_factor(spec), frequencies(spec)
        self.weights = PrologueWeights(
            spec,
            eps,
            q_norm=scope.array("q_norm.weight", (spec.head_dim,)) * factor,
            k_norm=scope.array("k_norm.weight", (spec.head_dim,)) * factor,
            frequencies=turns,
            periods=1.0 / turns,
        )

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.qkv.arrays, *arrays_of(self.out), *self.weights.arrays]

    def prologue(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array, mx.array | None]:
        """Rotated q [B, Hq, T, D], what the cache stores [2·B, Hkv, T, D], gate [B, T, Hq, D] or None."""
        spec = self.spec
        q, k, v = self.qkv(x)
        gate = None
        if spec.gated:
            gate = q.reshape(*q.shape[:2], spec.heads, -1)[..., spec.head_dim :]
        return *prologue(q, k, v, offset, self.weights), gate

    def attend(
        self,
        q: mx.array,
        stored: mx.array,
        gate: mx.array | None,
        cache: AttentionCache,
        padding: mx.array | None,
    ) -> mx.array:
        """Append to the cache and attend over all of it -> gated heads [B, T, Hq·D]."""
        cache.append(stored)
        return self._attend(q, cache.part(0, cache.length), padding, gate)

    def attend_step(
        self, q: mx.array, buffers: Sequence[mx.array], length: mx.array, gate: mx.array | None
    ) -> mx.array:
        """The same over the first `length` positions of the buffers of a cache, in shapes that do not grow with it."""
        return self._attend(q, buffers, None, gate, length)

    def _attend(
        self,
        q: mx.array,
        buffers: Sequence[mx.array],
        padding: mx.array | None,
        gate: mx.array | None,
        length: mx.array | None = None,
    ) -> mx.array:
        kept = [mx.split(buffer, 2) for buffer in buffers]
        if len(kept) == 1:
            ((keys, values),) = kept
            return attend(q, keys, values, self.scale, padding, gate, length)
        codes, scales, biases = kept
        packed, groups = codes[0].shape[-1], scales[0].shape[-1]
        spec = infer_spec("keys and values", packed, groups, scales[0].dtype, self.spec.head_dim)
        k, v = (QuantizedArray(codes[i], scales[i], biases[i], spec) for i in range(2))
        return attend_packed(q, k, v, self.scale, padding, gate, length)

    def epilogue(self, heads: mx.array) -> mx.array:
        """Gated heads [B, T, Hq·D] -> [B, T, H]."""
        return linear(heads, self.out)

    def __call__(
        self,
        x: mx.array,
        cache: AttentionCache,
        position: int,
        padding: mx.array | None,
        rows: int | None = None,
    ) -> mx.array:
        q, stored, gate = self.prologue(x, position if padding is None else position - padding)
        if rows is not None:  # keys and values are kept of all positions, the others ask for nothing
            q, gate = q[:, :, -rows:], None if gate is None else gate[:, -rows:]
        return self.epilogue(self.attend(q, stored, gate, cache, padding))
