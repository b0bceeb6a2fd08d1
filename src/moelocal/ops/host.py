"""Borrowing arrays between MLX and NumPy, for the host forms.

Why: the MLX wheel for Linux carries the reference BLAS; a float32 product that takes it 35 ms takes NumPy's BLAS
0.7 ms on the same two cores (benchmarks/host_matmul.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from moelocal.formats import QuantizedArray, Weight

Host = npt.NDArray[np.float32]

MANY_ROWS = 32
"""Rows from which a product through NumPy pays for the round trip."""


def many_rows(x: mx.array) -> bool:
    """Whether [..., features] has enough float32 rows for a host form."""
    return x.dtype == mx.float32 and x.size >= MANY_ROWS * x.shape[-1]


def borrow(array: mx.array) -> Host:
    """The evaluated values of a float32 array, without a copy where it is contiguous."""
    return np.asarray(array)


def dense(weight: Weight) -> mx.array:
    """A weight in float32; packed ones are unpacked."""
    return weight.dequantize(mx.float32) if isinstance(weight, QuantizedArray) else weight.astype(mx.float32)


def silu(x: Host) -> Host:
    """x·σ(x), computed without overflow for large negative x."""
    gated: Host = x * (0.5 * np.tanh(0.5 * x) + 0.5)
    return gated


@cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def one_thread() -> AbstractContextManager[Any]:
    """Within it, NumPy's BLAS computes on the calling thread. Its threads wait for each other in a loop: where another
    program holds a core, products of the size of a small model took 30 times as long with two threads as with one."""
    context: AbstractContextManager[Any] = _pools().limit(limits=1, user_api="blas")
    return context
