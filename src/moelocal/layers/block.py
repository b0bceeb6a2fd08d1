"""One decoder layer: h = x + mixer(norm(x)); y = h + mlp(norm(h))."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import mlx.core as mx

from moelocal.cache import AttentionCache, LayerCache, RecurrentCache
from moelocal.checkpoint.scope import AnyScope
from moelocal.config import AttentionSpec, LayerSpec, MoESpec
from moelocal.layers.attention import Attention
from moelocal.layers.delta_net import DeltaNet
from moelocal.layers.mlp import Dense, MoE
from moelocal.ops.add_norm import add_norm
from moelocal.ops.norm import rms_norm


class Block:
    """x [B, T, H] -> [B, T, H], or its last `rows` positions."""

    def __init__(self, scope: AnyScope, spec: LayerSpec, hidden: int, eps: float, dtype: mx.Dtype) -> None:
        self.eps = eps
        self.before_mixer = scope.array("input_layernorm.weight", (hidden,))
        self.before_mlp = scope.array("post_attention_layernorm.weight", (hidden,))
        self.mixer = (
            Attention(scope.at("self_attn"), spec.mixer, hidden, eps, dtype)
            if isinstance(spec.mixer, AttentionSpec)
            else DeltaNet(scope.at("linear_attn"), spec.mixer, hidden, eps, dtype)
        )
        self._compiled: dict[Hashable, list[Callable[..., Any]]] = {}
        mlp = scope.at("mlp")
        self.mlp = (
            MoE(mlp, spec.mlp, hidden, dtype)
            if isinstance(spec.mlp, MoESpec)
            else Dense(mlp, spec.mlp, hidden, dtype)
        )

    @property
    def arrays(self) -> list[mx.array]:
        """Every weight of the layer, for `mx.eval`."""
        return [self.before_mixer, self.before_mlp, *self.mixer.arrays, *self.mlp.arrays]

    def feed_forward(self, x: mx.array, mixed: mx.array) -> mx.array:
        h, normed = add_norm(x, mixed, self.before_mlp, self.eps)
        return self.mlp(normed, h)

    def __call__(
        self,
        x: mx.array,
        cache: LayerCache,
        position: int,
        padding: mx.array | None,
        valid: mx.array | None,
        rows: int | None,
    ) -> mx.array:
        normed = rms_norm(x, self.before_mixer, self.eps)
        if isinstance(self.mixer, Attention):
            assert isinstance(cache, AttentionCache)
            mixed = self.mixer(normed, cache, position, padding, rows)
        else:
            assert isinstance(cache, RecurrentCache)
            mixed = self.mixer(normed, cache, valid)
        if rows is not None:
            x, mixed = x[:, -rows:], mixed[:, -rows:]
        return self.feed_forward(x, mixed)

    def step(
        self, x: mx.array, cache: LayerCache, position: mx.array, length: mx.array, setting: Hashable
    ) -> mx.array:
        """One token per row, [B, 1, H] -> [B, 1, H]: as `__call__`, in functions compiled once per batch size, size of
        the cache's buffers, and `setting` (`ops.op.setting`).

        Position and length (position + 1) are arrays: as numbers they would be constants of the compiled function. The
        write into the cache stays outside: with a position that is an array it takes two launches.
        """
        functions = self._functions(setting)
        result: mx.array
        if isinstance(cache, AttentionCache):
            enter, leave, *_ = functions
            q, stored, *gate = enter(x, position)
            result = leave(x, q, cache.append(stored), length, *gate)
            return result
        (whole,) = functions
        if cache.conv is None or cache.state is None:
            assert isinstance(self.mixer, DeltaNet)
            cache.conv, cache.state = self.mixer.begin(x.shape[0])
        result, cache.conv, cache.state = whole(x, cache.conv, cache.state)
        return result

    def step_rows(
        self,
        x: mx.array,
        caches: Sequence[AttentionCache],
        positions: mx.array,
        lengths: Sequence[mx.array],
        setting: Hashable,
    ) -> mx.array:
        """`step` of an attention layer whose rows stand at positions of their own, int32 [B], each with its own cache.

        Every row attends by itself, in the functions that it would run alone; all else is one product for all rows.
        """
        enter, _, attend, finish = self._functions(setting)
        rows = len(caches)
        q, stored, *gate = enter(x, positions)
        stored = stored.reshape(2, rows, *stored.shape[1:])
        parts = zip(caches, lengths, mx.split(q, rows), *(mx.split(g, rows) for g in gate), strict=True)
        heads = [
            attend(q_row, cache.append(stored[:, row]), length, *gate_row)
            for row, (cache, length, q_row, *gate_row) in enumerate(parts)
        ]
        result: mx.array = finish(x, mx.concatenate(heads))
        return result

    def _functions(self, setting: Hashable) -> list[Callable[..., Any]]:
        """The compiled functions of a step under `setting`; each is traced when it is first called."""
        functions = self._compiled.get(setting)
        if functions is None:
            attention = (self._enter, self._leave, self._attend, self._finish)
            steps = attention if isinstance(self.mixer, Attention) else (self._whole,)
            functions = self._compiled[setting] = [mx.compile(step) for step in steps]
        return functions

    def _enter(self, x: mx.array, position: mx.array) -> list[mx.array]:
        assert isinstance(self.mixer, Attention)
        q, stored, gate = self.mixer.prologue(rms_norm(x, self.before_mixer, self.eps), position)
        return [q, stored] if gate is None else [q, stored, gate]

    def _leave(
        self,
        x: mx.array,
        q: mx.array,
        buffers: Sequence[mx.array],
        length: mx.array,
        gate: mx.array | None = None,
    ) -> mx.array:
        return self._finish(x, self._attend(q, buffers, length, gate))

    def _attend(
        self, q: mx.array, buffers: Sequence[mx.array], length: mx.array, gate: mx.array | None = None
    ) -> mx.array:
        assert isinstance(self.mixer, Attention)
        return self.mixer.attend_step(q, buffers, length, gate)

    def _finish(self, x: mx.array, heads: mx.array) -> mx.array:
        assert isinstance(self.mixer, Attention)
        return self.feed_forward(x, self.mixer.epilogue(heads))

    def _whole(self, x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        assert isinstance(self.mixer, DeltaNet)
        normed = rms_norm(x, self.before_mixer, self.eps)
        y, conv, state = self.mixer.step(normed, conv, state, None)
        return self.feed_forward(x, y), conv, state
