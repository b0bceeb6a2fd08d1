"""One decoder layer: h = x + mixer(norm(x)); y = h + mlp(norm(h))."""

from __future__ import annotations

import mlx.core as mx

from moelocal.cache import AttentionCache, LayerCache, RecurrentCache
from moelocal.checkpoint.scope import Scope
from moelocal.config import AttentionSpec, LayerSpec, MoESpec
from moelocal.layers.attention import Attention
from moelocal.layers.delta_net import DeltaNet
from moelocal.layers.mlp import Dense, MoE
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

    def feed_forward(self, h: mx.array) -> mx.array:
        return h + self.mlp(rms_norm(h, self.before_mlp, self.eps))

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
        h = x + mixed
        return self.feed_forward(h if rows is None else h[:, -rows:])
