"""Plain rounding: the bits of `mx.quantize` on the CPU, never better than the search, the same on every backend."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.ops import min_max as module
from moelocal.ops.group_search import group_search
from moelocal.ops.min_max import min_max

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
SPECS = [QuantSpec(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]

KINDS = ["normal", "heavy tails", "all negative", "all positive", "constant", "zero", "one of a group",
         "steps below 1e-7", "halves"]  # fmt: skip


def weights(kind: str, rows: int, cols: int, seed: int) -> np.ndarray:
    random = np.random.RandomState(seed)
    normal = random.standard_normal((rows, cols)) * 0.02
    return {
        "normal": normal,
        "heavy tails": random.standard_t(3, (rows, cols)) * 0.01,
        "all negative": -np.abs(normal) - 0.5,
        "all positive": np.abs(normal) + 0.5,
        "constant": np.full((rows, cols), random.standard_normal()),
        "zero": np.zeros((rows, cols)),
        "one of a group": np.where(np.arange(cols) % 32 == 7, normal, 0),
        "steps below 1e-7": normal * 1e-6,
        "halves": random.randint(0, 2**5, (rows, cols)) / 2,  # every other weight lies between two codes
    }[kind]


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and np.array(a.view(mx.uint8)).tobytes() == np.array(b.view(mx.uint8)).tobytes()


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="on a GPU `mx.quantize` rounds by another rule")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.bits}-g{spec.group}")
@given(kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
def test_the_bits_are_those_of_mx_quantize_on_the_cpu(spec, kind, dtype, seed):
    array = mx.array(weights(kind, 3, 256, seed)).astype(dtype)
    expected = mx.quantize(array, spec.group, spec.bits)
    assert all(same(*pair) for pair in zip(min_max(array, spec, dtype).arrays, expected, strict=True))


@pytest.mark.parametrize("spec", [QuantSpec(3, 32), QuantSpec(4, 64), QuantSpec(8, 128)])
def test_the_search_is_never_worse_in_any_group(spec):
    array = mx.array(np.concatenate([weights(kind, 20, 256, seed) for seed, kind in enumerate(KINDS)]))
    array = array.astype(mx.bfloat16)

    def errors(packed: QuantizedArray) -> np.ndarray:
        difference = np.array(packed.dequantize(mx.float32), np.float64) - np.array(array.astype(mx.float32))
        return (difference**2).reshape(-1, spec.group).sum(-1)

    found, plain = (errors(f(array)) for f in (
        lambda a: group_search(a, spec, None, mx.bfloat16), lambda a: min_max(a, spec, mx.bfloat16)
    ))  # fmt: skip
    # the search compares sums in float32: of 128 squares, some 1e-6 of their value
    assert (found <= plain * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("shape", [(5, 64), (3, 7, 128), (2, 1, 32)])
def test_the_result_does_not_depend_on_how_it_is_cut(monkeypatch, shape):
    array, spec = mx.random.normal(shape, key=mx.random.key(1)), QuantSpec(5, 32)
    whole = min_max(array, spec, mx.float16)
    monkeypatch.setattr(module, "CHUNK", 64)
    cut = min_max(array, spec, mx.float16)
    assert whole.weight.shape == (*shape[:-1], shape[-1] * 5 // 32)
    assert whole.scales.shape == (*shape[:-1], shape[-1] // 32)
    assert all(same(*pair) for pair in zip(whole.arrays, cut.arrays, strict=True))
