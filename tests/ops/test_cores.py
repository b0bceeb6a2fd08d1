"""Large products of the CPU device in parts: the same bits, on other threads, in whatever thread asks."""

from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matrices import packed, swiglu
from moelocal.formats import QuantSpec
from moelocal.ops import cores, experts, linear, route


@pytest.fixture
def many(monkeypatch):
    """Seven cores, and every product is large enough for all of them."""
    monkeypatch.setattr(cores, "LEAST", 1)
    monkeypatch.setattr(cores, "cores", lambda: 7)


def whole(function, *arguments):
    """What it gives where nothing is worth a part of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cores, "LEAST", 1 << 60)
        return np.array(function(*arguments).astype(mx.float32))


SPECS = [QuantSpec(bits, 32) for bits in (2, 3, 4, 5, 6, 8)]
SPECS += [QuantSpec(4, 32, "mxfp4"), QuantSpec(8, 32, "mxfp8"), QuantSpec(4, 16, "nvfp4")]
PLAIN = QuantSpec(4, 32)


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 8, 50])
def test_a_product_in_parts_has_the_same_bits(spec, rows):
    mx.random.seed(rows)
    weight, x = packed(mx.random.normal((rows, 96)), spec), mx.random.normal((2, 3, 96))
    assert np.array_equal(np.array(linear.portable(x, weight)), whole(linear.portable, x, weight))


@pytest.mark.usefixtures("many")
@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 7),
    per_token=st.integers(1, 8),
    joined=st.booleans(),
    spec=st.sampled_from([None, PLAIN]),
    dtype=st.sampled_from([mx.float32, mx.bfloat16, mx.float16]),
    seed=st.integers(0, 99),
)
def test_experts_in_parts_have_the_same_bits(tokens, per_token, joined, spec, dtype, seed):
    mx.random.seed(seed)
    x = mx.random.normal((1, tokens, 64)).astype(dtype)
    chosen, weights, share = route.reference(mx.random.normal((1, tokens, 9)), per_token, True, True)
    blocks = [swiglu(spec, lead, 32, 64, joined) for lead in ((8,), ())]
    arguments = (x, blocks[0], chosen, weights, blocks[1], share, x)
    got = np.array(experts.portable(*arguments).astype(mx.float32))
    assert np.array_equal(got, whole(experts.portable, *arguments))


def streams_of(monkeypatch, function):
    """The numbers of the cores that a call builds its parts for."""
    found, core = [], cores._core
    monkeypatch.setattr(cores, "_core", lambda number: found.append(number) or core(number))
    mx.eval(function())
    return found


def test_small_products_are_not_cut(monkeypatch):
    monkeypatch.setattr(cores, "cores", lambda: 4)
    x, rows = mx.ones((1, 64)), cores.LEAST // 64
    for count, expected in (
        (2 * rows - 1, []),
        (2 * rows, [0, 1]),
        (3 * rows, [0, 1, 2]),
        (9 * rows, [0, 1, 2, 3]),
    ):
        weight = packed(mx.zeros((count, 64)), PLAIN)
        assert streams_of(monkeypatch, lambda weight=weight: linear.portable(x, weight)) == expected


def test_on_a_gpu_nothing_is_cut(many, monkeypatch):
    monkeypatch.setattr(cores, "on_cpu", lambda: False)
    weight = packed(mx.zeros((64, 64)), PLAIN)
    assert streams_of(monkeypatch, lambda: linear.portable(mx.ones((1, 64)), weight)) == []


@pytest.mark.usefixtures("many")
def test_a_compiled_function_runs_in_any_thread():
    mx.random.seed(0)
    weight, x = packed(mx.random.normal((70, 64)), PLAIN), mx.random.normal((1, 64))
    function, expected, found = (
        mx.compile(lambda x: linear.portable(x, weight)),
        whole(linear.portable, x, weight),
        [],
    )
    mx.eval(function(x))
    threads = [threading.Thread(target=lambda: found.append(np.array(function(x)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(each, expected) for each in found)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 11])
def test_results_come_in_order_and_few_are_made_before_they_are_wanted(monkeypatch, count):
    monkeypatch.setattr(cores, "cores", lambda: 3)
    made = []

    def make(item):
        made.append(item)
        return mx.full((5,), item)

    for number, each in enumerate(cores.ahead(make, range(count))):
        assert np.array_equal(np.array(each), np.full(5, number))
        assert len(made) <= number + 1 + 3
    assert made == list(range(count))


@pytest.mark.parametrize("rows", [1, 5, 64, 100])
def test_a_weight_is_unpacked_in_pieces_for_many_rows(monkeypatch, rows):
    mx.random.seed(rows)
    weight, x = packed(mx.random.normal((rows, 64)), PLAIN), mx.random.normal((40, 64))
    expected = np.array(linear.host(x, weight))
    monkeypatch.setattr(linear, "UNPACKED", 5 * 64)
    # a product of five rows at once may add in another order; measured 4e-7 of values up to 30
    assert np.allclose(np.array(linear.host(x, weight)), expected, rtol=0, atol=1e-4)
