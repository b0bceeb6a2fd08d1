"""One decoder layer: h = x + mixer(norm(x)); y = h + mlp(norm(h))."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import mlx.core as mx

from moelocal.cache import AttentionCache, LayerCache, RecurrentCache
from moelocal.checkpoint.scope import Scope
from moelocal.config import AttentionSpec, LayerSpec, MoESpec
from moelocal.layers.attention import Attention
from moelocal.layers.delta_net import DeltaNet
from moelocal.layers.mlp import Dense, MoE
from moelocal.ops.add_norm import add_norm
from moelocal.ops.norm import rms_norm


class Block:
    """x [B, T, H] -> [B, T, H], or its last `rows` positions."""

    def __init__(self, scope: Scope, spec: LayerSpec, hidden: int, eps: float, dtype: mx.Dtype) -> None:
        self.eps = eps
        self.before_mixer = scope.array("input_layernorm.weight", (hidden,))
        self.before_mlp = scope.array("post_attention_layernorm.weight", (hidden,))
        self.mixer = (
            Attention(scope.at("self_attn"), spec.mixer, hidden, eps, dtype)
            if isinstance(spec.mixer, AttentionSpec)
            else DeltaNet(scope.at("linear_attn"), spec.mixer, hidden, eps, dtype)
        )
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
            mixed = self.mixer(normed, cache, position, padding)
        else:
            assert isinstance(cache, RecurrentCache)
            mixed = self.mixer(normed, cache, valid)
        if rows is not None:
            x, mixed = x[:, -rows:], mixed[:, -rows:]
        return self.feed_forward(x, mixed)

    def step(self, x: mx.array, cache: LayerCache, position: mx.array) -> mx.array:
        """One token per row, [B, 1, H] -> [B, 1, H]: as `__call__`, in functions compiled once per batch size.

        Position is an array: as a number it would be a constant of the compiled function. Keys and values grow, so
        the cache and the attention over it stay outside.
        """
        if isinstance(self.mixer, Attention):
            assert isinstance(cache, AttentionCache)
            q, stored, *gate = self._enter(x, position)
            return self._leave(x, self.mixer.attend(q, stored, gate[0] if gate else None, cache, None))
        assert isinstance(cache, RecurrentCache)
        if cache.conv is None or cache.state is None:
            cache.conv, cache.state = self.mixer.begin(x.shape[0])
        y, cache.conv, cache.state = self._whole(x, cache.conv, cache.state)
        return y

    @cached_property
    def _enter(self) -> Callable[..., list[mx.array]]:
        def enter(x: mx.array, position: mx.array) -> list[mx.array]:
            assert isinstance(self.mixer, Attention)
            q, stored, gate = self.mixer.prologue(rms_norm(x, self.before_mixer, self.eps), position)
            return [q, stored] if gate is None else [q, stored, gate]

        return mx.compile(enter)

    @cached_property
    def _leave(self) -> Callable[..., mx.array]:
        def leave(x: mx.array, heads: mx.array) -> mx.array:
            assert isinstance(self.mixer, Attention)
            return self.feed_forward(x, self.mixer.epilogue(heads))

        return mx.compile(leave)

    @cached_property
    def _whole(self) -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
        def whole(x: mx.array, conv: mx.array, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            assert isinstance(self.mixer, DeltaNet)
            normed = rms_norm(x, self.before_mixer, self.eps)
            y, conv, state = self.mixer.step(normed, conv, state, None)
            return self.feed_forward(x, y), conv, state

        return mx.compile(whole)
