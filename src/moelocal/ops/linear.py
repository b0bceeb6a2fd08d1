"""y = x Wᵀ for a dense or packed W. x [..., cols], W [rows, cols] -> [..., rows] in the dtype of x."""

from __future__ import annotations

import mlx.core as mx

from moelocal.formats import QuantizedArray, Weight
from moelocal.ops.host import borrow, borrow_weight, many_rows
from moelocal.ops.op import Op


def reference(x: mx.array, weight: Weight) -> mx.array:
    plain = weight.dequantize(mx.float32) if isinstance(weight, QuantizedArray) else weight.astype(mx.float32)
    return (x.astype(mx.float32) @ plain.T).astype(x.dtype)


def portable(x: mx.array, weight: Weight) -> mx.array:
    return x @ weight.T if isinstance(weight, mx.array) else weight.product(x)


def host(x: mx.array, weight: Weight) -> mx.array:
    return mx.array(borrow(x) @ borrow_weight(weight).T)


linear = Op(
    "linear", reference=reference, portable=portable, host=host, host_when=lambda x, weight: many_rows(x)
)
