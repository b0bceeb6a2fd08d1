"""The expert block: Σ_k w_k · down_k(silu(gate_k x) ⊙ up_k x), plus σ(s) · the shared expert, summed in float32.

x [N, H]; chosen uint32 [N, K]; weights float32 [N, K]; shared_gate [N, 1] logits s, or None -> [N, H] in x's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from moelocal.formats import QuantizedArray, Weight, arrays_of
from moelocal.ops import linear as lin
from moelocal.ops.host import Host, borrow, borrow_weight, many_rows, silu
from moelocal.ops.op import Op

SORT_FROM = 64
"""Chosen (token, expert) pairs from which sorting them by expert pays: weights are then read once per expert."""


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """gate and up [..., I, H], joined along rows where they have one form (else two), and down [..., H, I]."""

    gate_up: tuple[Weight, ...]
    down: Weight

    @property
    def arrays(self) -> list[mx.array]:
        return [array for weight in (*self.gate_up, self.down) for array in arrays_of(weight)]


def swiglu(parts: list[mx.array]) -> mx.array:
    """silu(gate) ⊙ up, from [..., 2I] or from two [..., I]."""
    gate, up = mx.split(parts[0], 2, axis=-1) if len(parts) == 1 else parts
    return gate * mx.sigmoid(gate) * up


def _plain(weight: Weight) -> mx.array:
    return weight.dequantize(mx.float32) if isinstance(weight, QuantizedArray) else weight.astype(mx.float32)


def reference(
    x: mx.array,
    routed: SwiGLU,
    chosen: mx.array,
    weights: mx.array,
    shared: SwiGLU | None,
    shared_gate: mx.array | None,
) -> mx.array:
    wide = x.astype(mx.float32)
    gate, up = mx.split(mx.concatenate([_plain(w) for w in routed.gate_up], axis=-2), 2, axis=-2)  # [E, I, H]
    total = mx.zeros_like(wide)
    for k in range(chosen.shape[1]):
        e = chosen[:, k]
        column = wide[:, :, None]
        hidden = (gate[e] @ column) * mx.sigmoid(gate[e] @ column) * (up[e] @ column)  # [N, I, 1]
        total = total + weights[:, k, None] * (_plain(routed.down)[e] @ hidden)[..., 0]
    if shared is not None and shared_gate is not None:
        out = lin.reference(swiglu([lin.reference(wide, w) for w in shared.gate_up]), shared.down)
        total = total + mx.sigmoid(shared_gate.astype(mx.float32)) * out
    return total.astype(x.dtype)


def _gathered(x: mx.array, weight: Weight, experts: mx.array, ordered: bool) -> mx.array:
    """x [..., 1, cols] times the matrix of the expert of each row -> [..., 1, rows]."""
    if isinstance(weight, mx.array):
        return mx.gather_mm(x, mx.swapaxes(weight, -1, -2), rhs_indices=experts, sorted_indices=ordered)
    spec = weight.spec
    return mx.gather_qmm(
        x,
        weight.weight,
        weight.scales,
        weight.biases,
        rhs_indices=experts,
        transpose=True,
        group_size=spec.group,
        bits=spec.bits,
        mode=spec.mode,
        sorted_indices=ordered,
    )


def portable(
    x: mx.array,
    routed: SwiGLU,
    chosen: mx.array,
    weights: mx.array,
    shared: SwiGLU | None,
    shared_gate: mx.array | None,
) -> mx.array:
    (tokens, per_token), hidden = chosen.shape, x.shape[-1]
    # the CPU's gather_mm knows float32 only; there dense experts are loaded as float32
    dtype = routed.down.dtype if isinstance(routed.down, mx.array) else x.dtype
    ordered = chosen.size >= SORT_FROM
    if ordered:
        flat = chosen.reshape(-1)
        order = mx.argsort(flat)
        rows, experts = x[order // per_token][:, None, :], flat[order]
    else:
        rows, experts = x[:, None, None, :], chosen
    rows = rows.astype(dtype)
    inner = swiglu([_gathered(rows, w, experts, ordered) for w in routed.gate_up])
    out = _gathered(inner, routed.down, experts, ordered)
    if ordered:
        out = out[mx.argsort(order)]
    out = out.reshape(tokens, per_token, hidden).astype(mx.float32)
    total = (weights[:, None, :] @ out)[:, 0]
    if shared is not None and shared_gate is not None:
        extra = lin.portable(swiglu([lin.portable(x, w) for w in shared.gate_up]), shared.down)
        total = total + mx.sigmoid(shared_gate.astype(mx.float32)) * extra
    return total.astype(x.dtype)


def _host_swiglu(x: Host, gate_up: list[Host], down: Host) -> Host:
    parts = [x @ w.T for w in gate_up]
    gate, up = np.split(parts[0], 2, axis=-1) if len(parts) == 1 else parts
    hidden: Host = (silu(gate) * up) @ down.T
    return hidden


def host(
    x: mx.array,
    routed: SwiGLU,
    chosen: mx.array,
    weights: mx.array,
    shared: SwiGLU | None,
    shared_gate: mx.array | None,
) -> mx.array:
    mx.eval(x, chosen, weights)
    rows, w = borrow(x), borrow(weights).reshape(-1)
    flat, per_token = np.asarray(chosen).reshape(-1), chosen.shape[1]
    total = np.zeros_like(rows)
    gate_up, down = [borrow_weight(g) for g in routed.gate_up], borrow_weight(routed.down)
    order = np.argsort(flat, kind="stable")
    starts = np.searchsorted(flat[order], np.arange(len(down) + 1))
    for e in range(len(down)):
        pairs = order[starts[e] : starts[e + 1]]
        if len(pairs):
            # a token meets an expert at most once, so that += over its rows is safe
            token = pairs // per_token
            total[token] += w[pairs, None] * _host_swiglu(rows[token], [g[e] for g in gate_up], down[e])
    if shared is not None and shared_gate is not None:
        gate = borrow(mx.sigmoid(shared_gate.astype(mx.float32)))
        total += gate * _host_swiglu(
            rows, [borrow_weight(g) for g in shared.gate_up], borrow_weight(shared.down)
        )
    return mx.array(total)


experts = Op(
    "experts", reference=reference, portable=portable, host=host, host_when=lambda x, *rest: many_rows(x)
)
