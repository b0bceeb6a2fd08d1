"""`rms_norm` in the simulator against its reference."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offmetal
from kernels.norms import DTYPES, SCALES, SIZES, bytes_of, close, values
from moelocal.ops.norm import rms_norm


def compare(rows: int, size: int, dtype: mx.Dtype, scale: float) -> None:
    x, weight = values(rows, size, dtype, scale), mx.random.uniform(-2, 2, (size,))
    assert rms_norm.supports(x, weight, 1e-6)
    close(rms_norm(x, weight, 1e-6), rms_norm.reference(x, weight, 1e-6))


@pytest.mark.parametrize("size", SIZES)
def test_modes(mode: str, size: int):
    compare(3, size, mx.bfloat16, 1.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(8, 3000), DTYPES, SCALES)
def test_any_shape(rows: int, size: int, dtype: mx.Dtype, scale: float):
    with offmetal.options(allow_unwritten=False):
        compare(rows, size, dtype, scale)


def test_zeros_stay_zeros():
    assert not mx.any(rms_norm(mx.zeros((2, 64)), mx.ones((64,)), 1e-6)).item()


@pytest.mark.falls_back
def test_what_the_kernel_does_not_take():
    x = mx.random.normal((2, 16))
    # a short weight would come in another address space; one in 16 bits is not what the kernel reads
    for row, weight in ((x[:, :4], mx.ones((4,))), (x, mx.ones((16,), mx.bfloat16))):
        assert not rms_norm.supports(row, weight, 1e-6)
        close(rms_norm(row, weight, 1e-6), rms_norm.reference(row, weight, 1e-6))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [100, 2048])
def test_each_row_is_read_as_often_as_it_must(rows: int, size: int):
    once = 2 * rows * size
    rms_norm(values(rows, size, mx.bfloat16, 1.0), mx.ones((size,)), 1e-6)
    assert bytes_of("read") == {"x": 2 * once, "weight": 4 * rows * size}
    assert bytes_of("written") == {"y": once}
