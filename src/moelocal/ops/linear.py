"""y = x Wᵀ for a dense or packed W. x [..., cols], W [rows, cols] -> [..., rows] in the dtype of x."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from moelocal.formats import Weight
from moelocal.ops.cores import ahead, cut, on_cores
from moelocal.ops.host import Host, borrow, dense, many_rows
from moelocal.ops.op import Op


def reference(x: mx.array, weight: Weight) -> mx.array:
    return (x.astype(mx.float32) @ dense(weight).T).astype(x.dtype)


def portable(x: mx.array, weight: Weight) -> mx.array:
    if isinstance(weight, mx.array):
        return x @ weight.T
    rows = weight.weight.shape[0]
    if parts := cut(rows, rows * x.shape[-1]):
        return on_cores(lambda some: weight.rows(some).product(x), parts, axis=-1)
    return weight.product(x)


UNPACKED = 1 << 20
"""Weights that are unpacked at once: few enough to be in a cache still when they are multiplied."""


def host(x: mx.array, weight: Weight) -> mx.array:
    return mx.array(on_host(borrow(x), weight))


def on_host(x: Host, weight: Weight) -> Host:
    """The product of NumPy's rows with a weight, which is unpacked piece by piece."""
    if isinstance(weight, mx.array):
        whole: Host = x @ borrow(dense(weight)).T
        return whole
    step = max(1, UNPACKED // x.shape[-1])
    firsts = range(0, weight.weight.shape[0], step)
    pieces = ahead(lambda first: dense(weight.rows(slice(first, first + step))), firsts)
    return np.concatenate([x @ borrow(piece).T for piece in pieces], axis=-1)


linear = Op(
    "linear", reference=reference, portable=portable, host=host, host_when=lambda x, weight: many_rows(x)
)
