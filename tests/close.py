"""How op tests compare: largest difference relative to the largest value expected."""

from __future__ import annotations

import mlx.core as mx


def relative_error(got: mx.array, expected: mx.array) -> float:
    """max |got − expected| / max |expected|, in float32; NaN anywhere counts as infinite."""
    got, expected = got.astype(mx.float32), expected.astype(mx.float32)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if mx.any(mx.isnan(got)).item():
        return float("inf")
    return float((mx.max(mx.abs(got - expected)) / mx.maximum(mx.max(mx.abs(expected)), 1e-6)).item())
