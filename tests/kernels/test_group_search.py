"""`group_search` in the simulator: the bits of the portable form, which are those of the reference (tests/ops)."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offmetal
from moelocal import metal
from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.ops.group_search import GROUP_SEARCH, group_search, moves
from ops.test_group_search import DTYPES, SPECS, heavy_tailed, odd_groups, same_bits


def importance_of(cols: int) -> mx.array:
    """Over eight decades, with a group and a half of zeros."""
    statistics = np.random.default_rng(2).exponential(size=cols) ** 8
    statistics[: cols * 3 // 4 : 2] = 0
    return mx.array(statistics, mx.float32)


def compare(weights: mx.array, spec: QuantSpec, importance: mx.array | None, dtype: mx.Dtype) -> None:
    assert group_search.supports(weights, spec, importance, dtype)
    got = group_search(weights, spec, importance, dtype)
    assert same_bits(got, group_search.portable(weights, spec, importance, dtype))


@pytest.mark.parametrize("spec", [QuantSpec(3, 32), QuantSpec(4, 64), QuantSpec(8, 128)], ids=str)
def test_modes(mode: str, spec: QuantSpec):
    odd = odd_groups(spec.group).reshape(10, -1)
    compare(odd, spec, None, mx.float32)
    compare(odd.astype(mx.bfloat16), spec, importance_of(odd.shape[-1]), mx.bfloat16)
    compare(heavy_tailed(3, spec.group, 4, mx.float32), spec, None, mx.float16)


@pytest.mark.parametrize("runner", ["simulator"], indirect=True)  # on a device nobody chooses what is fused
def test_products_kept_apart_are_what_makes_modes_agree(monkeypatch: pytest.MonkeyPatch):
    """The same text without the barrier gives other bits where multiply and add may be fused."""
    weights, spec = heavy_tailed(8, 128, 4, mx.float32), QuantSpec(8, 128)
    importance = mx.random.uniform(shape=(128,))
    expected = group_search.portable(weights, spec, importance, mx.float32)
    bare = metal.text("group_search").replace("as_type<float>(as_type<uint>(a * b) ^ zero)", "a * b")
    assert bare != metal.text("group_search")
    monkeypatch.setattr(metal, "text", lambda file: bare)
    GROUP_SEARCH._bound.clear()
    try:
        found: dict[bool, QuantizedArray] = {}
        for fused in (False, True):
            with offmetal.options(fma=fused):
                found[fused] = group_search(weights, spec, importance, mx.float32)
        assert same_bits(found[False], expected) and not same_bits(found[True], expected)
    finally:
        GROUP_SEARCH._bound.clear()


@contextmanager
def flushing() -> Iterator[None]:
    """Inside, this thread's float32 arithmetic takes and gives zero for subnormal numbers, as GPUs do."""
    libm = ctypes.CDLL("libm.so.6")
    before, now = (ctypes.c_uint32 * 8)(), (ctypes.c_uint32 * 8)()  # fenv_t; its last word is MXCSR
    libm.fegetenv(before)
    now[:] = [*before[:7], before[7] | 0x8040]
    libm.fesetenv(now)
    try:
        yield
    finally:
        libm.fesetenv(before)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="sets a register of x86"
)
@pytest.mark.parametrize("spec", [QuantSpec(2, 32), QuantSpec(4, 64), QuantSpec(8, 128)], ids=str)
def test_flushed_subnormal_numbers_do_not_show(spec: QuantSpec):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((12, spec.group)) * np.exp(rng.uniform(-88, 85, (12, 1)))
    x[::2] *= np.exp(5 * np.minimum(rng.standard_normal(x[::2].shape), 0))
    weights = mx.concatenate([odd_groups(spec.group), mx.array(x, mx.float32)])
    importance = mx.array(np.exp(rng.uniform(-85, 0, spec.group)), mx.float32)
    probe = offmetal.emulated_kernel("probe", ["x"], ["y"], "y[thread_position_in_grid.x] = 0.5f * x[0];")
    for dtype in DTYPES:
        expected = group_search.portable(weights, spec, importance, dtype)
        mx.eval(expected.arrays)
        assert group_search.supports(weights, spec, importance, dtype)
        with flushing():
            shape = {"output_shapes": [(1,)], "output_dtypes": [mx.float32], "grid": (1, 1, 1)}
            (halved,) = probe(inputs=[mx.full((8,), 1.2e-38)], threadgroup=(1, 1, 1), **shape)
            assert halved.view(mx.uint32).item() == 0
            assert same_bits(group_search(weights, spec, importance, dtype), expected)


def test_the_reference_itself():
    spec = QuantSpec(5, 64)
    weights = mx.concatenate([odd_groups(64), heavy_tailed(10, 64, 4, mx.float32)])
    for statistics in (None, importance_of(64)):
        got = group_search(weights, spec, statistics, mx.bfloat16)
        assert same_bits(got, group_search.reference(weights, spec, statistics, mx.bfloat16))


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([2, 5, 200]),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_any_format(
    spec: QuantSpec,
    rows: int,
    per_row: int,
    dtype: mx.Dtype,
    stored: mx.Dtype,
    weighted: bool,
    freedom: float,
    size: float,
):
    weights = heavy_tailed(rows, per_row * spec.group, freedom, mx.float32, rows) * size
    with offmetal.options(allow_unwritten=False):
        compare(weights.astype(dtype), spec, importance_of(weights.shape[-1]) if weighted else None, stored)


def test_leading_axes_and_views():
    spec = QuantSpec(4, 32)
    weights = heavy_tailed(3 * 5 * 2, 128, 5, mx.bfloat16).reshape(3, 10, 128)[:, ::2, 32:96]
    got = group_search(weights, spec, None, mx.bfloat16)
    assert got.weight.shape == (3, 5, 8) and got.scales.shape == got.biases.shape == (3, 5, 2)
    assert same_bits(got, group_search.portable(weights, spec, None, mx.bfloat16))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_weight_is_read_once_and_every_result_written_once(bits: int):
    weights, spec = heavy_tailed(6, 192, 5, mx.bfloat16), QuantSpec(bits, 64)
    group_search(weights, spec, None, mx.bfloat16)
    traffic = offmetal.last_result.traffic
    groups = weights.size // 64
    assert traffic["weights"]["read"] == weights.nbytes
    assert traffic["importance"]["read"] == 4 * weights.size
    assert traffic["moves"]["read"] == moves(bits).nbytes * groups
    assert traffic["words"]["written"] == weights.size * bits // 8
    assert traffic["scales"]["written"] == traffic["biases"]["written"] == 2 * groups


@pytest.mark.falls_back
def test_what_the_kernel_leaves_to_the_portable_form():
    weights = mx.zeros((2, 64))
    assert group_search.supports is not None
    assert group_search.supports(weights, QuantSpec(4, 64), None, mx.bfloat16)
    assert not group_search.supports(weights, QuantSpec(4, 32, "mxfp4"), None, mx.bfloat16)
    assert not group_search.supports(weights, QuantSpec(4, 128), None, mx.bfloat16)
    assert not group_search.supports(weights[:0], QuantSpec(4, 64), None, mx.bfloat16)
    assert not group_search.supports(weights.astype(mx.int32), QuantSpec(4, 64), None, mx.bfloat16)
