"""Codes, scales and biases of matrices for the inputs that they meet: error feedback (GPTQ), then coordinate descent.

For a matrix W [rows, cols] let x be the inputs that it will have in the quantized model, x' those that it had in the
original one. The quantized Q shall do to x what W did to x', as near as its format allows:

    Σ |Q x − y|² + λ |Q − W|²      y = W x' or whatever else Q shall give,  λ = `DAMPING` · mean of the diagonal of H.

With the moments H = Σ x xᵀ, C = Σ x' xᵀ or else O = Σ y xᵀ, and H' = H + λ, the best unrounded matrix is
V = (W (C + λ) + O) H'⁻¹, and the error of Q is (Q − V) H' (Q − V)ᵀ and a constant, row by row. (Inputs of both models:
GPTAQ, arXiv 2504.02692.)

1. GPTQ (arXiv 2210.17323) of V: the groups of columns in order. The grid of a group is searched when its columns come
   up, weighted by the diagonal of H' (`ops.group_search`); each column is rounded, and its error taken out of those to
   its right: w_r −= (w_j − q_j) U_jr / U_jj, where H'⁻¹ = Uᵀ U with U upper triangular.
2. `ROUNDS` times over the groups: each code in turn set to the best one given all others (QuantEase, arXiv 2309.01885),
   then scale and bias of the group fitted to its codes by least squares, rounded as stored, and taken where the error
   falls. This never raises the error.
3. A row whose error is above that of the plain search of W takes the plain search.

Float32, U found in float64. The bytes repeat on one machine; on another the last bits of a product may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.ops.group_search import group_search, pack
from moelocal.ops.host import MANY_ROWS, borrow
from moelocal.ops.op import Op

Wide = npt.NDArray[np.float64]

DAMPING: Final = 0.1
ROUNDS: Final = 2

CHUNK: Final = 1 << 24
"""Weights that are quantized at once; some ten float32 arrays of that many are held (0.7 GB)."""


_NOTHING: Final = 1e-30
"""Mean squares that count as no input."""


def _product(a: mx.array, b: mx.array) -> mx.array:
    return a @ b


def _host_product(a: mx.array, b: mx.array) -> mx.array:
    with np.errstate(over="ignore", invalid="ignore"):  # as MLX does; who calls looks at the result
        return mx.array(np.matmul(borrow(a), borrow(b)))


product = Op(
    "product",
    reference=_product,
    portable=_product,
    host=_host_product,
    host_when=lambda a, b: a.shape[-2] >= MANY_ROWS and a.dtype == b.dtype == mx.float32,
)
"""float32 [..., n, k] and [..., k, m] -> [..., n, m]."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Of the inputs of B matrices, float32: `inputs` H [B, cols, cols], and either `crossed` C of that shape or
    `outputs` O [B, rows, cols]. Where H is zero (nothing was seen) it is taken as the identity."""

    inputs: mx.array
    crossed: mx.array | None = None
    outputs: mx.array | None = None


@dataclass(frozen=True, slots=True)
class _Metric:
    """`damped` H', its `diagonal` [B, cols], `upper` U, and what V is made of: `correction` (C + λ) H'⁻¹, `outputs`
    O H'⁻¹."""

    damped: mx.array
    diagonal: mx.array
    upper: mx.array
    correction: mx.array
    outputs: mx.array | None

    @classmethod
    def of(cls, moments: Moments) -> _Metric:
        """The factor of one matrix after the other in float64; the rest in float32, C − H instead of C."""
        cols = moments.inputs.shape[-1]
        dampings, uppers = [], []
        for i in range(moments.inputs.shape[0]):
            h = np.array(moments.inputs[i], np.float64)
            mean = float(np.mean(np.diagonal(h)))
            dampings.append(DAMPING * mean if mean > _NOTHING else 1.0)
            if mean > _NOTHING:
                h[np.arange(cols), np.arange(cols)] += dampings[-1]
            else:
                h = np.eye(cols)
            # H' = F Fᵀ with F upper triangular, the Cholesky factor of H' turned around; U = F⁻¹
            factor = np.asarray(np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1], np.float64)
            uppers.append(mx.array(_inverse(factor).astype(np.float32)))
        upper, eye = mx.stack(uppers), mx.eye(cols)
        damping = mx.array(dampings, mx.float32)[:, None, None]
        seen = mx.trace(moments.inputs, axis1=1, axis2=2)[:, None, None] > _NOTHING * cols
        damped = mx.where(seen, moments.inputs, 0.0) + damping * eye
        inverse = product(mx.contiguous(mx.swapaxes(upper, 1, 2)), upper)
        correction, outputs = damping * inverse, None
        if moments.crossed is not None:
            correction = eye + product(mx.where(seen, moments.crossed - moments.inputs, 0.0), inverse)
        if moments.outputs is not None:
            outputs = product(mx.where(seen, moments.outputs, 0.0), inverse)
        made = cls(damped, mx.diagonal(damped, axis1=1, axis2=2), upper, correction, outputs)
        mx.eval(damped, upper, correction, *([] if outputs is None else [outputs]))
        return made

    def error(self, difference: mx.array) -> mx.array:
        """Q − V [B, rows, cols] -> [B, rows, 1]."""
        return mx.sum(product(difference, self.damped) * difference, axis=-1, keepdims=True)


def _inverse(upper: Wide) -> Wide:
    """Of an upper triangular matrix, by halves: a sixth of the work of `np.linalg.inv`."""
    half = len(upper) // 2
    if half < 32:
        return np.triu(np.linalg.inv(upper))
    first, last = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    return np.block([[first, -first @ upper[:half, half:] @ last], [np.zeros((len(last), half)), last]])


def calibrated(weights: mx.array, moments: Moments, spec: QuantSpec, dtype: mx.Dtype) -> QuantizedArray:
    """weights [B, rows, cols] of any floating dtype, `spec` affine -> the same matrices packed, scales and biases in
    `dtype`. Evaluates `CHUNK` weights at a time."""
    metric = _Metric.of(moments)
    batch, rows, cols = weights.shape
    step, parts = max(1, CHUNK // (batch * cols)), []
    for first in range(0, rows, step):
        part = weights[:, first : first + step].astype(mx.float32)
        wanted = product(part, metric.correction)
        if metric.outputs is not None:
            wanted = wanted + metric.outputs[:, first : first + step]
        parts.append(_chunk(part, wanted, metric, spec, dtype).arrays)
    words, scales, biases = (mx.concatenate(list(each), axis=1) for each in zip(*parts, strict=True))
    return QuantizedArray(words, scales, biases, spec)


def _chunk(
    weights: mx.array, wanted: mx.array, metric: _Metric, spec: QuantSpec, dtype: mx.Dtype
) -> QuantizedArray:
    groups = _descend(wanted, _feed_back(wanted, metric, spec, dtype), metric, spec, dtype)
    plain = group_search(weights, spec, None, dtype)
    found = mx.concatenate([group.values for group in groups], axis=-1)
    better = metric.error(found - wanted) <= metric.error(plain.dequantize(mx.float32) - wanted)
    codes = mx.concatenate([group.codes for group in groups], axis=-1)
    scales, biases = (
        mx.concatenate(list(each), axis=-1)
        for each in zip(*((group.scale, group.bias) for group in groups), strict=True)
    )
    made = (pack(codes.astype(mx.uint8), spec), scales.astype(dtype), biases.astype(dtype))
    chosen = [mx.where(better, a, b) for a, b in zip(made, plain.arrays, strict=True)]
    mx.eval(chosen)
    return QuantizedArray(chosen[0], chosen[1], chosen[2], spec)


@dataclass(frozen=True, slots=True)
class _Group:
    """`codes` [B, rows, group], `scale` and `bias` [B, rows, 1]: float32 that are whole, or that `dtype` holds."""

    codes: mx.array
    scale: mx.array
    bias: mx.array

    @property
    def values(self) -> mx.array:
        return self.codes * self.scale + self.bias


def _nearest(x: mx.array, scale: mx.array, bias: mx.array, bits: int) -> mx.array:
    inverse = mx.where(scale == 0, 0.0, 1.0 / scale)
    return mx.clip(mx.round((x - bias) * inverse), 0, 2**bits - 1)


def _grid(part: mx.array, diagonal: mx.array, spec: QuantSpec, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Scale and bias [B, rows, 1] for one group of columns of every matrix, [B, rows, group]."""
    # the importance of `group_search` is one number per column: the matrices side by side
    batch, rows, group = part.shape
    beside = part.transpose(1, 0, 2).reshape(rows, batch * group)
    found = group_search(beside, spec, diagonal.reshape(-1), dtype)
    scale, bias = (a.astype(mx.float32).T[..., None] for a in found.arrays[1:])
    return scale, bias


def _feed_back(wanted: mx.array, metric: _Metric, spec: QuantSpec, dtype: mx.Dtype) -> list[_Group]:
    """Step 1."""
    rest, groups = wanted, []
    while rest.shape[-1]:
        start = wanted.shape[-1] - rest.shape[-1]
        stop = start + spec.group
        part = rest[..., : spec.group]
        scale, bias = _grid(part, metric.diagonal[:, start:stop], spec, dtype)
        upper = metric.upper[:, start:stop, start:]
        codes, errors = [], []
        for j in range(spec.group):
            x = part[..., :1]
            codes.append(_nearest(x, scale, bias, spec.bits))
            errors.append((x - (codes[-1] * scale + bias)) / upper[:, j : j + 1, j : j + 1])
            part = part[..., 1:] - errors[-1] * upper[:, j : j + 1, j + 1 : spec.group]
        rest = rest[..., spec.group :]
        if stop < wanted.shape[-1]:
            rest = rest - product(mx.concatenate(errors, axis=-1), mx.contiguous(upper[..., spec.group :]))
        groups.append(_Group(mx.concatenate(codes, axis=-1), scale, bias))
        mx.eval(rest, groups[-1].codes)
    return groups


def _descend(
    wanted: mx.array, groups: list[_Group], metric: _Metric, spec: QuantSpec, dtype: mx.Dtype
) -> list[_Group]:
    """Step 2."""
    groups = list(groups)
    for _ in range(ROUNDS):
        # minus half of the gradient of the error
        pull = product(wanted - mx.concatenate([g.values for g in groups], axis=-1), metric.damped)
        for number, old in enumerate(groups):
            start = number * spec.group
            stop = start + spec.group
            local = mx.contiguous(metric.damped[:, start:stop, start:stop])
            near, diagonal, before = pull[..., start:stop], metric.diagonal[:, start:stop], old.values
            codes = []
            for j in range(spec.group):
                value = before[..., j : j + 1]
                best = value + near[..., :1] / diagonal[:, None, j : j + 1]
                codes.append(_nearest(best, old.scale, old.bias, spec.bits))
                moved = codes[-1] * old.scale + old.bias - value
                near = near[..., 1:] - moved * local[:, j : j + 1, j + 1 :]
            new = _Group(mx.concatenate(codes, axis=-1), old.scale, old.bias)
            near = pull[..., start:stop] - product(new.values - before, local)
            groups[number] = new = _refit(new, near, local, spec, dtype)
            pull = pull - product(new.values - before, mx.contiguous(metric.damped[:, start:stop]))
            mx.eval(pull, new.codes, new.scale, new.bias)
    return groups


def _refit(group: _Group, pull: mx.array, local: mx.array, spec: QuantSpec, dtype: mx.Dtype) -> _Group:
    """The group with scale and bias fitted to its codes where that lowers the error; `pull` [B, rows, group] is minus
    half of its gradient, `local` [B, group, group] this part of H'."""
    middle = 2 ** (spec.bits - 1)
    c = group.codes - middle
    spread = product(c, local)
    cc = mx.sum(spread * c, axis=-1, keepdims=True)
    c1 = mx.sum(spread, axis=-1, keepdims=True)
    ones = mx.sum(local, axis=(-1, -2), keepdims=True)
    pull_c, pull_1 = mx.sum(pull * c, axis=-1, keepdims=True), mx.sum(pull, axis=-1, keepdims=True)
    determinant = cc * ones - c1 * c1
    sound = determinant > 1e-6 * cc * ones
    slope = mx.where(sound, (pull_c * ones - pull_1 * c1) / mx.where(sound, determinant, 1.0), 0.0)
    scale = _stored(group.scale + slope, dtype)
    by_scale = scale - group.scale
    level = (pull_1 - by_scale * c1) / ones
    # counted from the middle code, the bias is bias + scale · middle
    bias = _stored(group.bias - by_scale * middle + level, dtype)
    by_level = bias - group.bias + by_scale * middle
    gain = 2 * (by_scale * pull_c + by_level * pull_1) - (
        by_scale * by_scale * cc + 2 * by_scale * by_level * c1 + by_level * by_level * ones
    )
    return _Group(group.codes, mx.where(gain > 0, scale, group.scale), mx.where(gain > 0, bias, group.bias))


def _stored(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """What comes back of x when it is kept in `dtype`."""
    largest = float(mx.finfo(dtype).max)
    return mx.clip(x, -largest, largest).astype(dtype).astype(mx.float32)
