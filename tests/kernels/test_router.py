"""`router` in the simulator against its reference."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offmetal
from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.ops.router import RouterWeights, router

DTYPES = st.sampled_from([mx.float32, mx.float16, mx.bfloat16])


def packed(rows: int, cols: int, spec: QuantSpec, dtype: mx.Dtype) -> QuantizedArray:
    w = mx.random.normal((rows, cols))
    return QuantizedArray(*mx.quantize(w, group_size=spec.group, bits=spec.bits), spec).astype(dtype)


def compare(
    tokens: int, rows: list[int], cols: int, spec: QuantSpec, dtype: mx.Dtype, scale: float = 1.0
) -> None:
    weights = RouterWeights.build([packed(r, cols, spec, dtype) for r in rows])
    x = (mx.random.normal((tokens, cols)) * scale).astype(dtype)
    assert router.supports(x, weights)
    got, expected = router(x, weights), router.reference(x, weights)
    assert got.dtype == mx.float32 and got.shape == (tokens, sum(rows))
    # the same exact products, summed in float32 in another order: n terms err by sqrt(n) half units of their size, and
    # scale * Σ q x + bias * Σ x cancels by up to 2^bits
    bound = 1e-6 * 2 ** (spec.bits / 2) * scale * cols**0.5
    assert mx.max(mx.abs(got - expected)).item() <= bound


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_formats(bits: int, group: int):
    compare(2, [13, 1], 384, QuantSpec(bits, group), mx.bfloat16)


def test_modes(mode: str):
    compare(1, [32, 1], 256, QuantSpec(8, 64), mx.bfloat16)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 12), DTYPES, st.sampled_from([1e-3, 1.0, 1e3]))
def test_any_shape(tokens: int, rows: int, groups: int, dtype: mx.Dtype, scale: float):
    with offmetal.options(allow_unwritten=False):
        compare(tokens, [rows + 7, 1], 64 * groups, QuantSpec(8, 64), dtype, scale)


def test_the_matrix_is_read_once_at_the_flagships_shape():
    compare(1, [256, 1], 2048, QuantSpec(8, 64), mx.bfloat16)
    traffic = offmetal.last_result.traffic
    rows, again = 257, 1  # the last block has one row, which it computes twice
    assert traffic["packed"]["read"] == (rows + again) * 2048
    assert traffic["y"]["written"] == rows * 4


@pytest.mark.falls_back
def test_two_formats_are_left_to_the_portable_form():
    gate = packed(8, 64, QuantSpec(8, 64), mx.float32)
    weights = RouterWeights.build([gate, mx.random.normal((1, 64))])
    x = mx.random.normal((3, 64))
    assert not router.supports(x, weights)
    assert mx.allclose(router(x, weights), router.reference(x, weights), atol=1e-4)
