"""`rms_norm` and `add_norm` in the simulator against their references."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offmetal
from moelocal.ops.add_norm import add_norm
from moelocal.ops.norm import rms_norm

# y is rounded once, from a float32 norm whose sum runs in another order: half a unit in the last place, and one for h
TOLERANCE = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
DTYPES = st.sampled_from(list(TOLERANCE))


def compare(lead: tuple[int, ...], size: int, dtype: mx.Dtype, scale: float) -> None:
    x, r = (mx.random.normal((*lead, size)).astype(dtype) * scale for _ in range(2))
    weight = mx.random.uniform(-2, 2, (size,))
    got, expected = add_norm(x, r, weight, 1e-6), add_norm.reference(x, r, weight, 1e-6)
    assert mx.array_equal(got[0], expected[0])
    close(got[1], expected[1])
    close(rms_norm(x, weight, 1e-6), rms_norm.reference(x, weight, 1e-6))


def close(got: mx.array, expected: mx.array) -> None:
    assert got.dtype == expected.dtype
    wide = expected.astype(mx.float32)
    error = mx.abs(got.astype(mx.float32) - wide)
    bound = TOLERANCE[got.dtype] * mx.maximum(mx.abs(wide), 1e-2)
    assert mx.all(error <= bound).item(), f"largest error {error.max().item()}"


@pytest.mark.parametrize("size", [8, 33, 2048, 5000])
def test_modes(mode: str, size: int):
    compare((1, 3), size, mx.bfloat16, 1.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(8, 3000), DTYPES, st.sampled_from([1e-3, 1.0, 1e3]))
def test_any_shape(rows: int, size: int, dtype: mx.Dtype, scale: float):
    with offmetal.options(allow_unwritten=False):
        compare((rows,), size, dtype, scale)


def test_zeros_stay_zeros():
    zeros = mx.zeros((2, 64))
    h, y = add_norm(zeros, zeros, mx.ones((64,)), 1e-6)
    assert not mx.any(h).item() and not mx.any(y).item()
    assert not mx.any(rms_norm(zeros, mx.ones((64,)), 1e-6)).item()


def test_each_row_is_read_as_often_as_it_must():
    size = 2048
    x = mx.random.normal((1, size)).astype(mx.bfloat16)
    add_norm(x, x, mx.ones((size,)), 1e-6)
    traffic = offmetal.last_result.traffic
    # written once and looked at once more by the thread that wrote it
    assert [traffic[n]["read"] for n in ("x", "r", "weight", "h", "y")] == [
        2 * size,
        2 * size,
        4 * size,
        2 * size,
        0,
    ]
    assert [traffic[n]["written"] for n in ("h", "y")] == [2 * size, 2 * size]
