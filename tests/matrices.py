"""Random matrices in the packed formats, for tests of ops."""

from __future__ import annotations

import mlx.core as mx

from moelocal.formats import QuantizedArray, QuantSpec, join_rows
from moelocal.ops.experts import SwiGLU


def packed(weight: mx.array, spec: QuantSpec | None):
    if spec is None:
        return weight
    parts = mx.quantize(weight, group_size=spec.group, bits=spec.bits, mode=spec.mode)
    return QuantizedArray(parts[0], parts[1], parts[2] if len(parts) > 2 else None, spec)


def swiglu(spec, lead, width, hidden, joined=True):
    gate, up = (packed(mx.random.normal((*lead, width, hidden)) * 0.1, spec) for _ in range(2))
    return SwiGLU(
        (join_rows([gate, up]),) if joined else (gate, up),
        packed(mx.random.normal((*lead, hidden, width)) * 0.1, spec),
    )
