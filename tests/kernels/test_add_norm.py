"""`add_norm` in the simulator against its reference."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offmetal
from kernels.norms import DTYPES, SCALES, SIZES, bytes_of, close, values
from moelocal.ops.add_norm import add_norm


def compare(rows: int, size: int, dtype: mx.Dtype, scale: float) -> None:
    x, r = (values(rows, size, dtype, scale) for _ in range(2))
    weight = mx.random.uniform(-2, 2, (size,))
    assert add_norm.supports(x, r, weight, 1e-6)
    got, expected = add_norm(x, r, weight, 1e-6), add_norm.reference(x, r, weight, 1e-6)
    assert mx.array_equal(got[0], expected[0])
    close(got[1], expected[1])


@pytest.mark.parametrize("size", SIZES)
def test_modes(mode: str, size: int):
    compare(3, size, mx.bfloat16, 1.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(8, 3000), DTYPES, SCALES)
def test_any_shape(rows: int, size: int, dtype: mx.Dtype, scale: float):
    with offmetal.options(allow_unwritten=False):
        compare(rows, size, dtype, scale)


def test_zeros_stay_zeros():
    zeros = mx.zeros((2, 64))
    h, y = add_norm(zeros, zeros, mx.ones((64,)), 1e-6)
    assert not mx.any(h).item() and not mx.any(y).item()


@pytest.mark.falls_back
def test_what_the_kernel_does_not_take():
    x, weight = mx.random.normal((2, 16)), mx.ones((16,))
    r = x.astype(mx.bfloat16)
    assert not add_norm.supports(x, r, weight, 1e-6)
    h, y = add_norm(x, r, weight, 1e-6)
    assert mx.array_equal(h, x + r)
    close(y, add_norm.reference(x, r, weight, 1e-6)[1])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [100, 2048])
def test_each_row_is_read_as_often_as_it_must(rows: int, size: int):
    x, once = values(rows, size, mx.bfloat16, 1.0), 2 * rows * size
    add_norm(x, x, mx.ones((size,)), 1e-6)
    # h is written once and looked at once more by the thread that wrote it
    assert bytes_of("read") == {"x": once, "r": once, "weight": 4 * rows * size, "h": once}
    assert bytes_of("written") == {"h": once, "y": once}
