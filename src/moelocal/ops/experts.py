"""The expert block: y = residual + Σ_k w_k · down_k(silu(gate_k x) ⊙ up_k x) + share · the shared expert.

x, residual [..., H] of one dtype; chosen uint32 [..., K]; weights float32 [..., K]; share float32 [..., 1]
-> y [..., H] in that dtype; N tokens in all. The sum is float32, rounded once. `shared` and `share` are None without a
shared expert, `residual` where nothing is to be added.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import mlx.core as mx
import numpy as np

from moelocal.formats import QuantizedArray, Weight, arrays_of
from moelocal.metal import Kernel
from moelocal.ops import linear as lin
from moelocal.ops.cores import ahead, cut, on_cores
from moelocal.ops.geometry import ROWS
from moelocal.ops.host import Host, borrow, dense, many_rows, silu
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


def reference(
    x: mx.array,
    routed: SwiGLU,
    chosen: mx.array,
    weights: mx.array,
    shared: SwiGLU | None,
    share: mx.array | None,
    residual: mx.array | None,
) -> mx.array:
    wide = x.astype(mx.float32)
    gate, up = mx.split(mx.concatenate([dense(w) for w in routed.gate_up], axis=-2), 2, axis=-2)  # [E, I, H]
    total = mx.zeros_like(wide) if residual is None else residual.astype(mx.float32)
    column = wide[..., None]
    for k in range(chosen.shape[-1]):
        e = chosen[..., k]
        hidden = (gate[e] @ column) * mx.sigmoid(gate[e] @ column) * (up[e] @ column)  # [..., I, 1]
        total = total + weights[..., k, None] * (dense(routed.down)[e] @ hidden)[..., 0]
    if shared is not None and share is not None:
        out = swiglu([wide @ dense(w).T for w in shared.gate_up]) @ dense(shared.down).T
        total = total + share * out
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
    share: mx.array | None,
    residual: mx.array | None,
) -> mx.array:
    *lead, per_token = chosen.shape
    hidden = x.shape[-1]
    # the CPU's gather_mm knows float32 only; there dense experts are loaded as float32
    dtype = routed.down.dtype if isinstance(routed.down, mx.array) else x.dtype
    ordered = chosen.size >= SORT_FROM
    if ordered:
        flat = chosen.reshape(-1)
        order = mx.argsort(flat)
        rows, experts = x.reshape(-1, hidden)[order // per_token][:, None, :], flat[order]
    else:
        rows, experts = x[..., None, None, :], chosen
    rows = rows.astype(dtype)

    def run(experts: mx.array) -> mx.array:
        inner = swiglu([_gathered(rows, w, experts, ordered) for w in routed.gate_up])
        return _gathered(inner, routed.down, experts, ordered)

    if ordered:
        out = run(experts)[mx.argsort(order)]
    elif parts := cut(per_token, chosen.size * sum(map(_count, (*routed.gate_up, routed.down)))):
        out = on_cores(lambda some: run(chosen[..., some]), parts, axis=-3)
    else:
        out = run(chosen)
    out = out.reshape(*lead, per_token, hidden).astype(mx.float32)
    total = (weights[..., None, :] @ out)[..., 0, :]
    if shared is not None and share is not None:
        extra = lin.portable(swiglu([lin.portable(x, w) for w in shared.gate_up]), shared.down)
        total = total + share * extra
    return (total if residual is None else residual + total).astype(x.dtype)


def _host_swiglu(parts: list[Host]) -> Host:
    """`swiglu` of NumPy's arrays."""
    gate, up = np.split(parts[0], 2, axis=-1) if len(parts) == 1 else parts
    return silu(gate) * up


UNPACKED = 1 << 22
"""Weights of experts that are unpacked at once, unless one expert is larger. Only those that were chosen are: all of a
layer are 3.2 GB in the flagship's shape, and unpacking them took longer than multiplying (docs/benchmarks.md)."""


def _count(stack: Weight) -> int:
    """Weights of one expert [E, rows, cols]."""
    if isinstance(stack, QuantizedArray):
        return stack.scales.shape[-2] * stack.scales.shape[-1] * stack.spec.group
    return stack.shape[-2] * stack.shape[-1]


def _experts(stack: Weight, some: mx.array) -> Weight:
    return stack.rows(some) if isinstance(stack, QuantizedArray) else stack[some]


def host(
    x: mx.array,
    routed: SwiGLU,
    chosen: mx.array,
    weights: mx.array,
    shared: SwiGLU | None,
    share: mx.array | None,
    residual: mx.array | None,
) -> mx.array:
    mx.eval(x, chosen, weights)
    rows, w = borrow(x).reshape(-1, x.shape[-1]), borrow(weights).reshape(-1)
    flat, per_token = np.asarray(chosen).reshape(-1), chosen.shape[-1]
    total = np.zeros_like(rows)
    order = np.argsort(flat, kind="stable")
    used, starts = np.unique(flat[order], return_index=True)
    pairs_of = np.split(order, starts[1:])
    matrices = (*routed.gate_up, routed.down)
    step = max(1, UNPACKED // sum(_count(matrix) for matrix in matrices))
    firsts = range(0, len(used), step)
    unpacked = ahead(
        lambda piece: dense(_experts(piece[1], mx.array(used[piece[0] : piece[0] + step]))),
        product(firsts, matrices),
    )
    for first in firsts:
        *gate_up, down = [borrow(next(unpacked)) for _ in matrices]
        for e, pairs in enumerate(pairs_of[first : first + step]):
            # a token meets an expert at most once, so that += over its rows is safe
            token = pairs // per_token
            inner = _host_swiglu([rows[token] @ g[e].T for g in gate_up])
            total[token] += w[pairs, None] * (inner @ down[e].T)
        del gate_up, down  # before the next ones are waited for
    if shared is not None and share is not None:
        inner = _host_swiglu([lin.on_host(rows, g) for g in shared.gate_up])
        total += borrow(share).reshape(-1, 1) * lin.on_host(inner, shared.down)
    if residual is not None:
        total += borrow(residual).reshape(total.shape)
    return mx.array(total.reshape(x.shape))


# Untuned on hardware: rows that a simdgroup owns in each launch (of gate and of up; of y); simdgroups of a threadgroup
INNER_ROWS, SUM_ROWS, SIMDGROUPS = ROWS, ROWS, 2

MOST_TOKENS = 8
"""Every token reads its experts by itself. More tokens than this have many in common, which stock MLX reads once."""

_WEIGHTS = ("packed", "scales", "biases", "shared_packed", "shared_scales", "shared_biases")
_PLACE = """threadgroup_position_in_grid.y,
    threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup, thread_index_in_simdgroup);"""

INNER = Kernel(
    name="experts_inner",
    file="experts",
    inputs=("x", *_WEIGHTS, "chosen"),
    outputs=("inner",),
    call="""experts_inner<BITS, GROUP, SHARED, SHARED_BITS, SHARED_GROUP, ROWS>(x, packed, scales, biases,
    shared_packed, shared_scales, shared_biases, chosen, inner, PER_TOKEN, packed_shape[1] / 2,
    SHARED ? shared_packed_shape[0] / 2 : 0, scales_shape[2] * GROUP, """
    + _PLACE,
)

SUM = Kernel(
    name="experts_sum",
    file="experts",
    inputs=("inner", *_WEIGHTS, "chosen", "weights", "share", "residual"),
    outputs=("y",),
    call="""experts_sum<BITS, GROUP, SHARED, SHARED_BITS, SHARED_GROUP, ROWS, RESIDUAL>(inner, packed, scales, biases,
    shared_packed, shared_scales, shared_biases, chosen, weights, share, residual, y, PER_TOKEN,
    scales_shape[2] * GROUP, SHARED ? shared_scales_shape[1] * SHARED_GROUP : 0, packed_shape[1], """
    + _PLACE,
)


def _launch(
    kernel: Kernel,
    x: mx.array,
    routed: Weight,
    shared: Weight | None,
    rest: list[mx.array],
    columns: int,
    blocks: int,
    template: dict[str, int | bool],
) -> mx.array:
    """One kernel over `blocks` simdgroups per token of x -> [..., columns]."""
    # a kernel always gets all of its inputs: where there is no shared expert the routed ones stand in, untouched
    other = routed if shared is None else shared
    assert isinstance(routed, QuantizedArray) and isinstance(other, QuantizedArray)
    threads, tokens = 32 * SIMDGROUPS, x.size // x.shape[-1]
    (y,) = kernel(
        [x, *routed.arrays, *other.arrays, *rest],
        shapes=[(*x.shape[:-1], columns)],
        dtypes=[x.dtype],
        grid=(-(-blocks // SIMDGROUPS) * threads, tokens, 1),
        threadgroup=(threads, 1, 1),
        template={
            "BITS": routed.spec.bits,
            "GROUP": routed.spec.group,
            "SHARED": shared is not None,
            "SHARED_BITS": other.spec.bits,
            "SHARED_GROUP": other.spec.group,
            "SIMDGROUPS": SIMDGROUPS,
            **template,
        },
    )
    return y


def metal(
    x: mx.array,
    routed: SwiGLU,
    chosen: mx.array,
    weights: mx.array,
    shared: SwiGLU | None,
    share: mx.array | None,
    residual: mx.array | None,
) -> mx.array:
    per_token, hidden = chosen.shape[-1], x.shape[-1]
    gate_up, down = (None, None) if shared is None else (shared.gate_up[0], shared.down)
    width, extra = _rows(routed.gate_up[0]) // 2, _rows(gate_up) // 2
    inner = _launch(
        INNER,
        x,
        routed.gate_up[0],
        gate_up,
        [chosen],
        per_token * width + extra,
        per_token * -(-width // INNER_ROWS) + -(-extra // INNER_ROWS),
        {"ROWS": INNER_ROWS, "PER_TOKEN": per_token},
    )
    return _launch(
        SUM,
        inner,
        routed.down,
        down,
        [chosen, weights, weights if share is None else share, x if residual is None else residual],
        hidden,
        -(-hidden // SUM_ROWS),
        {"ROWS": SUM_ROWS, "PER_TOKEN": per_token, "RESIDUAL": residual is not None},
    )


def _rows(weight: Weight | None) -> int:
    return weight.weight.shape[-2] if isinstance(weight, QuantizedArray) else 0


def _affine(block: SwiGLU) -> bool:
    """Whether both matrices are packed in affine groups, and an expert's words can be counted in 32 bits."""
    weights = (*block.gate_up, block.down)
    return len(weights) == 2 and all(
        isinstance(w, QuantizedArray)
        and w.spec.mode == "affine"
        and w.weight.shape[-2] * w.weight.shape[-1] < 2**31
        for w in weights
    )


def supports(
    x: mx.array,
    routed: SwiGLU,
    chosen: mx.array,
    weights: mx.array,
    shared: SwiGLU | None,
    share: mx.array | None,
    residual: mx.array | None,
) -> bool:
    return 0 < x.size <= MOST_TOKENS * x.shape[-1] and _affine(routed) and (shared is None or _affine(shared))


experts = Op(
    "experts",
    reference=reference,
    portable=portable,
    host=host,
    host_when=lambda x, *rest: many_rows(x),
    metal=metal,
    supports=supports,
)
