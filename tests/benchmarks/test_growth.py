"""benchmarks/growth.py: work is counted exactly, exponents are what they say."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import growth  # noqa: E402
import synthetic  # noqa: E402

from moelocal.config import ModelConfig  # noqa: E402

TINY = {"layers": 4, "hidden": 64, "vocab": 96, "heads": 4, "kv_heads": 2, "head_dim": 32, "key_heads": 1,
        "value_heads": 2, "key_dim": 32, "value_dim": 32, "experts": 8, "per_token": 2, "width": 64,
        "shared_width": 64, "context": 512}  # fmt: skip


def config(**changes: int) -> ModelConfig:
    return ModelConfig.parse(synthetic.shape("flagship", TINY | changes))


# work


def test_work_is_that_of_the_matrices_that_a_token_passes():
    # by hand: attention q with gate, k, v, o; delta net qkv, z, b, a, convolution, out; experts, shared, gates
    attention = 64 * 256 + 2 * 64 * 64 + 128 * 64
    delta = 64 * 128 + 64 * 64 + 2 * 64 * 2 + 128 * 4 + 64 * 64
    mlp = 64 * 8 + 2 * 3 * 64 * 64 + 3 * 64 * 64 + 64
    state, head = 4 * 2 * 32 * 32, 96 * 64
    layers = attention + 3 * (delta + state) + 4 * mlp
    assert growth.decode_work(config(), 99) == layers + head + 2 * 4 * 32 * 100
    # a prompt of 9 tokens sees 1 to 9 positions, 5 on average. Of the last layer, here attention, it needs keys and
    # values; the rest of it, and the head, only for the last token
    before, kept = 3 * (delta + state + mlp), 2 * 64 * 64
    once = attention - kept + mlp + 2 * 4 * 32 * 9 + head
    assert growth.prefill_work(config(), 9) == pytest.approx(before + kept + once / 9)
    # eight layers: another attention layer in the middle, complete
    more = growth.prefill_work(config(layers=8), 9) - growth.prefill_work(config(), 9)
    assert more == pytest.approx(3 * (delta + state + mlp) + attention + mlp + 2 * 4 * 32 * 5)
    # a last layer that is a delta net keeps its state: its q, k, v, decay; neither its gate, its query nor its output
    shorter = growth.prefill_work(config(layers=3), 9)
    once = 64 * 64 + 64 * 64 + state / 4 + mlp + head
    assert shorter == pytest.approx(
        2 * (delta + state + mlp) + delta - 2 * 64 * 64 + state * 3 / 4 + once / 9
    )


def test_work_grows_with_what_a_token_uses_and_not_with_what_is_there():
    more, base = growth.decode_work(config(experts=16), 0), growth.decode_work(config(), 0)
    assert more - base == 4 * 8 * 64  # the routers' rows
    twice = growth.decode_work(config(layers=8), 0) - 96 * 64
    assert twice == 2 * (base - 96 * 64)


# exponents


@given(slope=st.floats(-3, 3), factor=st.floats(1e-3, 1e3), count=st.integers(3, 8))
def test_the_exponent_of_a_power_law_is_found(slope, factor, count):
    x = [2.0**i for i in range(count)]
    found = growth.exponent(x, [[factor * each**slope] * 2 for each in x])
    # logarithms of numbers up to 1e9 are exact to 1e-14, differences over at least ln 2
    assert found.value == pytest.approx(slope, abs=1e-12)
    assert found.low is not None and found.high is not None
    assert found.high - found.low < 1e-10


def test_the_interval_holds_the_true_exponent_in_19_of_20_cases():
    random = np.random.default_rng(1)
    x = [1.0, 2.0, 4.0, 8.0]
    held = 0
    for _ in range(2000):
        noise = random.normal(0, 0.1, (4, 3))
        found = growth.exponent(x, [list(each**0.5 * np.exp(n)) for each, n in zip(x, noise, strict=True)])
        held += found.low < 0.5 < found.high
    # 0.95 within 4 standard deviations of a share of 2,000
    assert abs(held / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_rounds_at_one_point_are_no_points_of_their_own():
    once = growth.exponent([1, 2, 4], [[1.0], [3.0], [4.0]])
    often = growth.exponent([1, 2, 4], [[1.0] * 9, [3.0] * 9, [4.0] * 9])
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high))


def test_two_measurements_have_no_interval():
    assert growth.exponent([1, 10], [[1.0], [100.0]]) == growth.Estimate(pytest.approx(2.0), None, None)
