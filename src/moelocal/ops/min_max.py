"""Plain affine quantization: each group from its least to its greatest weight, by the rule of `mx.quantize`.

weights [..., rows, cols] float32, float16 or bfloat16, cols a multiple of `spec.group`; `spec` affine; dtype, in which
scales and biases are stored -> `QuantizedArray`. The weights must be finite.

`mx.quantize` itself differs between CPU and Metal: there it counts a zero into every group, and rounds halves away from
zero. This is its rule on the CPU, in float32 operations that every backend rounds alike, so a file is the same wherever
it was made: step (high − low) / (2^bits − 1), at least 1e-7; counted from the edge of the larger magnitude, which is
stored exactly; the step then changed so little that a code stands for zero. As there, the codes are those of the step
before it is rounded to `dtype`. `group_search` takes the same scale and bias with the codes that are the nearest ones
for them as stored, so its error is never greater. Weights so small that GPUs flush them (2^-126) count as zero.
"""

from __future__ import annotations

from typing import Final

import mlx.core as mx

from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.ops.group_search import pack

CHUNK: Final = 1 << 20
"""Weights that are taken at once; some 4 arrays of that many float32."""


def min_max(weights: mx.array, spec: QuantSpec, dtype: mx.Dtype) -> QuantizedArray:
    """Evaluates `CHUNK` weights at a time."""
    lead, cols = weights.shape[:-1], weights.shape[-1]
    matrix = weights.reshape(-1, cols)
    rows, parts = max(1, CHUNK // cols), []
    for start in range(0, matrix.shape[0], rows):
        w = matrix[start : start + rows].astype(mx.float32).reshape(-1, cols // spec.group, spec.group)
        codes, scale, bias = _quantize(w, 2**spec.bits - 1)
        words = pack(codes.reshape(-1, cols), spec)
        parts.append((words, scale[..., 0].astype(dtype), bias[..., 0].astype(dtype)))
        mx.eval(parts[-1])
    words, scales, biases = (
        mx.concatenate(list(part)).reshape(*lead, -1) for part in zip(*parts, strict=True)
    )
    return QuantizedArray(words, scales, biases, spec)


def _quantize(w: mx.array, last: int) -> tuple[mx.array, mx.array, mx.array]:
    """Codes uint8, scale and bias of groups along the last axis."""
    low, high = mx.min(w, axis=-1, keepdims=True), mx.max(w, axis=-1, keepdims=True)
    step = mx.maximum((high - low) / last, 1e-7)
    from_low = mx.abs(low) > mx.abs(high)
    edge, scale = mx.where(from_low, low, high), mx.where(from_low, step, -step)
    code_of_zero = mx.round(edge / scale)
    snapped = code_of_zero != 0
    scale = mx.where(snapped, edge / mx.where(snapped, code_of_zero, 1), scale)
    bias = mx.where(snapped, edge, 0.0)
    return mx.clip(mx.round((w - bias) / scale), 0, last).astype(mx.uint8), scale, bias
