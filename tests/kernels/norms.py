"""What the tests of both norms share."""

from __future__ import annotations

import mlx.core as mx
from hypothesis import strategies as st

import offmetal

# y is rounded once, from a float32 norm whose sum runs in another order: half a unit in the last place, and one for h
TOLERANCE = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
DTYPES = st.sampled_from(list(TOLERANCE))
SCALES = st.sampled_from([1e-3, 1.0, 1e3])
SIZES = (8, 33, 2048, 5000)


def values(rows: int, size: int, dtype: mx.Dtype, scale: float) -> mx.array:
    return mx.random.normal((1, rows, size)).astype(dtype) * scale


def close(got: mx.array, expected: mx.array) -> None:
    assert got.dtype == expected.dtype
    wide = expected.astype(mx.float32)
    error = mx.abs(got.astype(mx.float32) - wide)
    bound = TOLERANCE[got.dtype] * mx.maximum(mx.abs(wide), 1e-2)
    assert mx.all(error <= bound).item(), f"largest error {error.max().item()}"


def bytes_of(kind: str) -> dict[str, int]:
    """Read or written by the last launch, without the size and eps that each thread reads."""
    traffic = offmetal.last_result.traffic
    names = ("x", "r", "weight", "h", "y")
    return {name: traffic[name][kind] for name in names if traffic.get(name, {}).get(kind)}
