"""The feed-forward of a layer: one SwiGLU, or routed experts with a gated shared one."""

from __future__ import annotations

import mlx.core as mx

from moelocal.checkpoint.scope import AnyScope
from moelocal.config import DenseSpec, MoESpec
from moelocal.formats import Weight
from moelocal.layers.projection import fuse
from moelocal.ops.experts import SwiGLU, experts, swiglu
from moelocal.ops.linear import linear
from moelocal.ops.op import on_cpu
from moelocal.ops.route import route
from moelocal.ops.router import RouterWeights, router


def _swiglu(scope: AnyScope, width: int, hidden: int, dtype: mx.Dtype, count: int | None = None) -> SwiGLU:
    gate = scope.matrix("gate_proj", width, hidden, dtype, count)
    up = scope.matrix("up_proj", width, hidden, dtype, count)
    return SwiGLU(fuse([gate, up]), scope.matrix("down_proj", hidden, width, dtype, count))


class Dense:
    """x, residual [B, T, H] -> residual + down(silu(gate x) ⊙ up x)."""

    def __init__(self, scope: AnyScope, spec: DenseSpec, hidden: int, dtype: mx.Dtype) -> None:
        self.weights = _swiglu(scope, spec.width, hidden, dtype)

    @property
    def arrays(self) -> list[mx.array]:
        return self.weights.arrays

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        inner = swiglu([linear(x, w) for w in self.weights.gate_up])
        # of another rank: as it is, it keeps the stride of the row that it is half of, and MLX's product copies it
        flat = inner.reshape(-1, inner.shape[-1])
        return residual + linear(flat, self.weights.down).reshape(x.shape)


class MoE:
    """x, residual [B, T, H] -> residual, the chosen experts' weighted sum and the shared expert, added up. The router
    computes in float32."""

    def __init__(self, scope: AnyScope, spec: MoESpec, hidden: int, dtype: mx.Dtype) -> None:
        self.spec = spec
        matrices = [scope.matrix("gate", spec.experts, hidden, None)]
        self.shared: SwiGLU | None = None
        if spec.shared_width:
            matrices.append(scope.matrix("shared_expert_gate", 1, hidden, None))
            self.shared = _swiglu(scope.at("shared_expert"), spec.shared_width, hidden, dtype)
        self.router = RouterWeights.build(matrices)
        routed = _swiglu(scope.at("switch_mlp"), spec.width, hidden, dtype, spec.experts)
        # MLX's CPU product with chosen experts knows float32 only
        self.routed = _widened(routed) if on_cpu() else routed

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.router.arrays, *self.routed.arrays, *(self.shared.arrays if self.shared else [])]

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        logits = router(x, self.router)
        chosen, weights, share = route(
            logits, self.spec.per_token, self.spec.normalize, self.shared is not None
        )
        return experts(x, self.routed, chosen, weights, self.shared, share, residual)


def _widened(weights: SwiGLU) -> SwiGLU:
    def wide(weight: Weight) -> Weight:
        return weight.astype(mx.float32) if isinstance(weight, mx.array) else weight

    return SwiGLU(tuple(wide(w) for w in weights.gate_up), wide(weights.down))
