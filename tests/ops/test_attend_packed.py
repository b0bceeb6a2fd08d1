"""Attention over keys and values that are kept as codes."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.ops.attend_packed import FEW, attend_packed, portable, reference

ROUNDING = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
"""Of outputs of size one: other orders of sums in float32, and in the other types one rounding of each output (2^-11,
2^-8) and, where many queries spell out keys and values in that type, of those."""


def packed(values: mx.array, bits: int, group: int) -> QuantizedArray:
    return QuantizedArray(*mx.quantize(values, group_size=group, bits=bits), QuantSpec(bits, group))


@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    ratio=st.integers(1, 4),
    time=st.integers(1, FEW + 3),
    before=st.integers(0, 70),
    room=st.integers(0, 40),
    size=st.sampled_from([(32, 32), (64, 64), (96, 32), (256, 64)]),
    bits=st.sampled_from([8, 4]),
    gated=st.booleans(),
    rows=st.sampled_from(["all", "some hidden", "of a step"]),
    dtype=st.sampled_from(list(ROUNDING)),
)
def test_the_portable_form_is_the_reference(
    batch, groups, ratio, time, before, room, size, bits, gated, rows, dtype
):
    head, group = size
    keys = before + time + (room if rows == "of a step" else 0)
    key = mx.random.key(batch + 7 * keys + head)

    def normal(*shape: int, at: int) -> mx.array:
        return mx.random.normal(shape, key=mx.random.split(key, 5)[at]).astype(dtype)

    q = normal(batch, groups * ratio, time, head, at=0)
    k, v = (packed(normal(batch, groups, keys, head, at=i), bits, group) for i in (1, 2))
    gate = normal(batch, time, groups * ratio, head, at=3) if gated else None
    hidden = mx.array([before // 2, 0][:batch]) if rows == "some hidden" else None
    length = mx.array(before + time) if rows == "of a step" else None
    arguments = (q, k, v, head**-0.5, hidden, gate, length)
    got, expected = portable(*arguments), reference(*arguments)
    assert got.dtype == dtype and got.shape == (batch, time, groups * ratio * head)
    assert mx.all(mx.isfinite(got)).item()
    assert mx.max(mx.abs(got.astype(mx.float32) - expected.astype(mx.float32))).item() <= ROUNDING[dtype] * 4


@pytest.mark.parametrize("time", [1, FEW, FEW + 1, 40])
def test_what_is_behind_the_length_is_not_seen(time: int):
    k, v = (packed(mx.random.normal((1, 2, 64, 64)), 4, 64) for _ in range(2))
    q = mx.random.normal((1, 4, time, 64))

    def attended(k: QuantizedArray, v: QuantizedArray) -> mx.array:
        return attend_packed(q, k, v, 0.125, None, None, mx.array(50))

    def changed(kept: QuantizedArray) -> QuantizedArray:
        other = packed(mx.random.normal((1, 2, 64, 64)), 4, 64)
        pairs = zip(kept.arrays, other.arrays, strict=True)
        arrays = (mx.concatenate([a[:, :, :50], b[:, :, 50:]], axis=2) for a, b in pairs)
        return QuantizedArray(*arrays, kept.spec)

    assert mx.array_equal(attended(k, v), attended(changed(k), changed(v)))
    # and what is before it is
    assert not mx.array_equal(attended(k, v), attended(k, packed(mx.random.normal((1, 2, 64, 64)), 4, 64)))
