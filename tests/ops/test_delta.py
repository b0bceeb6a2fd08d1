"""The delta rule: every form against the reference, outputs and state."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from close import relative_error
from moelocal.ops import delta

# float32 rounding over at most 150 positions of decayed sums: the forms add in another order; measured 2e-6
LIMIT = 2e-5


def host(*arguments: mx.array | None) -> tuple[mx.array, mx.array]:
    """The host form, which computes on NumPy arrays."""
    out, state = delta.host(*(None if a is None else np.array(a) for a in arguments))
    return mx.array(out), mx.array(state)


FORMS = {"portable": delta.portable, "host": host}


def inputs(batch, time, key_heads, ratio, key_dim, value_dim, seed, strongest=8.0):
    """Normalised q and k, decay from none to e^-strongest, a state that is not zero."""
    mx.random.seed(seed)
    heads = key_heads * ratio

    def unit(shape):
        x = mx.random.normal(shape)
        return x / mx.linalg.norm(x, axis=-1, keepdims=True)

    return [
        unit((batch, time, key_heads, key_dim)) * key_dim**-0.5,
        unit((batch, time, key_heads, key_dim)),
        mx.random.normal((batch, time, heads, value_dim)),
        -strongest * mx.random.uniform(shape=(batch, time, heads)) ** 3,
        mx.random.uniform(shape=(batch, time, heads)),
        mx.random.normal((batch, heads, value_dim, key_dim)),
    ]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    time=st.integers(1, 75),
    key_heads=st.integers(1, 3),
    ratio=st.integers(1, 3),
    key_dim=st.integers(4, 40),
    value_dim=st.integers(3, 40),
    seed=st.integers(0, 2**20),
)
def test_the_host_form_is_the_recurrence(batch, time, key_heads, ratio, key_dim, value_dim, seed):
    arguments = inputs(batch, time, key_heads, ratio, key_dim, value_dim, seed)
    expected, got = delta.reference(*arguments, None), host(*arguments, None)
    assert relative_error(got[0], expected[0]) < LIMIT
    assert relative_error(got[1], expected[1]) < LIMIT


@pytest.mark.parametrize("time", [1, 2, 63, 75])
def test_mlx_computes_the_recurrence_to_the_bit(time):
    arguments = inputs(2, time, 2, 3, 32, 16, seed=time)
    expected, got = delta.reference(*arguments, None), delta.portable(*arguments, None)
    assert mx.array_equal(got[0], expected[0])
    assert mx.array_equal(got[1], expected[1])


@pytest.mark.parametrize("form", ["portable", "host"])
def test_padding_leaves_the_state_alone(form):
    arguments = inputs(2, 70, 2, 2, 16, 24, seed=5)
    valid = mx.arange(70)[None] >= mx.array([[9], [0]])
    _, state = FORMS[form](*arguments, valid)
    alone = [a[:1, 9:] for a in arguments[:5]] + [arguments[5][:1]]
    assert relative_error(state[:1], delta.reference(*alone, None)[1]) < LIMIT


@pytest.mark.parametrize("form", ["portable", "host"])
def test_two_halves_are_the_whole(form):
    arguments = inputs(1, 90, 2, 2, 32, 32, seed=3)
    run = FORMS[form]
    first, state = run(*[a[:, :37] for a in arguments[:5]], arguments[5], None)
    second, state = run(*[a[:, 37:] for a in arguments[:5]], state, None)
    expected = delta.reference(*arguments, None)
    assert relative_error(mx.concatenate([first, second], axis=1), expected[0]) < LIMIT
    assert relative_error(state, expected[1]) < LIMIT


@pytest.mark.parametrize("strongest", [0.0, 60.0])
def test_extreme_decay_stays_finite(strongest):
    arguments = inputs(1, 64, 1, 2, 16, 16, seed=1, strongest=strongest)
    expected, got = delta.reference(*arguments, None), host(*arguments, None)
    assert relative_error(got[0], expected[0]) < LIMIT
    assert relative_error(got[1], expected[1]) < LIMIT


def test_repeated_keys_are_overwritten():
    # beta 1 and no decay: the newest value of a key replaces the older ones exactly, the hardest case for the
    # triangular system of the chunked form
    k = mx.broadcast_to(mx.array([1.0, 0, 0, 0]), (1, 64, 1, 4))
    v = mx.random.normal((1, 64, 1, 3))
    zeros, ones = mx.zeros((1, 64, 1)), mx.ones((1, 64, 1))
    out, _ = host(k, k, v, zeros, ones, mx.zeros((1, 1, 3, 4)), None)
    assert relative_error(out, v) < LIMIT
