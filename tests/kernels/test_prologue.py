"""`prologue` in the simulator against its reference, and the portable form beside it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offmetal
from close import relative_error
from moelocal.config import AttentionSpec, Yarn
from moelocal.layers.rope import attention_factor, frequencies
from moelocal.ops.op import force
from moelocal.ops.prologue import PrologueWeights, prologue

DTYPES = st.sampled_from([mx.float32, mx.float16, mx.bfloat16])
# One rounding of a float32 value whose norm was summed in another order: a unit in the last place where the two fall
# on either side of a border. A rotation adds the errors of its elements, so the unit is that of the head's largest.
UNIT = {mx.float32: 2e-6, mx.float16: 2**-10, mx.bfloat16: 2**-7}

FLAGSHIP = AttentionSpec(16, 2, 256, 64, 1e7, gated=True)
YARN = Yarn(4.0, 64, attention_factor=1.3)


def weights_of(spec: AttentionSpec) -> PrologueWeights:
    q_norm, k_norm = (mx.random.uniform(-2, 2, (spec.head_dim,)) * attention_factor(spec) for _ in range(2))
    turns = frequencies(spec)
    return PrologueWeights(spec, 1e-6, q_norm, k_norm, turns, 1.0 / turns)


def projected(
    spec: AttentionSpec, batch: int, time: int, dtype: mx.Dtype, scale: float = 1.0
) -> list[mx.array]:
    """q, k, v as they lie in the output of one projection, with something behind them."""
    q = spec.heads * spec.head_dim * (2 if spec.gated else 1)
    kv = spec.kv_heads * spec.head_dim
    y = (mx.random.normal((batch, time, q + 2 * kv + 5)) * scale).astype(dtype)
    return mx.split(y, [q, q + kv, q + 2 * kv], axis=-1)[:3]


def compare(
    spec: AttentionSpec, batch: int, time: int, offset: int | mx.array, dtype: mx.Dtype, scale: float = 1.0
):
    inputs, weights = projected(spec, batch, time, dtype, scale), weights_of(spec)
    rotated, stored = prologue(*inputs, offset, weights)
    expected, expected_stored = prologue.reference(*inputs, offset, weights)
    assert rotated.dtype == stored.dtype == dtype
    assert mx.array_equal(stored[batch:], expected_stored[batch:])  # values are copied
    for got, want in ((rotated, expected), (stored[:batch], expected_stored[:batch])):
        got, want = got.astype(mx.float32), want.astype(mx.float32)
        most = mx.max(mx.abs(want), axis=-1, keepdims=True)
        assert mx.all(mx.abs(got - want) <= UNIT[dtype] * most).item(), mx.abs(got - want).max().item()


@pytest.mark.parametrize(
    "spec",
    [
        FLAGSHIP,
        AttentionSpec(4, 2, 64, 16, 1e7, gated=True),  # the embedded model
        AttentionSpec(3, 3, 40, 40, 1e4, gated=False),  # all of a head turns, its half is no multiple of 32
        AttentionSpec(5, 1, 96, 10, 1e4, gated=False, yarn=YARN),  # fewer than eight frequencies
    ],
    ids=["flagship", "embedded", "full", "yarn"],
)
def test_modes(mode: str, spec: AttentionSpec):
    compare(spec, 2, 3, 7, mx.bfloat16)
    compare(spec, 1, 1, mx.array(1000), mx.float32)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 9),
    time=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    ratio=st.integers(1, 4),
    half=st.integers(1, 40),
    rest=st.integers(0, 70),
    gated=st.booleans(),
    slowed=st.booleans(),
    offset=st.sampled_from([0, 1, 4095, 262143, "array", "rows"]),
    dtype=DTYPES,
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_any_shape(batch, time, kv_heads, ratio, half, rest, gated, slowed, offset, dtype, scale):
    size = max(8, 2 * half + rest)
    spec = AttentionSpec(
        kv_heads * ratio, kv_heads, size, 2 * half, 1e6, gated=gated, yarn=YARN if slowed else None
    )
    if offset == "array":
        offset = mx.array(12345)
    elif offset == "rows":  # a padding position comes before 0
        offset = mx.arange(batch) * 1000 - 3
    with offmetal.options(allow_unwritten=False):
        compare(spec, batch, time, offset, dtype, scale)


@pytest.mark.parametrize("slowed", [False, True])
def test_every_form(slowed):
    spec = AttentionSpec(4, 2, 64, 16, 1e6, gated=True, yarn=YARN if slowed else None)
    for dtype in UNIT:
        weights, inputs = weights_of(spec), projected(spec, 2, 9, dtype)
        for offset in (5, mx.array(5), mx.array([5, 700])):
            expected = prologue.reference(*inputs, offset, weights)
            for form in (prologue, prologue.portable):
                for got, want in zip(form(*inputs, offset, weights), expected, strict=True):
                    # float32: an angle of 700 carries 3e-5
                    assert got.dtype == dtype and relative_error(got, want) < max(UNIT[dtype], 5e-5)


def test_queries_and_keys_keep_float32_until_after_the_rotation():
    # against float64: rounding once is half a unit, rounding the norm as well would be up to 1.2 units
    weights, inputs = weights_of(FLAGSHIP), projected(FLAGSHIP, 1, 40, mx.bfloat16)
    x = np.array(inputs[0].astype(mx.float32), np.float64).reshape(1, 40, 16, 512)[..., :256].swapaxes(1, 2)
    x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * np.array(weights.q_norm, np.float64)
    angle = np.arange(3, 43)[:, None] * 1e7 ** (-2 * np.arange(32) / 64)
    a, b, rest = np.split(x, [32, 64], axis=-1)
    c, s = np.cos(angle), np.sin(angle)
    exact = np.concatenate([a * c - b * s, a * s + b * c, rest], axis=-1)
    for form in (prologue, prologue.reference, prologue.portable):
        got = np.array(form(*inputs, 3, weights)[0].astype(mx.float32))
        unit = np.exp2(np.floor(np.log2(np.abs(exact))) - 7)
        # rotated elements that cancel carry the float32 error of what they were: beyond the half 2e-6 of the head
        assert np.all(np.abs(got - exact) <= 0.5 * unit + 1e-5)


def test_a_far_position_turns_by_the_float32_product():
    # the angle is off by what float32 leaves at 262144, and by no more
    weights, inputs = weights_of(FLAGSHIP), projected(FLAGSHIP, 1, 1, mx.float32)
    got = [form(*inputs, 262143, weights)[0] for form in (prologue, prologue.reference, prologue.portable)]
    assert relative_error(got[0], got[1]) < 2e-6
    assert relative_error(got[2], got[1]) < 2e-2


def test_zeros_stay_zeros():
    weights = weights_of(FLAGSHIP)
    zeros = [mx.zeros_like(x) for x in projected(FLAGSHIP, 1, 2, mx.bfloat16)]
    assert not any(mx.any(y).item() for y in prologue(*zeros, 3, weights))


def test_everything_is_read_and_written_once():
    inputs, weights = projected(FLAGSHIP, 1, 1, mx.bfloat16), weights_of(FLAGSHIP)
    prologue(*inputs, 11, weights)
    traffic = offmetal.last_result.traffic
    assert traffic["q"]["read"] == 16 * 256 * 2  # not its gate
    assert traffic["k"]["read"] == traffic["v"]["read"] == 2 * 256 * 2
    assert traffic["rotated"]["written"] == 16 * 256 * 2
    assert traffic["stored"]["written"] == 2 * 2 * 256 * 2


@pytest.mark.falls_back
def test_other_arguments_go_to_the_portable_form():
    spec = AttentionSpec(2, 1, 6, 2, 1e4, gated=False)  # norms of fewer than eight elements
    weights, inputs = weights_of(spec), projected(spec, 1, 2, mx.float32)
    assert not prologue.supports(*inputs, 0, weights)
    with force("auto"):
        assert (
            relative_error(prologue(*inputs, 0, weights)[0], prologue.reference(*inputs, 0, weights)[0])
            < 1e-5
        )
