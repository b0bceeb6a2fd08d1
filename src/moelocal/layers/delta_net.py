"""The gated delta net mixer: projections around `ops.delta_net`."""

from __future__ import annotations

import mlx.core as mx

from moelocal.cache import RecurrentCache
from moelocal.checkpoint.scope import AnyScope
from moelocal.config import DeltaNetSpec
from moelocal.formats import arrays_of
from moelocal.layers.projection import Projection
from moelocal.ops.delta_net import DeltaNetWeights, delta_net
from moelocal.ops.linear import linear


class DeltaNet:
    """x [B, T, H] -> [B, T, H], with the recurrent state of its cache carried on."""

    def __init__(self, scope: AnyScope, spec: DeltaNetSpec, hidden: int, eps: float, dtype: mx.Dtype) -> None:
        self.spec, self.dtype = spec, dtype
        values = spec.value_heads * spec.value_dim
        self.inputs = Projection(
            [
                scope.matrix("in_proj_qkv", spec.conv_channels, hidden, dtype),
                scope.matrix("in_proj_z", values, hidden, dtype),
                scope.matrix("in_proj_b", spec.value_heads, hidden, dtype),
                scope.matrix("in_proj_a", spec.value_heads, hidden, dtype),
            ]
        )
        self.out = scope.matrix("out_proj", hidden, values, dtype)
        self.weights = DeltaNetWeights.build(
            spec,
            # a step reads them: as stored they are half the bytes
            conv=scope.array(
                "conv1d.weight",
                (spec.conv_channels, spec.conv_width, 1),
                mx.float32 if dtype == mx.float32 else None,
            ),
            a_log=scope.array("A_log", (spec.value_heads,)),
            dt_bias=scope.array("dt_bias", (spec.value_heads,)),
            norm=scope.array("norm.weight", (spec.value_dim,)),
            eps=eps,
        )

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.inputs.arrays, *arrays_of(self.out), *self.weights.arrays]

    def begin(self, batch: int) -> tuple[mx.array, mx.array]:
        """The conv rows and state before the first token: zeros."""
        spec = self.spec
        return (
            mx.zeros((batch, spec.conv_width - 1, spec.conv_channels), self.dtype),
            mx.zeros((batch, spec.value_heads, spec.value_dim, spec.key_dim), mx.float32),
        )

    def step(
        self, x: mx.array, conv: mx.array, state: mx.array, valid: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Pure form: x, conv, state -> y, conv, state."""
        u, z, b, a = self.inputs(x)
        y, conv, state = delta_net(u, z, b, a, conv, state, valid, self.weights)
        return linear(y, self.out), conv, state

    def __call__(self, x: mx.array, cache: RecurrentCache, valid: mx.array | None) -> mx.array:
        conv, state = cache.conv, cache.state
        if conv is None or state is None:
            conv, state = self.begin(x.shape[0])
        y, cache.conv, cache.state = self.step(x, conv, state, valid)
        return y
