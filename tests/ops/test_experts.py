"""Router and expert block: every form against the reference, in every packed format."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from close import relative_error
from matrices import packed, swiglu
from moelocal.formats import QuantSpec
from moelocal.ops import experts, linear, route

# float32 dot products over at most 192 columns in another order; measured 1e-6
LIMIT = 1e-5
SPECS = [QuantSpec(b, g) for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)]
SPECS += [QuantSpec(4, 32, "mxfp4"), QuantSpec(8, 32, "mxfp8"), QuantSpec(4, 16, "nvfp4")]


def check(spec, tokens, count, per_token, width, hidden, seed, shared=True, joined=True, residual=True):
    mx.random.seed(seed)
    x = mx.random.normal((tokens, hidden))
    chosen, weights, share = route.reference(
        mx.random.normal((tokens, count + shared)), per_token, True, shared
    )
    extra = swiglu(spec, (), 2 * width, hidden) if shared else None
    residual = mx.random.normal((tokens, hidden)) if residual else None
    arguments = (x, swiglu(spec, (count,), width, hidden, joined), chosen, weights, extra, share, residual)
    expected = experts.reference(*arguments)
    assert relative_error(experts.portable(*arguments), expected) < LIMIT
    assert relative_error(experts.host(*arguments), expected) < LIMIT


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 60),
    count=st.integers(1, 12),
    per_token=st.integers(1, 4),
    width=st.integers(1, 40),
    hidden=st.integers(1, 48),
    seed=st.integers(0, 2**20),
    shared=st.booleans(),
    joined=st.booleans(),
    residual=st.booleans(),
)
def test_dense_experts(tokens, count, per_token, width, hidden, seed, shared, joined, residual):
    check(None, tokens, count, min(per_token, count), width, hidden, seed, shared, joined, residual)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.mode}-{s.bits}-{s.group}")
@pytest.mark.parametrize("tokens", [1, 40])
def test_packed_experts(spec, tokens):
    check(spec, tokens, count=6, per_token=3, width=128, hidden=128, seed=tokens)


@pytest.mark.parametrize(
    "spec", [None, *SPECS], ids=lambda s: "dense" if s is None else f"{s.mode}-{s.bits}-{s.group}"
)
def test_linear(spec):
    weight = packed(mx.random.normal((33, 128)), spec)
    for rows in (1, 50):
        x = mx.random.normal((2, rows, 128))
        expected = linear.reference(x, weight)
        assert relative_error(linear.portable(x, weight), expected) < LIMIT
        assert relative_error(linear.host(x, weight), expected) < LIMIT


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40), per_token=st.integers(1, 8), seed=st.integers(0, 2**20), normalize=st.booleans(),
    shared=st.booleans(), levels=st.sampled_from([2, 5, 10_000]), scale=st.sampled_from([1e-4, 1.0, 50.0, 1e4]),
)  # fmt: skip
def test_routes_agree_ties_included(count, per_token, seed, normalize, shared, levels, scale):
    # few levels make exact ties, which both forms give to the lower index
    mx.random.seed(seed)
    logits = mx.random.randint(0, levels, (9, count + shared)).astype(mx.float32) / levels * scale
    per_token = min(per_token, count)
    expected, got = (f(logits, per_token, normalize, shared) for f in (route.reference, route.portable))
    assert mx.array_equal(expected[0], got[0])
    assert relative_error(got[1], expected[1]) < LIMIT
    assert (got[2] is None) is (expected[2] is None) is not shared
    if shared:
        assert relative_error(got[2], expected[2]) < LIMIT


@pytest.mark.parametrize("normalize", [True, False])
def test_nan_logits_rank_last_and_spoil_what_they_enter(normalize):
    nan, inf = float("nan"), float("inf")
    logits = mx.array([[nan, 1.0, -inf, -0.0, 0.0, nan, 3.0]])
    for form in (route.reference, route.portable):
        for per_token, enters in ((4, not normalize), (6, True)):
            chosen, weights, _ = form(logits, per_token, normalize, False)
            assert chosen.tolist() == [[6, 1, 3, 4, 2, 0][:per_token]]
            assert mx.all(mx.isnan(weights)).item() is enters
