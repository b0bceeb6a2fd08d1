"""The quantizer's search: two forms with the same bits, never worse than `mx.quantize`, better on average."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.ops import group_search as module
from moelocal.ops.group_search import group_search, pack

SPECS = [QuantSpec(bits, group) for group in (32, 64, 128) for bits in (2, 3, 4, 5, 6, 8)]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def same_bits(a: QuantizedArray, b: QuantizedArray) -> bool:
    def bits(x: mx.array) -> mx.array:
        return x.view(mx.uint32 if x.dtype in (mx.float32, mx.uint32) else mx.uint16)

    return all(
        x.dtype == y.dtype and mx.array_equal(bits(x), bits(y))
        for x, y in zip(a.arrays, b.arrays, strict=True)
    )


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def codes(packed: QuantizedArray) -> np.ndarray:
    ones = mx.ones(packed.scales.shape)
    return wide(QuantizedArray(packed.weight, ones, ones * 0, packed.spec).dequantize(mx.float32))


def squared_error(
    weights: mx.array, packed: QuantizedArray, importance: mx.array | None = None
) -> np.ndarray:
    """Per group, in float64, of what the stored scale and bias give."""
    shape = (*packed.scales.shape, packed.spec.group)
    scale, bias = (wide(a)[..., None] for a in packed.arrays[1:])
    squares = (wide(weights).reshape(shape) - (codes(packed).reshape(shape) * scale + bias)) ** 2
    if importance is not None:
        squares *= wide(importance).reshape(shape[-2:])
    return squares.sum(axis=-1)


def min_max(weights: mx.array, spec: QuantSpec) -> QuantizedArray:
    return QuantizedArray(*mx.quantize(weights, group_size=spec.group, bits=spec.bits), spec)


def heavy_tailed(rows: int, cols: int, freedom: float, dtype: mx.Dtype, seed: int = 7) -> mx.array:
    return mx.array(0.02 * np.random.default_rng(seed).standard_t(freedom, (rows, cols)), mx.float32).astype(
        dtype
    )


def odd_groups(group: int) -> mx.array:
    """float32 [..., group], one kind of group a row: what formulas stumble over."""
    x = np.random.default_rng(3).standard_normal((20, group)).astype(np.float32)
    x[0], x[1], x[2] = 0, 0.3, -7.0
    x[3, 1:], x[4, 5] = 0, 1e4
    x[5], x[6] = np.abs(x[5]), -np.abs(x[6]) - 2
    x[7] *= np.float32(1e30)
    x[8] *= np.float32(3e38) / np.abs(x[8]).max()
    x[9] *= np.float32(1e-30)
    x[10] *= np.float32(1e-39)
    x[11] = np.where(np.arange(group) % 2, 1e-42, -1e-42)
    x[12, 0], x[13, 1], x[14, 2] = np.nan, np.inf, -np.inf
    x[15] = np.round(x[15] * 2)
    x[16] = np.where(np.arange(group) % 2, 1, -1)
    x[17] = 1 + x[17] * np.float32(1e-6)
    x[18] *= np.exp(x[17] * 20)
    x[19] *= np.float32(1e-8)
    return mx.array(x)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_packed_codes_are_what_mlx_reads(spec: QuantSpec):
    x = np.random.default_rng(1).integers(0, 2**spec.bits, (3, 2 * spec.group))
    packed = pack(mx.array(x, mx.uint8), spec)
    assert packed.shape == (3, 2 * spec.group * spec.bits // 32) and packed.dtype == mx.uint32
    # products and sums of small powers of two: exact in any order
    scale, bias = mx.array([[0.25, 2.0]] * 3), mx.array([[-8.0, 16.0]] * 3)
    expected = x.reshape(3, 2, -1) * np.array(scale)[..., None] + np.array(bias)[..., None]
    got = QuantizedArray(packed, scale, bias, spec).dequantize(mx.float32)
    assert np.array_equal(np.array(got).reshape(expected.shape), expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_starts_from_min_max_as_mlx_does(spec: QuantSpec):
    x = heavy_tailed(40, spec.group, 4, mx.float32)
    theirs = min_max(x, spec)
    for i, row in enumerate(np.array(x)):
        group = module._Group(row, np.ones_like(row), spec.bits, mx.float32)
        scale, bias = group.min_max(np.float32(1e-7) * group.down)
        assert scale * group.up == theirs.scales[i].item() and bias * group.up == theirs.biases[i].item()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_portable_is_the_reference_bit_for_bit(spec: QuantSpec):
    odd = odd_groups(spec.group).reshape(10, -1)
    importance = mx.array(np.random.default_rng(2).exponential(size=odd.shape[-1]) ** 8, mx.float32)
    importance[: spec.group // 2] = 0
    dtype = DTYPES[(spec.bits + spec.group // 32) % 3]
    for weights, statistics in ((odd, None), (odd.astype(mx.bfloat16), importance)):
        got = group_search.portable(weights, spec, statistics, dtype)
        assert same_bits(got, group_search.reference(weights, spec, statistics, dtype))
        assert mx.all(mx.isfinite(got.scales)) and mx.all(mx.isfinite(got.biases))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.sampled_from(["normal", "heavy", "uniform", "one-sided", "outlier", "lattice", "sparse"]),
    st.sampled_from([3e-8, 1e-4, 0.02, 1.0, 1e30]),
    st.sampled_from([mx.float32, mx.bfloat16]),
    st.integers(0, 2**16),
)
def test_no_group_is_worse_than_min_max(spec: QuantSpec, kind: str, size: float, dtype: mx.Dtype, seed: int):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8, spec.group * 2))
    if kind == "heavy":
        x = rng.standard_t(2.5, x.shape)
    elif kind == "uniform":
        x = rng.uniform(-1, 1, x.shape)
    elif kind == "one-sided":
        x = np.abs(x) + 1
    elif kind == "outlier":
        x[:, 3] *= 50
    elif kind == "lattice":
        x = rng.integers(-3, 5, x.shape)
    elif kind == "sparse":
        x *= rng.random(x.shape) < 0.1
    weights = mx.array(x * size, mx.float32).astype(dtype)
    ours, theirs = (
        squared_error(weights, q)
        for q in (group_search.portable(weights, spec, None, dtype), min_max(weights, spec))
    )
    # candidates are compared in float32: a rounding of 2^-22 of the largest weight in every error
    largest = np.abs(wide(weights).reshape(*ours.shape, -1)).max(axis=-1)
    assert np.all(ours <= theirs * (1 + 1e-4) + spec.group * (largest * 2.0**-22) ** 2)


@pytest.mark.parametrize(
    ("bits", "group", "freedom", "reduction"),
    # as measured on these 65,536 weights
    [
        (2, 64, 6.5, 0.383),
        (3, 64, 6.5, 0.275),
        (4, 32, 6.5, 0.264),
        (4, 64, 6.5, 0.204),
        (4, 64, 200, 0.207),
        (4, 128, 6.5, 0.184),
        (5, 64, 6.5, 0.198),
        (6, 64, 6.5, 0.216),
        (8, 64, 6.5, 0.519),
    ],
)
def test_error_falls(bits: int, group: int, freedom: float, reduction: float):
    weights, spec = heavy_tailed(64, 1024, freedom, mx.bfloat16), QuantSpec(bits, group)
    ours = squared_error(weights, group_search.portable(weights, spec, None, mx.bfloat16)).sum()
    theirs = squared_error(weights, min_max(weights, spec)).sum()
    print(f"{bits} bits, group {group}, t{freedom}: {1 - ours / theirs:.3f}")
    assert ours < theirs * (1 - reduction + 0.005)  # other backends' mx.quantize differs a little


@pytest.mark.parametrize("spec", [QuantSpec(2, 32), QuantSpec(4, 64), QuantSpec(8, 128)], ids=str)
def test_importance_lowers_the_weighted_error(spec: QuantSpec):
    weights = heavy_tailed(16, 1024, 6.5, mx.bfloat16)
    importance = mx.array(np.random.default_rng(5).lognormal(0, 1.5, 1024), mx.float32)
    knowing, blind = (
        squared_error(weights, group_search.portable(weights, spec, given, mx.bfloat16), importance)
        for given in (importance, None)
    )
    print(f"{spec}: {1 - knowing.sum() / blind.sum():.3f}")
    assert knowing.sum() < 0.95 * blind.sum()
    theirs = squared_error(weights, min_max(weights, spec), importance)
    assert np.all(knowing <= theirs * (1 + 1e-4))


def test_importance_counts_relative_to_its_group():
    weights, spec = heavy_tailed(4, 128, 5, mx.bfloat16), QuantSpec(4, 64)
    importance = mx.array(np.random.default_rng(5).lognormal(0, 1, 128), mx.float32)

    def found(statistics: mx.array | None) -> QuantizedArray:
        return group_search.portable(weights, spec, statistics, mx.bfloat16)

    assert same_bits(found(importance * 2.0**40), found(importance * 2.0**-40))
    for all_alike in (0.0, 2.0, 1e-35):
        assert same_bits(found(mx.full((128,), all_alike)), found(None))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    weights, spec = heavy_tailed(30, 128, 5, mx.bfloat16).reshape(5, 6, 128), QuantSpec(4, 32)
    importance = mx.random.uniform(shape=(128,))
    whole = group_search.portable(weights, spec, importance, mx.float16)
    assert whole.weight.shape == (5, 6, 16) and whole.scales.shape == whole.biases.shape == (5, 6, 4)
    monkeypatch.setattr(module, "CHUNK", 7 * 128)
    assert same_bits(group_search.portable(weights, spec, importance, mx.float16), whole)


def test_groups_that_codes_can_hold_come_back_exactly():
    spec = QuantSpec(4, 32)
    lattice = mx.array(np.random.default_rng(1).integers(-7, 9, (6, 32)), mx.float32)
    lattice[:, 0], lattice[:, 1] = -7, 8
    alike = mx.broadcast_to(mx.array([[0.0], [0.3], [-7.0], [1e30]]), (4, 32))
    for weights in (lattice, lattice * 2.0**-90, lattice * 2.0**100, alike):
        for form in (group_search.reference, group_search.portable):
            found = form(weights, spec, None, mx.float32)
            assert np.array_equal(wide(found.dequantize(mx.float32)), wide(weights))


def test_one_outlier_is_worth_the_range():
    weights = np.full((1, 64), 0.01, np.float32)
    weights[0, 9] = 100
    found = group_search.portable(mx.array(weights), QuantSpec(4, 64), None, mx.bfloat16)
    values = wide(found.dequantize(mx.float32))
    assert abs(values[0, 9] - 100) < 1 and np.ptp(np.delete(values, 9)) == 0


def test_weights_that_are_no_numbers_count_as_zero():
    weights = np.array(heavy_tailed(3, 32, 5, mx.float32))
    zeroed = weights.copy()
    weights[:, 4], zeroed[:, 4] = [np.nan, np.inf, -np.inf], 0
    for form in (group_search.reference, group_search.portable):
        got, expected = (form(mx.array(x), QuantSpec(4, 32), None, mx.bfloat16) for x in (weights, zeroed))
        assert same_bits(got, expected)


def test_what_the_stored_dtype_cannot_hold():
    weights = heavy_tailed(2, 32, 5, mx.float32)
    spec = QuantSpec(4, 32)
    for form in (group_search.reference, group_search.portable):
        large = form(weights * 1e9, spec, None, mx.float16)
        assert mx.all(mx.isfinite(large.scales)) and mx.max(mx.abs(large.biases)).item() == 65504
        for dtype in DTYPES:  # below 2^-100: nothing is left
            assert not mx.any(form(weights * 1e-36, spec, None, dtype).dequantize(mx.float32))
        # float16 holds nothing below 6e-8: the error is the weights themselves, or a bias of one such step
        tiny = form(weights * 1e-7, spec, None, mx.float16)
        assert np.all(np.abs(wide(tiny.dequantize(mx.float32))) <= 6e-8)
