"""`attend` in the simulator against its reference: a cache that is longer than what is used, and poisoned behind it."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offmetal
from moelocal import metal
from moelocal.ops.attend import ROWS, TILE, attend

DTYPES = st.sampled_from([mx.float32, mx.float16, mx.bfloat16])
# Both sides round y once, from float32 values that differ by the order of their sums: by at most SUMS of the largest
# value, as an output is a mean of values (2e-6 were seen with scores of 30, whose rounding an exponential hands on).
# Where a border of rounding lies between the two they end up a unit in the last place apart, at most UNIT of y.
UNIT = {mx.float32: 2**-23, mx.float16: 2**-10, mx.bfloat16: 2**-7}
SUMS = 1e-5


def cache(batch: int, groups: int, keys: int, size: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Keys and values, the filled part of a buffer, with NaN behind them."""
    buffer = mx.random.normal((2 * batch, groups, keys + 37, size)).astype(dtype)
    buffer[:, :, keys:] = math.nan
    return buffer[:batch, :, :keys], buffer[batch:, :, :keys]


def compare(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    gate: mx.array | None,
    scale: float | None = None,
) -> mx.array:
    scale = q.shape[3] ** -0.5 if scale is None else scale
    assert attend.supports(q, k, v, scale, None, gate)
    got, want = attend(q, k, v, scale, None, gate), attend.reference(q, k, v, scale, None, gate)
    close(got, want, v)
    return got


def close(got: mx.array, want: mx.array, v: mx.array) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    unit, wide = UNIT[want.dtype], want.astype(mx.float32)
    bound = unit * mx.abs(wide) + SUMS * mx.max(mx.abs(v.astype(mx.float32)))
    error = mx.abs(got.astype(mx.float32) - wide)
    assert mx.all(error <= bound).item(), mx.max(error - bound).item()  # false for NaN


def near(got: mx.array, want: mx.array, v: mx.array) -> None:
    """As stock attention is: it may round in 16 bits what it multiplies, with weights that sum to 1."""
    assert got.dtype == want.dtype and got.shape == want.shape
    error, most = (
        mx.abs(got.astype(mx.float32) - want.astype(mx.float32)),
        mx.max(mx.abs(v.astype(mx.float32))),
    )
    assert mx.all(error <= max(SUMS, UNIT[want.dtype]) * most).item(), mx.max(error / most).item()


def inputs(
    batch: int,
    groups: int,
    ratio: int,
    queries: int,
    keys: int,
    size: int,
    dtype: mx.Dtype,
    gated: bool,
    spread: float,
) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
    q = (mx.random.normal((batch, groups * ratio, queries, size)) * spread).astype(dtype)
    beside = mx.random.normal((batch, queries, groups * ratio, 2 * size)).astype(dtype) * 3
    return q, *cache(batch, groups, keys, size, dtype), beside[..., size:] if gated else None


@pytest.mark.parametrize(
    ("groups", "ratio", "queries", "keys", "size"),
    [(2, 8, 1, 300, 256), (1, 3, 2, 65, 64), (2, 1, 1, 31, 32)],
    ids=["flagship", "padded rows", "one row"],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_modes(mode: str, groups: int, ratio: int, queries: int, keys: int, size: int, dtype: mx.Dtype):
    compare(*inputs(1, groups, ratio, queries, keys, size, dtype, True, 1.0))


@pytest.mark.parametrize("keys", [1, 31, 33, TILE - 1, TILE, TILE + 1, 256, 1000, 1027])
@pytest.mark.parametrize("ratio", [1, 2, 8])
def test_lengths(keys: int, ratio: int):
    with offmetal.options(allow_unwritten=False):
        compare(*inputs(2, 2, ratio, 1, keys, 64, mx.float32, ratio > 1, 1.0))


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("keys", [1, 31, 64, 65, 300])
@pytest.mark.parametrize(("capacity", "dtype"), [(320, mx.float32), (320, mx.bfloat16), (1024, mx.float16)])
def test_length(mode: str, capacity: int, dtype: mx.Dtype, keys: int, queries: int):
    """The first `keys` of a buffer: the kernel reads no other, so they may be NaN. In the other forms those have the
    weight 0, but are multiplied by it, so that there they are large and finite."""
    keys = max(keys, queries)
    q, k, v, gate = inputs(1, 2, 4, queries, keys, 64, dtype, True, 1.0)
    length, scale = mx.array(keys), 64**-0.5
    want = attend.reference(q, k, v, scale, None, gate)

    def within(x: mx.array, rest: float) -> mx.array:
        return mx.pad(x, [(0, 0), (0, 0), (0, capacity - keys), (0, 0)], constant_values=rest)

    poisoned, garbage = [[within(x, rest) for x in (k, v)] for rest in (math.nan, 1e4)]
    assert attend.supports(q, *poisoned, scale, None, gate, length)
    close(attend(q, *poisoned, scale, None, gate, length), want, v)
    close(attend.reference(q, *garbage, scale, None, gate, length), want, v)
    near(attend.portable(q, *garbage, scale, None, gate, length), want, v)


@pytest.mark.parametrize("size", [32, 64, 96, 128, 160, 192, 224, 256])
def test_head_sizes(size: int):
    compare(*inputs(1, 2, 4, 1, 150, size, mx.float16, True, 1.0))


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    ratio=st.sampled_from([1, 2, 3, 6, 8, 12, 16, 20]),
    queries=st.integers(1, 8),
    before=st.integers(0, 400),
    size=st.sampled_from([32, 64, 96]),
    dtype=DTYPES,
    gated=st.booleans(),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 5.0]),
)
def test_any_shape(batch, groups, ratio, queries, before, size, dtype, gated, spread):
    with offmetal.options(allow_unwritten=False):
        compare(*inputs(batch, groups, ratio, queries, before + queries, size, dtype, gated, spread))


@pytest.mark.parametrize("queries", [2, 8])
def test_a_query_sees_nothing_behind_itself(queries: int):
    # the last tile holds the last query's own key only, so the other rows see nothing of it
    q, k, v, _ = inputs(1, 1, 2, queries, TILE + 1, 32, mx.float32, False, 1.0)
    for t in range(queries):
        seen = TILE + 1 - queries + t + 1
        alone = compare(q[:, :, t : t + 1], k[:, :, :seen], v[:, :, :seen], None)
        together = attend(q, k, v, 32**-0.5, None, None)[:, t : t + 1]
        assert mx.max(mx.abs(alone - together)).item() < 1e-6


def test_blocks_of_several_tiles(monkeypatch: pytest.MonkeyPatch):
    # a running maximum that grows, and one that was right from the start
    import moelocal.ops.attend as module

    monkeypatch.setattr(module, "THREADGROUPS", 4)
    with offmetal.options(allow_unwritten=False):
        q, k, v, gate = inputs(1, 2, 4, 1, 700, 64, mx.float32, True, 2.0)
        order = mx.argsort((q[:, :1] @ k[:, :1].swapaxes(2, 3))[0, 0, 0])
        for way in (order, order[::-1]):
            compare(q, mx.take(k, way, axis=2), mx.take(v, way, axis=2), gate)
        monkeypatch.setattr(module, "THREADGROUPS", 1)
        compare(q[:, :4], k[:, :1], v[:, :1], gate[:, :, :4])


@pytest.mark.parametrize("best", [0, 500, 999])
def test_scores_ten_thousand_apart(best: int):
    # one key takes all the weight: the answer is its value, to the bit
    q, (k, v) = mx.ones((1, 2, 1, 32)), cache(1, 1, 1000, 32, mx.float32)
    k = mx.where(mx.arange(1000)[:, None] == best, 1e4 / 32, -1e4 / 32) * mx.ones_like(k)
    got = compare(q, k, v, None, scale=1.0)
    assert mx.array_equal(got.reshape(2, 32), mx.repeat(v[0, :, best], 2, axis=0))


def test_equal_scores_give_the_mean():
    q, (k, v) = mx.zeros((1, 2, 1, 64)), cache(1, 2, 777, 64, mx.float32)
    got = compare(q, k, v, None).reshape(2, 64)
    assert mx.allclose(got, mx.mean(v[0], axis=1), atol=1e-6).item()


@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_gates_far_out_close_and_open(dtype: mx.Dtype):
    q, k, v, _ = inputs(1, 2, 2, 1, 70, 32, dtype, False, 1.0)
    gate = mx.full((1, 1, 4, 32), 3e4).astype(dtype)
    assert mx.array_equal(compare(q, k, v, gate), attend(q, k, v, 32**-0.5, None, None))
    assert not mx.any(compare(q, k, v, -gate)).item()


def traffic_of(op: Callable[..., mx.array], *arguments: object) -> list[dict[str, dict[str, int]]]:
    """Bytes per buffer of each launch of a call."""
    seen = []

    def noting(**binding: object):
        run = offmetal.emulated_kernel(**binding)

        def call(**launch: object):
            result = run(**launch)
            seen.append(offmetal.last_result.traffic)
            return result

        return call

    with metal.executing(noting):
        op(*arguments)
    return seen


@pytest.mark.parametrize("keys", [1, 65, 300])
def test_nothing_behind_the_length_is_read(keys: int):
    buffer = mx.random.normal((2, 2, 1024, 64)).astype(mx.bfloat16)
    q = mx.random.normal((1, 8, 1, 64)).astype(mx.bfloat16)
    first, _ = traffic_of(attend, q, *mx.split(buffer, 2), 0.125, None, None, mx.array(keys))
    assert first["k"]["read"] == first["v"]["read"] == 2 * keys * 64 * 2


@pytest.mark.parametrize("queries", [1, 2, 3])
def test_keys_and_values_are_read_once_for_all_heads_of_a_group(queries: int):
    keys, size, heads = 1024, 256, 16
    q, k, v, gate = inputs(1, 2, 8, queries, keys, size, mx.bfloat16, True, 1.0)
    first, second = traffic_of(attend, q, k, v, size**-0.5, None, gate)
    once = 2 * keys * size * 2
    shares = -(-8 * queries // ROWS)  # three positions of eight heads are more rows than one reading serves
    assert first["k"]["read"] == first["v"]["read"] == shares * once
    rows, blocks = heads * queries, keys // TILE
    assert first["q"]["read"] == rows * size * 2 * blocks
    assert first["partial"]["written"] == second["partial"]["read"] == rows * blocks * size * 4
    assert second["gate"]["read"] == second["out"]["written"] == rows * size * 2


@pytest.mark.falls_back
def test_other_arguments_go_to_the_portable_form():
    q, k, v, gate = inputs(1, 2, 2, 1, 20, 32, mx.float32, True, 1.0)
    half = [x.astype(mx.float16) for x in (q, k, v)]
    nine, wide, narrow = (
        inputs(1, 2, 2, queries, 20, size, mx.float32, True, 1.0)
        for queries, size in ((9, 32), (1, 288), (1, 24))
    )
    other = inputs(1, 2, 2, 1, 20, 64, mx.float32, False, 1.0)[2]
    for name, arguments in {
        "padding": (q, k, v, 0.2, mx.array([3]), gate),
        "nine queries": (*nine[:3], 0.2, None, nine[3]),
        "D over 256": (*wide[:3], 0.2, None, wide[3]),
        "D that 32 does not divide": (*narrow[:3], 0.2, None, narrow[3]),
        "keys of another dtype": (q, half[1], v, 0.2, None, gate),
        "keys and values of another dtype": (q, *half[1:], 0.2, None, None),
        "a gate of another dtype": (*half, 0.2, None, gate),
        "values with another D": (q, k, other, 0.2, None, None),
    }.items():
        assert not attend.supports(*arguments), name
        near(attend(*arguments), attend.reference(*arguments), arguments[2])


@pytest.mark.falls_back
def test_heads_that_do_not_divide_are_an_error_in_every_form():
    q, k, v, _ = inputs(1, 2, 2, 1, 20, 32, mx.float32, False, 1.0)
    assert not attend.supports(q[:, :3], k, v, 0.2, None, None)
    for form in (attend, attend.reference):
        with pytest.raises(ValueError):
            mx.eval(form(q[:, :3], k, v, 0.2, None, None))
