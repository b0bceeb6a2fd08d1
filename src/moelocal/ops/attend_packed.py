"""`attend` over keys and values that are kept as affine codes.

k and v: `QuantizedArray` [B, Hkv, S, D], one spec. All else as in attend.py; the result is that of `attend` over the
keys and values that the codes stand for, which few queries never spell out.
"""

from __future__ import annotations

from typing import Final

import mlx.core as mx

from moelocal.formats import QuantizedArray
from moelocal.ops import attend as dense
from moelocal.ops import choice
from moelocal.ops.op import Op

FEW: Final = 8
"""Queries up to which codes are multiplied as they are. More of them share the cost of spelling out keys and values,
whose memory `engine.plan` counts."""


def reference(
    q: mx.array,
    k: QuantizedArray,
    v: QuantizedArray,
    scale: float,
    hidden: mx.array | None,
    gate: mx.array | None,
    length: mx.array | None = None,
) -> mx.array:
    keys, values = k.dequantize(mx.float32), v.dequantize(mx.float32)
    return dense.reference(q, keys, values, scale, hidden, gate, length)


def portable(
    q: mx.array,
    k: QuantizedArray,
    v: QuantizedArray,
    scale: float,
    hidden: mx.array | None,
    gate: mx.array | None,
    length: mx.array | None = None,
) -> mx.array:
    batch, heads, time, size = q.shape
    if time > FEW:
        return dense.attend(q, k.dequantize(q.dtype), v.dequantize(q.dtype), scale, hidden, gate, length)
    groups, keys = k.weight.shape[1], k.weight.shape[2]
    # float32, as products are rounded to the dtype of their factors and scores are exponents
    rows = (q.astype(mx.float32) * scale).reshape(batch, groups, heads // groups * time, size)
    scores = k.astype(mx.float32).product(rows).reshape(batch, heads, time, keys)
    scores = mx.where(dense.visible(time, keys, hidden, length), scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1).reshape(batch, groups, -1, keys)
    y = v.astype(mx.float32).product(weights, transpose=False)
    y = y.reshape(batch, heads, time, size).swapaxes(1, 2)
    if gate is not None:
        y = y * mx.sigmoid(gate.astype(mx.float32))
    return y.reshape(batch, time, -1).astype(q.dtype)


BLOCKS: Final = dense.blocks_kernel(
    "attend_packed_block",
    "attend_packed",
    "packed_rows<BITS, GROUP>(k, k_scales, k_biases, k_strides, k_scales_strides, k_biases_strides)",
    "packed_rows<BITS, GROUP>(v, v_scales, v_biases, v_strides, v_scales_strides, v_biases_strides)",
    ("k", "k_scales", "k_biases", "v", "v_scales", "v_biases"),
)


def metal(
    q: mx.array,
    k: QuantizedArray,
    v: QuantizedArray,
    scale: float,
    hidden: mx.array | None,
    gate: mx.array | None,
    length: mx.array | None = None,
) -> mx.array:
    template = {"BITS": k.spec.bits, "GROUP": k.spec.group}
    return dense.in_blocks(BLOCKS, template, q, (*k.arrays, *v.arrays), scale, gate, length)


def supports(
    q: mx.array,
    k: QuantizedArray,
    v: QuantizedArray,
    scale: float,
    hidden: mx.array | None,
    gate: mx.array | None,
    length: mx.array | None = None,
) -> bool:
    spec, arrays = k.spec, (*k.arrays, *v.arrays)
    return (
        dense.fits(q, k.weight.shape[1], hidden, gate)
        and spec == v.spec
        and spec.mode == "affine"
        and spec.bits in (4, 8)
        and q.shape[3] == k.scales.shape[3] * spec.group
        and k.weight.shape == v.weight.shape
        # fewer scales would come in `constant` address space
        and all(part.dtype == q.dtype and part.size >= 8 for part in arrays if part.dtype != mx.uint32)
    )


attend_packed = Op(
    "attend_packed",
    reference=reference,
    portable=portable,
    metal=metal,
    supports=supports,
    # as of `attend`: a context grows by a key with every token
    key=lambda q, k, v, scale, hidden, gate, length=None: (
        choice.shapes(q, gate),
        (k.weight.shape[1], k.spec.bits, k.spec.group),
        choice.size_class(k.weight.shape[2]),
    ),
)
