"""`route` in the simulator against its reference: the same experts, the same weights."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offmetal
from moelocal.ops.route import route

# Per weight w, relative: one exp, one division and a sum in another order, each within a few units in the last place,
# 2^-23; and exp(x) errs by the rounding of x log2(e) besides, which is |ln w| such units.
LIMIT = 1e-6


def close(got: mx.array, expected: mx.array) -> bool:
    bound = LIMIT * expected * (1 - mx.log(mx.maximum(expected, 1e-38))) + 1e-37  # denormals may be flushed
    nan = mx.isnan(got) & mx.isnan(expected)
    return mx.all(nan | (mx.abs(got - expected) <= bound)).item()


def compare(logits: mx.array, per_token: int, normalize: bool, shared: bool) -> None:
    assert route.supports(logits, per_token, normalize, shared)
    got, expected = (f(logits, per_token, normalize, shared) for f in (route, route.reference))
    assert mx.array_equal(got[0], expected[0]) and got[0].dtype == mx.uint32
    assert got[1].dtype == mx.float32
    assert close(got[1], expected[1])
    if shared:
        assert close(got[2], expected[2])
    else:
        assert got[2] is None


@pytest.mark.parametrize(("tokens", "experts", "per_token"), [(1, 256, 8), (3, 33, 5), (1, 16, 4)])
def test_modes(mode: str, tokens: int, experts: int, per_token: int):
    compare(mx.random.normal((tokens, experts + 1)) * 3, per_token, True, True)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 9),
    experts=st.integers(1, 512),
    per_token=st.sampled_from([1, 2, 4, 8, 10, 16, 32]),
    normalize=st.booleans(),
    shared=st.booleans(),
    levels=st.sampled_from([1, 2, 7, 100_000]),
    scale=st.sampled_from([1e-30, 1.0, 50.0, 1e4, 1e38]),
)
def test_any_shape_ties_included(tokens, experts, per_token, normalize, shared, levels, scale):
    # few levels make exact ties; a scale of 1e-30 different logits with one probability
    if tokens * (experts + shared) < 8:
        tokens = 8
    logits = mx.random.randint(-levels, levels + 1, (tokens, experts + shared)).astype(mx.float32)
    with offmetal.options(allow_unwritten=False):
        compare(logits / levels * scale, min(per_token, experts), normalize, shared)


def test_equal_logits_give_the_first_experts_equal_weights():
    chosen, weights, share = route(mx.zeros((2, 257)), 8, True, True)
    assert chosen.tolist() == [list(range(8))] * 2
    assert mx.all(weights == 0.125).item() and mx.all(share == 0.5).item()


def test_both_zeros_are_one_number():
    logits = mx.array([[-0.0, 0.0, -0.0, 0.0, -1.0, 1.0, -0.0, 0.0]])
    assert route(logits, 6, True, False)[0].tolist() == [[5, 0, 1, 2, 3, 6]]


@pytest.mark.parametrize("normalize", [True, False])
def test_nan_and_infinities_rank_as_in_the_reference(normalize: bool):
    nan, inf = float("nan"), float("inf")
    rows = [
        [nan, 1.0, -inf, 0.0, 2.0, -nan, 3.0, 0.5],
        [nan] * 8,
        [-inf] * 8,
        [1.0, -inf, inf, 3.0, inf, -inf, nan, 0.0],
    ]
    for per_token in (3, 6, 8):
        compare(mx.array(rows), per_token, normalize, False)


def test_share_saturates():
    logits = mx.zeros((4, 9))
    logits[:, 8] = mx.array([-1e30, -90.0, 90.0, 1e30])
    share = route(logits, 2, True, True)[2]
    assert mx.allclose(share[:, 0], mx.array([0.0, 8.2e-40, 1.0, 1.0]), atol=1e-38).item()


def test_every_logit_is_read_once():
    route(mx.random.normal((2, 257)), 8, True, True)
    traffic = offmetal.last_result.traffic
    assert traffic["logits"]["read"] == 2 * 257 * 4
    written = {name: t["written"] for name, t in traffic.items() if t["written"]}
    assert written == {"chosen": 2 * 8 * 4, "weights": 2 * 8 * 4, "share": 2 * 4}
    assert offmetal.last_result.barriers == 0


@pytest.mark.falls_back
def test_what_the_kernel_does_not_take_goes_elsewhere():
    for logits, per_token in ((mx.zeros((1, 7)), 2), (mx.zeros((1, 513)), 8), (mx.zeros((1, 64)), 33)):
        assert not route.supports(logits, per_token, True, False)
        assert route(logits, per_token, True, False)[0].tolist() == [list(range(per_token))]
