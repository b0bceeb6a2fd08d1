"""From the projections of an attention layer to rotated queries and what its cache stores.

q [B, T, Hq·D], or per head [q D | gate D] where gated; k, v [B, T, Hkv·D], slices of one projection's output.
    q, k = rope(rms_norm(q)), rope(rms_norm(k)), half-split pairs of the first R elements of each head
-> q [B, Hq, T, D] and, for one write into the cache, [2·B, Hkv, T, D]: the keys of all rows, then their values.
Token t stands at position `offset` + t, an int, or int32 [] or [B]. Float32 through norm and rotation, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import mlx.core as mx

from moelocal.config import AttentionSpec
from moelocal.metal import Kernel
from moelocal.ops import choice, norm
from moelocal.ops.op import Op


@dataclass(frozen=True, slots=True)
class PrologueWeights:
    """Float32 norms [D] with the + 1 of the checkpoints that store w − 1, and with YaRN's attention factor;
    `frequencies` [R/2] in radians per position; `periods`, one over them, as MLX's rope takes them."""

    spec: AttentionSpec
    eps: float
    q_norm: mx.array
    k_norm: mx.array
    frequencies: mx.array
    periods: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        return [self.q_norm, self.k_norm, self.frequencies, self.periods]


Result = tuple[mx.array, mx.array]


def _heads(q: mx.array, k: mx.array, v: mx.array, spec: AttentionSpec) -> tuple[mx.array, mx.array, mx.array]:
    """q [B, T, Hq, D] without its gate, k and v [B, T, Hkv, D]."""
    lead = q.shape[:2]
    return (
        q.reshape(*lead, spec.heads, -1)[..., : spec.head_dim],
        k.reshape(*lead, spec.kv_heads, spec.head_dim),
        v.reshape(*lead, spec.kv_heads, spec.head_dim),
    )


def rotate(x: mx.array, offset: int | mx.array, frequencies: mx.array) -> mx.array:
    """Rotary embedding of x [B, H, T, D] in float32: pair (j, j + R/2) turns by position · frequency j."""
    half = frequencies.shape[0]
    position = mx.array(offset)[..., None] + mx.arange(x.shape[2])  # [T] or [B, T]
    angle = position[..., None].astype(mx.float32) * frequencies
    if angle.ndim == 3:
        angle = angle[:, None]
    c, s = mx.cos(angle), mx.sin(angle)
    first, second, rest = mx.split(x, [half, 2 * half], axis=-1)
    return mx.concatenate([first * c - second * s, first * s + second * c, rest], axis=-1)


def reference(
    q: mx.array, k: mx.array, v: mx.array, offset: int | mx.array, weights: PrologueWeights
) -> Result:
    def turned(x: mx.array, scale: mx.array) -> mx.array:
        normed = norm.reference(x.astype(mx.float32), scale, weights.eps)
        return rotate(normed.swapaxes(1, 2), offset, weights.frequencies).astype(x.dtype)

    q, k, v = _heads(q, k, v, weights.spec)
    stored = [turned(k, weights.k_norm), v.swapaxes(1, 2)]
    return turned(q, weights.q_norm), mx.concatenate(stored)


def portable(
    q: mx.array, k: mx.array, v: mx.array, offset: int | mx.array, weights: PrologueWeights
) -> Result:
    def turned(x: mx.array, scale: mx.array) -> mx.array:
        """Float32, as the norm with a float32 weight is."""
        normed = mx.fast.rms_norm(x, scale, weights.eps).swapaxes(1, 2)
        dims, periods = weights.spec.rotary_dim, weights.periods
        return mx.fast.rope(
            normed, dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=periods
        )

    dtype = q.dtype
    q, k, v = _heads(q, k, v, weights.spec)
    # where it is compiled one kernel with the rounding of the keys; a concatenation would be two more
    keys_first = mx.array([True, False]).reshape(2, 1, 1, 1, 1)
    stored = mx.where(keys_first, turned(k, weights.k_norm)[None], v.swapaxes(1, 2)[None]).astype(dtype)
    return turned(q, weights.q_norm).astype(dtype), stored.reshape(-1, *stored.shape[2:])


SIMDGROUPS: Final = 4
"""Heads per threadgroup. Not tuned on hardware yet."""

PROLOGUE = Kernel(
    name="prologue",
    file="prologue",
    inputs=("q", "k", "v", "q_norm", "k_norm", "frequencies", "offset", "eps"),
    outputs=("rotated", "stored"),
    call="""prologue<T, D, R, GATED>(q, k, v, q_norm, k_norm, frequencies, offset, rotated, stored,
    q_strides, k_strides, v_strides, q_shape[0], q_shape[1], offset_shape[0], q_shape[2] / (GATED ? 2 * D : D),
    k_shape[2] / D, eps,
    thread_position_in_grid.x / 32, thread_position_in_grid.y, thread_position_in_grid.z,
    thread_index_in_simdgroup);""",
    strided=True,
)


def metal(q: mx.array, k: mx.array, v: mx.array, offset: int | mx.array, weights: PrologueWeights) -> Result:
    spec, (batch, time, _) = weights.spec, q.shape
    offsets = offset.reshape(-1) if isinstance(offset, mx.array) else mx.array([offset])
    heads = spec.heads + 2 * spec.kv_heads
    rotated, stored = PROLOGUE(
        [q, k, v, weights.q_norm, weights.k_norm, weights.frequencies, offsets, mx.array(weights.eps)],
        shapes=[
            (batch, spec.heads, time, spec.head_dim),
            (2 * batch, spec.kv_heads, time, spec.head_dim),
        ],
        dtypes=[q.dtype, q.dtype],
        grid=(32 * heads, time, batch),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        template={"T": q.dtype, "D": spec.head_dim, "R": spec.rotary_dim, "GATED": spec.gated},
    )
    return rotated, stored


def supports(q: mx.array, k: mx.array, v: mx.array, offset: int | mx.array, weights: PrologueWeights) -> bool:
    return (
        q.size > 0
        and weights.spec.head_dim >= 8
        and q.dtype == k.dtype == v.dtype
        and (isinstance(offset, int) or offset.dtype == mx.int32)
    )


prologue = Op(
    "prologue",
    reference=reference,
    portable=portable,
    metal=metal,
    supports=supports,
    # a position is no part of the choice
    key=lambda q, k, v, offset, weights: choice.shapes(q, k, v, weights),
)
