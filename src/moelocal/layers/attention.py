"""The full-attention mixer: q/k norm, partial rotary embedding, grouped heads, and (hybrid families) an output gate."""

from __future__ import annotations

import mlx.core as mx

from moelocal.cache import AttentionCache
from moelocal.checkpoint.scope import Scope
from moelocal.config import AttentionSpec
from moelocal.formats import arrays_of
from moelocal.layers.projection import Projection
from moelocal.layers.rope import Rope
from moelocal.ops.attend import attend
from moelocal.ops.linear import linear
from moelocal.ops.norm import rms_norm


class Attention:
    """x [B, T, H] -> [B, T, H]. With a gate, q_proj's rows are per head [q D | gate D], and the output of the heads is
    multiplied by σ(gate) before o_proj (transformers, modeling_qwen3_next.py)."""

    def __init__(self, scope: Scope, spec: AttentionSpec, hidden: int, eps: float, dtype: mx.Dtype) -> None:
        self.spec, self.eps, self.scale = spec, eps, spec.head_dim**-0.5
        self.rope = Rope(spec)
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
        self.q_norm = scope.array("q_norm.weight", (spec.head_dim,))
        self.k_norm = scope.array("k_norm.weight", (spec.head_dim,))

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.qkv.arrays, *arrays_of(self.out), self.q_norm, self.k_norm]

    def prologue(
        self, x: mx.array, offset: int | mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
        """Rotated q [B, Hq, T, D] and k, plain v [B, Hkv, T, D], gate [B, T, Hq·D] or None."""
        batch, time, _ = x.shape
        spec = self.spec
        q, k, v = self.qkv(x)
        gate = None
        q = q.reshape(batch, time, spec.heads, -1)
        if spec.gated:
            q, gate = mx.split(q, 2, axis=-1)
            gate = gate.reshape(batch, time, -1)
        q = rms_norm(q, self.q_norm, self.eps)
        k = rms_norm(k.reshape(batch, time, spec.kv_heads, -1), self.k_norm, self.eps)
        v = v.reshape(batch, time, spec.kv_heads, -1)
        return (
            self.rope(q.swapaxes(1, 2), offset),
            self.rope(k.swapaxes(1, 2), offset),
            v.swapaxes(1, 2),
            gate,
        )

    def epilogue(self, heads: mx.array, gate: mx.array | None) -> mx.array:
        """Heads [B, Hq, T, D] -> [B, T, H]."""
        batch, _, time, _ = heads.shape
        y = heads.swapaxes(1, 2).reshape(batch, time, -1)
        return linear(y if gate is None else y * mx.sigmoid(gate), self.out)

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, cache: AttentionCache, padding: mx.array | None
    ) -> mx.array:
        """Append k and v to the cache and attend over all of it."""
        keys, values = cache.append(k, v)
        return attend(q, keys, values, self.scale, padding)

    def __call__(
        self, x: mx.array, cache: AttentionCache, position: int, padding: mx.array | None
    ) -> mx.array:
        q, k, v, gate = self.prologue(x, position if padding is None else position - padding)
        return self.epilogue(self.attend(q, k, v, cache, padding), gate)
