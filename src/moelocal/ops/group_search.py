"""Scale, bias and codes for the groups of a matrix: affine quantization with the least weighted squared error found.

weights [..., rows, cols] float32, float16 or bfloat16, cols a multiple of `spec.group`; `spec` affine; importance
float32 [cols], finite and not negative, or None for all alike; dtype, in which scales and biases are stored
-> `QuantizedArray`. The error of a group is Σ importance · (w − (code · scale + bias))² with the stored scale and bias.

The candidates of a group, in this order; the first of equals wins:
  1. what `mx.quantize` takes (its rule on the CPU, which snaps to a step that represents zero), so no group gets worse;
  2. the same without its least step of 1e-7;
  3. from the best so far the low and the high edge of the codes moved by up to `REACH` steps, then half and a quarter
     of that, in eight directions;
2 and 3 as they are and after one and two least-squares refits of scale and bias to their codes.
Every candidate's scale and bias are rounded as they will be stored before codes and error are computed.

All forms give the same bits on every backend: the arithmetic is float32 in one stated order, sums halve (x[j] +
x[j + half], to the last), no product is fused with a sum, and a power of two per group keeps everything off the
subnormal numbers, which GPUs flush. So three things count as zero: weights below some 2^-26 of the largest of their
group, groups all below 2^-100, and importance below 2^-30 of the largest in its group. Where the importance of a whole
group is zero, its weights count alike. A NaN or infinite weight counts as zero too: who calls refuses it beforehand.
Scales and biases that `dtype` cannot hold become its largest finite number.
"""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.metal import Kernel
from moelocal.ops.op import Op

REACH: Final = {2: 0.75, 3: 0.75, 4: 0.75, 5: 0.75, 6: 1.0, 8: 3.0}
"""By bits, how many steps the edges first move; of those tried the ones with the least error on heavy-tailed weights
(at 8 bits a bfloat16 scale is so coarse that shorter moves round to nothing)."""

REFITS: Final = 2

CHUNK: Final = 1 << 20
"""Weights that the portable form searches at once; it holds some 15 arrays of that many float32."""

SIMDGROUPS: Final = 8
"""Groups that share a threadgroup; untuned on hardware."""

_LARGEST: Final = {dtype: float(mx.finfo(dtype).max) for dtype in (mx.float32, mx.float16, mx.bfloat16)}
_TINY: Final = 2.0**-24


@cache
def moves(bits: int) -> mx.array:
    """float32 [24, 2]: how the bias moves, in steps, and the factor of the step, for candidates around the best."""
    edges = ((1, -1), (-1, 1), (1, 0), (0, -1), (-1, 0), (0, 1), (1, 1), (-1, -1))  # low, high
    steps = [REACH[bits] * shorter for shorter in (1.0, 0.5, 0.25)]
    table = [(low * d, 1 + (high - low) * d / (2**bits - 1)) for d in steps for low, high in edges]
    return mx.array(table, mx.float32)


def _relative(importance: mx.array | None, cols: int, spec: QuantSpec) -> mx.array:
    """float32 [cols]: times a power of two per group, so that the largest is in [1, 4); small ones 0."""
    if importance is None:
        return mx.ones((cols,))
    groups = importance.astype(mx.float32).reshape(-1, spec.group)
    exponent = mx.max(groups, axis=1, keepdims=True).view(mx.uint32) >> 23
    scaled = groups * ((254 - mx.minimum(exponent, 253)) << 23).view(mx.float32)
    scaled = mx.where(scaled < 2.0**-30, 0.0, scaled)
    return mx.where(exponent < 37, 1.0, scaled).reshape(-1)  # below 2^-90: all zero


def pack(codes: mx.array, spec: QuantSpec) -> mx.array:
    """uint8 [..., cols] -> uint32 [..., cols·bits/32], the little-endian bit stream that MLX reads."""
    codes = codes.reshape(*codes.shape[:-1], -1, 32).astype(mx.uint32)
    words: list[mx.array] = [mx.zeros(codes.shape[:-1], mx.uint32)] * spec.bits
    for i in range(32):
        word, shift = divmod(i * spec.bits, 32)
        words[word] = words[word] | (codes[..., i] << shift)
        if shift + spec.bits > 32:
            words[word + 1] = words[word + 1] | (codes[..., i] >> (32 - shift))
    return mx.stack(words, axis=-1).reshape(*codes.shape[:-2], -1)


Floats = npt.NDArray[np.float32]


class _Group:
    """One group in NumPy, one candidate after the other."""

    def __init__(self, weights: Floats, importance: Floats, bits: int, dtype: mx.Dtype) -> None:
        self.last, self.middle, self.dtype = np.float32(2**bits - 1), np.float32(2 ** (bits - 1)), dtype
        finite: Floats = np.where(np.isfinite(weights), weights, np.float32(0))
        _, exponent = np.frexp(np.max(np.abs(finite)))  # largest = fraction in [1/2, 1) · 2^exponent
        if exponent < -99:
            finite, exponent = np.zeros_like(finite), np.int32(1)
        self.up, self.down = np.ldexp(np.float32(1), exponent - 2), np.ldexp(np.float32(1), 2 - exponent)
        self.w = np.where(np.abs(finite * self.down) < _TINY, np.float32(0), finite * self.down)
        self.importance = importance
        self.weight_sum, self.first_moment = self.total(importance), self.total(importance * self.w)
        self.best = (np.float32(np.inf), np.float32(0), np.float32(0))  # error, scale, bias

    @staticmethod
    def total(x: Floats) -> np.float32:
        while len(x) > 1:
            x = x[: len(x) // 2] + x[len(x) // 2 :]
        return np.float32(x[0])

    def stored(self, x: np.float32) -> np.float32:
        """What comes back of x, which is kept as x · up in `dtype`."""
        kept = np.float32(0) if abs(x) < _TINY else np.clip(x, np.float32(-64), np.float32(64))
        largest = np.float32(_LARGEST[self.dtype])
        with np.errstate(over="ignore"):
            held = mx.array(np.clip(kept * self.up, -largest, largest)).astype(self.dtype)
        return np.float32(np.array(held.astype(mx.float32)) * self.down)

    def codes(self, scale: np.float32, bias: np.float32) -> Floats:
        inverse = np.float32(0) if scale == 0 else np.float32(1) / scale
        nearest: Floats = np.clip(np.rint((self.w - bias) * inverse), np.float32(0), self.last)
        return nearest

    def place(self, scale: np.float32, bias: np.float32) -> Floats:
        """The nearest codes; keep the candidate if it is better than any before."""
        codes = self.codes(scale, bias)
        error = (self.w - bias) - codes * scale
        squares = self.total(error * error * self.importance)
        if squares < self.best[0]:
            self.best = (squares, scale, bias)
        return codes

    def refit(self, codes: Floats, scale: np.float32) -> tuple[np.float32, np.float32]:
        """Weighted least squares for the codes, counted from the middle one; then the bias for the stored scale."""
        c = codes - self.middle
        weighted = self.importance * c
        sum_c, sum_cc, sum_cw = self.total(weighted), self.total(weighted * c), self.total(weighted * self.w)
        spread = self.weight_sum * sum_cc - sum_c * sum_c
        slope = self.weight_sum * sum_cw - sum_c * self.first_moment
        if spread > 0:
            scale = self.stored(slope / spread)
        mean = (self.first_moment - scale * sum_c) / self.weight_sum
        return scale, self.stored(mean - scale * self.middle)

    def try_from(self, scale: np.float32, bias: np.float32) -> None:
        codes = self.place(scale, bias)
        for _ in range(REFITS):
            scale, bias = self.refit(codes, scale)
            codes = self.place(scale, bias)

    def min_max(self, least: np.float32) -> tuple[np.float32, np.float32]:
        """Scale and bias by the rule of `mx.quantize`, for which a step is at least 1e-7."""
        low, high = self.w.min(), self.w.max()
        step = max((high - low) / self.last, least)
        edge, scale = (low, step) if abs(low) > abs(high) else (high, -step)
        code_of_zero = np.rint(edge / scale)
        if code_of_zero == 0:
            return self.stored(scale), np.float32(0)
        return self.stored(edge / code_of_zero), self.stored(edge)

    def search(self, table: Floats) -> tuple[Floats, np.float32, np.float32]:
        """Codes, scale and bias."""
        self.place(*self.min_max(np.float32(1e-7) * self.down))
        self.try_from(*self.min_max(np.float32(_TINY)))
        for shift, factor in table:
            _, scale, bias = self.best
            self.try_from(self.stored(scale * factor), self.stored(bias + scale * shift))
        _, scale, bias = self.best
        return self.codes(scale, bias), scale * self.up, bias * self.up


def reference(
    weights: mx.array, spec: QuantSpec, importance: mx.array | None, dtype: mx.Dtype
) -> QuantizedArray:
    cols = weights.shape[-1]
    groups = np.array(weights.astype(mx.float32)).reshape(-1, spec.group)
    relative = np.array(_relative(importance, cols, spec)).reshape(-1, spec.group)
    table = np.array(moves(spec.bits))
    found = [
        _Group(w, relative[i % len(relative)], spec.bits, dtype).search(table) for i, w in enumerate(groups)
    ]
    lead, per_row = weights.shape[:-1], cols // spec.group
    codes = mx.array(np.array([codes for codes, _, _ in found])).astype(mx.uint8).reshape(weights.shape)
    scales, biases = (
        mx.array(np.array([group[i] for group in found])).astype(dtype).reshape(*lead, per_row)
        for i in (1, 2)
    )
    return QuantizedArray(pack(codes, spec), scales, biases, spec)


class _Best(NamedTuple):
    """The best so far of every group, each array [1, ...]."""

    squares: mx.array
    scale: mx.array
    bias: mx.array


class _Groups(NamedTuple):
    """Many groups in MLX: the weights of a group along axis 0, one group each in what has a leading axis of 1."""

    w: mx.array
    importance: mx.array
    weight_sum: mx.array
    first_moment: mx.array
    up: mx.array
    down: mx.array
    bits: int
    dtype: mx.Dtype

    @classmethod
    def of(cls, weights: mx.array, importance: mx.array, bits: int, dtype: mx.Dtype) -> _Groups:
        magnitude = weights.view(mx.uint32) & 0x7FFFFFFF
        finite = magnitude < 0x7F800000
        top = mx.max(mx.where(finite, magnitude, 0), axis=0, keepdims=True) >> 23
        nothing = top < 27
        top = mx.where(nothing, 127, top)
        up, down = ((top - 1) << 23).view(mx.float32), ((255 - top) << 23).view(mx.float32)
        w = weights * down
        w = mx.where(mx.logical_or(nothing, mx.logical_not(finite)) | (mx.abs(w) < _TINY), 0.0, w)
        return cls(w, importance, _total(importance), _total(importance * w), up, down, bits, dtype)

    def stored(self, x: mx.array) -> mx.array:
        kept = mx.where(mx.abs(x) < _TINY, 0.0, mx.clip(x, -64.0, 64.0))
        largest = _LARGEST[self.dtype]
        return mx.clip(kept * self.up, -largest, largest).astype(self.dtype).astype(mx.float32) * self.down

    def codes(self, scale: mx.array, offset: mx.array) -> mx.array:
        inverse = mx.where(scale == 0, 0.0, 1.0 / scale)
        return mx.clip(mx.round(offset * inverse), 0, 2**self.bits - 1)

    def place(self, best: _Best, scale: mx.array, bias: mx.array) -> tuple[_Best, mx.array]:
        """The better of two, and the codes of the new one."""
        offset = self.w - bias
        codes = self.codes(scale, offset)
        error = offset - codes * scale
        new = _Best(_total(error * error * self.importance), scale, bias)
        better = new.squares < best.squares
        return _Best(*(mx.where(better, a, b) for a, b in zip(new, best, strict=True))), codes

    def refit(self, codes: mx.array, scale: mx.array) -> tuple[mx.array, mx.array]:
        c = codes - 2 ** (self.bits - 1)
        weighted = self.importance * c
        sum_c, sum_cc, sum_cw = _total(weighted), _total(weighted * c), _total(weighted * self.w)
        spread = self.weight_sum * sum_cc - sum_c * sum_c
        slope = self.weight_sum * sum_cw - sum_c * self.first_moment
        scale = mx.where(spread > 0, self.stored(slope / spread), scale)
        mean = (self.first_moment - scale * sum_c) / self.weight_sum
        return scale, self.stored(mean - scale * 2 ** (self.bits - 1))

    def try_from(self, best: _Best, scale: mx.array, bias: mx.array) -> _Best:
        best, codes = self.place(best, scale, bias)
        for _ in range(REFITS):
            scale, bias = self.refit(codes, scale)
            best, codes = self.place(best, scale, bias)
        return best

    def min_max(self, least: mx.array) -> tuple[mx.array, mx.array]:
        low, high = mx.min(self.w, axis=0, keepdims=True), mx.max(self.w, axis=0, keepdims=True)
        step = mx.maximum((high - low) / (2**self.bits - 1), least)
        from_low = mx.abs(low) > mx.abs(high)
        edge, scale = mx.where(from_low, low, high), mx.where(from_low, step, -step)
        code_of_zero = mx.round(edge / scale)
        snapped = code_of_zero != 0
        scale = self.stored(mx.where(snapped, edge / code_of_zero, scale))
        return scale, self.stored(mx.where(snapped, edge, 0.0))


def _total(x: mx.array) -> mx.array:
    """The sum along axis 0, which stays with length 1."""
    while x.shape[0] > 1:
        x = x[: x.shape[0] // 2] + x[x.shape[0] // 2 :]
    return x


def _search(groups: _Groups) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scale and bias."""
    scale, bias = groups.min_max(1e-7 * groups.down)
    best, _ = groups.place(_Best(mx.array(float("inf")), scale, bias), scale, bias)
    best = groups.try_from(best, *groups.min_max(mx.array(_TINY)))
    for shift, factor in np.array(moves(groups.bits)):
        scale, bias = groups.stored(best.scale * factor), groups.stored(best.bias + best.scale * shift)
        best = groups.try_from(best, scale, bias)
    _, scale, bias = best
    return groups.codes(scale, groups.w - bias), scale * groups.up, bias * groups.up


def portable(
    weights: mx.array, spec: QuantSpec, importance: mx.array | None, dtype: mx.Dtype
) -> QuantizedArray:
    """Evaluates `CHUNK` weights at a time."""
    lead, cols = weights.shape[:-1], weights.shape[-1]
    per_row = cols // spec.group
    matrix = weights.reshape(-1, per_row, spec.group)
    relative = _relative(importance, cols, spec).reshape(1, per_row, spec.group).transpose(2, 0, 1)
    rows, parts = max(1, CHUNK // cols), []
    for start in range(0, matrix.shape[0], rows):
        chunk = mx.contiguous(matrix[start : start + rows].astype(mx.float32).transpose(2, 0, 1))
        codes, scale, bias = _search(_Groups.of(chunk, relative, spec.bits, dtype))
        words = pack(codes.astype(mx.uint8).transpose(1, 2, 0).reshape(-1, cols), spec)
        parts.append((words, scale[0].astype(dtype), bias[0].astype(dtype)))
        mx.eval(parts[-1])
    words, scales, biases = (
        mx.concatenate(list(part)).reshape(*lead, -1) for part in zip(*parts, strict=True)
    )
    return QuantizedArray(words, scales, biases, spec)


GROUP_SEARCH: Final = Kernel(
    name="group_search",
    file="group_search",
    inputs=("weights", "importance", "moves", "zero"),
    outputs=("words", "scales", "biases"),
    call="""group_search<T, S, BITS, GROUP>(weights, importance, moves, zero, words, scales, biases,
    importance_shape[0], moves_shape[0], thread_position_in_grid.x / 32, thread_index_in_simdgroup);""",
)


def metal(weights: mx.array, spec: QuantSpec, importance: mx.array | None, dtype: mx.Dtype) -> QuantizedArray:
    lead, cols = weights.shape[:-1], weights.shape[-1]
    stored = (*lead, cols // spec.group)
    words, scales, biases = GROUP_SEARCH(
        [weights, _relative(importance, cols, spec), moves(spec.bits), mx.array(0, mx.uint32)],
        shapes=[(*lead, cols * spec.bits // 32), stored, stored],
        dtypes=[mx.uint32, dtype, dtype],
        grid=(weights.size // spec.group * 32, 1, 1),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        template={"T": weights.dtype, "S": dtype, "BITS": spec.bits, "GROUP": spec.group},
    )
    return QuantizedArray(words, scales, biases, spec)


def supports(weights: mx.array, spec: QuantSpec, importance: mx.array | None, dtype: mx.Dtype) -> bool:
    floats = weights.dtype in _LARGEST and dtype in _LARGEST
    whole = spec.mode == "affine" and weights.shape[-1] % spec.group == 0
    return (
        floats and whole and 0 < weights.size // spec.group < 1 << 26
    )  # 2^31 threads: MLX counts them in an int


group_search = Op("group_search", reference=reference, portable=portable, metal=metal, supports=supports)
