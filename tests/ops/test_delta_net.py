"""The whole of a delta net between its projections, and RMS norm: portable against reference."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from close import relative_error
from moelocal.config import DeltaNetSpec
from moelocal.ops import delta_net, norm
from moelocal.ops.delta_net import DeltaNetWeights

# float32 over at most 80 positions; convolution and norms sum in another order; measured 3e-6
LIMIT = 3e-5


def problem(batch, time, key_heads, ratio, key_dim, value_dim, width, seed, dtype=mx.float32):
    mx.random.seed(seed)
    spec = DeltaNetSpec(key_heads, key_heads * ratio, key_dim, value_dim, width)
    heads, channels = spec.value_heads, spec.conv_channels
    weights = DeltaNetWeights.build(
        spec,
        conv=mx.random.normal((channels, width, 1)),
        a_log=mx.random.normal((heads,)),
        dt_bias=mx.random.normal((heads,)),
        norm=mx.random.normal((value_dim,)),
        eps=1e-6,
    )
    u, z, b, a = (
        mx.random.normal((batch, time, n)).astype(dtype) for n in (channels, heads * value_dim, heads, heads)
    )
    conv = mx.random.normal((batch, width - 1, channels)).astype(dtype)
    return u, z, b, a, conv, mx.random.normal((batch, heads, value_dim, key_dim)), weights


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2), time=st.sampled_from([1, 2, 5, 33, 63, 75]), key_heads=st.integers(1, 3),
    ratio=st.integers(1, 3), key_dim=st.integers(3, 33), value_dim=st.integers(3, 33), width=st.integers(2, 5),
    seed=st.integers(0, 2**20),
)  # fmt: skip
def test_portable_is_the_reference(batch, time, key_heads, ratio, key_dim, value_dim, width, seed):
    *arrays, weights = problem(batch, time, key_heads, ratio, key_dim, value_dim, width, seed)
    expected = delta_net.reference(*arrays, None, weights)
    for form in (delta_net.portable, delta_net.host):
        got = form(*arrays, None, weights)
        for name, x, y in zip(("y", "conv", "state"), got, expected, strict=True):
            assert relative_error(x, y) < LIMIT, name


@pytest.mark.parametrize("form", [delta_net.portable, delta_net.host])
def test_padding_is_as_if_it_were_not_there(form):
    u, z, b, a, _, _, weights = problem(1, 40, 2, 2, 16, 24, 4, seed=4)
    conv, state = mx.zeros((1, 3, weights.spec.conv_channels)), mx.zeros((1, 4, 24, 16))
    valid = mx.arange(40)[None] >= 7
    padded = form(u, z, b, a, conv, state, valid, weights)
    alone = delta_net.reference(*(x[:, 7:] for x in (u, z, b, a)), conv, state, None, weights)
    assert relative_error(padded[0][:, 7:], alone[0]) < LIMIT
    assert relative_error(padded[2], alone[2]) < LIMIT


def test_small_heads_are_normalised_with_epsilon_on_the_sum():
    # Σx² near 1e-6: an epsilon on the mean, as in some engines, would be visible at once
    u, z, b, a, conv, state, weights = problem(1, 6, 1, 2, 16, 8, 4, seed=2)
    arguments = (u * 1e-3, z, b, a, conv * 1e-3, state, None, weights)
    assert relative_error(delta_net.portable(*arguments)[0], delta_net.reference(*arguments)[0]) < LIMIT


def test_512_steps_in_bfloat16_do_not_drift():
    # bfloat16 enters and leaves, the inside is float32: 512 steps agree to one rounding of the output, 2^-8
    *_, weights = problem(1, 1, 2, 2, 32, 32, 4, seed=7)
    u, z, b, a, conv, state, _ = problem(1, 512, 2, 2, 32, 32, 4, seed=8, dtype=mx.bfloat16)
    whole, _, final = delta_net.reference(u, z, b, a, conv, state, None, weights)
    outputs = []
    for t in range(512):
        y, conv, state = delta_net.portable(
            *(x[:, t : t + 1] for x in (u, z, b, a)), conv, state, None, weights
        )
        mx.eval(y, conv, state)
        outputs.append(y)
    assert relative_error(state, final) < LIMIT
    assert relative_error(mx.concatenate(outputs, axis=1), whole) < 2**-8


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rms_norm(dtype):
    x, w = (mx.random.normal((7, 50)) * 3).astype(dtype), mx.random.normal((50,))
    got, expected = norm.portable(x, w, 1e-6), norm.reference(x, w, 1e-6)
    assert got.dtype == dtype
    # one rounding of the dtype
    assert relative_error(got, expected) < {mx.float32: 1e-6, mx.float16: 2**-10, mx.bfloat16: 2**-7}[dtype]
