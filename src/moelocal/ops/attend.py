"""Causal softmax attention with grouped heads and, where there is one, an output gate.

q [B, Hq, T, D]; k, v [B, Hkv, S, D] with S >= T, the last T of them the positions of q, their last axis dense; query
head h reads key-value head h // (Hq / Hkv). `hidden` [B] counts leading positions of each row that are padding, or
None; `gate` [B, T, Hq, D] or None. With `length`, int32 [], only so many of the S keys exist (the others are finite),
and q stands at the last of those: a compiled step then keeps its shapes while a context grows.
    y = softmax(q kᵀ · scale) v ⊙ σ(gate)
-> [B, T, Hq·D], as the output projection reads it, in the dtype of q. Scores, softmax and gate in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import mlx.core as mx
import numpy as np

from moelocal.metal import Kernel
from moelocal.ops import choice
from moelocal.ops.host import borrow
from moelocal.ops.op import Op, on_cpu


def visible(queries: int, keys: int, hidden: mx.array | None, length: mx.array | None = None) -> mx.array:
    """Which key each query sees: bool [T, S], or [B, 1, T, S] with padding. A padding query sees itself: it has to stay
    finite."""
    position = (mx.arange(-queries, 0) + (keys if length is None else length))[:, None]
    seen = position >= mx.arange(keys)
    if hidden is None:
        return seen
    padding = mx.arange(keys) < hidden[:, None, None, None]
    return (seen & ~padding) | (position == mx.arange(keys))


def reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    hidden: mx.array | None,
    gate: mx.array | None,
    length: mx.array | None = None,
) -> mx.array:
    batch, time, ratio = q.shape[0], q.shape[2], q.shape[1] // k.shape[1]
    keys, values = (mx.repeat(a.astype(mx.float32), ratio, axis=1) for a in (k, v))
    scores = q.astype(mx.float32) @ mx.swapaxes(keys, -1, -2) * scale
    scores = mx.where(visible(time, k.shape[2], hidden, length), scores, -mx.inf)
    y = (mx.softmax(scores, axis=-1, precise=True) @ values).swapaxes(1, 2)
    if gate is not None:
        y = y * mx.sigmoid(gate.astype(mx.float32))
    return y.reshape(batch, time, -1).astype(q.dtype)


BLOCK: Final = 256
"""Queries scored at once where scores are stored: their memory grows with this times the keys, and the keys after the
block are never multiplied."""

FUSED: Final = (64, 72, 80, 96, 128)
"""Sizes of a head at which MLX's Metal kernels attend to many queries without storing scores. At 192 and 256 it has
such kernels and takes them for none of our shapes (mlx/backend/metal/scaled_dot_product_attention.cpp)."""


def fused(size: int) -> bool:
    """Whether many queries of heads of this size are attended to without storing scores."""
    return size in FUSED and not on_cpu()


def portable(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    hidden: mx.array | None,
    gate: mx.array | None,
    length: mx.array | None = None,
) -> mx.array:
    batch, _, time, size = q.shape
    keys = k.shape[2]
    mask: mx.array | str | None
    if hidden is not None or length is not None:
        mask = visible(time, keys, hidden, length)
    else:
        mask = "causal" if time > 1 else None
    parts = [(0, time)]
    if mask == "causal" and not fused(size):
        parts = [(start, min(start + BLOCK, time)) for start in range(0, time, BLOCK)]
    y = mx.concatenate(
        [
            mx.fast.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, : keys - time + stop],
                v[:, :, : keys - time + stop],
                scale=scale,
                mask=mask,
            )
            for start, stop in parts
        ],
        axis=2,
    ).swapaxes(1, 2)
    if gate is not None:
        y = _gated(y, gate)
    return y.reshape(batch, time, -1)


@mx.compile
def _gated(y: mx.array, gate: mx.array) -> mx.array:
    return (y.astype(mx.float32) * mx.sigmoid(gate.astype(mx.float32))).astype(y.dtype)


def host(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    hidden: mx.array | None,
    gate: mx.array | None,
    length: mx.array | None = None,
) -> mx.array:
    mx.eval(q, k, v, gate)
    batch, heads, queries, size = q.shape
    groups, keys = k.shape[1], k.shape[2]
    hq = borrow(q).reshape(batch, groups, heads // groups, queries, size)
    hk, hv = (borrow(a).reshape(batch, groups, 1, keys, size) for a in (k, v))
    y = np.empty((batch, queries, heads, size), np.float32)
    by_group = y.reshape(batch, queries, groups, -1, size).transpose(0, 2, 3, 1, 4)
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        end = keys - queries + stop
        scores = np.matmul(hq[..., start:stop, :], hk[..., :end, :].swapaxes(-1, -2))
        scores *= scale
        scores[..., end - (stop - start) :][..., ~np.tri(stop - start, dtype=bool)] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        by_group[..., start:stop, :] = np.matmul(scores, hv[..., :end, :]) / total
    if gate is not None:
        y *= 0.5 * np.tanh(0.5 * borrow(gate)) + 0.5  # no overflow
    return mx.array(y.reshape(batch, queries, heads * size))


ROWS: Final = 16
"""Most query rows (heads of a group, times positions) that share one reading of keys and values."""
TILE: Final = 64
"""Keys scored before the sum over their values."""
COLUMNS: Final = 2
"""Columns of the values per thread, where D allows it: 32 · COLUMNS of them per simdgroup."""
THREADGROUPS: Final = 256
"""Threadgroups wanted at least: a long cache is cut into blocks until there are so many."""
COMBINING: Final = 8
"""Simdgroups that add up the blocks of one row. Like the four above not tuned on hardware yet."""


def blocks_kernel(name: str, file: str, k: str, v: str, inputs: tuple[str, ...]) -> Kernel:
    """The first pass over keys and values that `k` and `v` read, in Metal, from arrays called `inputs`; one of them is
    called k and has a row for each key."""
    return Kernel(
        name=name,
        file=file,
        inputs=("q", *inputs, "length", "scale"),
        outputs=("partial", "stats"),
        call=f"""threadgroup T queries[ROWS * D];
threadgroup float weights[TILE * ROWS];
threadgroup float factors[ROWS];
attend_block<T, D, ROWS, TILE, SIMDGROUPS>(q, {k}, {v}, partial, stats, queries, weights, factors, q_strides,
    q_shape[1], q_shape[2], k_shape[1], length, scale, threadgroup_position_in_grid.x, threadgroups_per_grid.x,
    threadgroup_position_in_grid.y, threadgroup_position_in_grid.z, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);""",
        strided=True,
    )


BLOCKS = blocks_kernel(
    "attend_block", "attend", "plain_rows(k, k_strides)", "plain_rows(v, v_strides)", ("k", "v")
)

COMBINE = Kernel(
    name="attend_combine",
    file="attend",
    inputs=("partial", "stats", "gate"),
    outputs=("out",),
    call="""threadgroup float shared[SIMDGROUPS * D];
attend_combine<T, D, SIMDGROUPS, GATED>(partial, stats, gate, out, shared, gate_strides, partial_shape[1],
    partial_shape[2], partial_shape[3], threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);""",
    strided=True,
)


def in_blocks(
    kernel: Kernel,
    template: Mapping[str, int],
    q: mx.array,
    kept: Sequence[mx.array],
    scale: float,
    gate: mx.array | None,
    length: mx.array | None,
) -> mx.array:
    """Both passes. `kept`: [B, Hkv, S, ·], from which `kernel` with this `template` reads keys and values."""
    batch, heads, time, size = q.shape
    groups, keys = kept[0].shape[1:3]
    rows = min(ROWS, _power_of_two(heads // groups * time))
    shares = groups * -(-heads // groups * time // rows)
    blocks = _blocks(keys, shares * batch)
    simdgroups = size // 32 // (COLUMNS if size % (32 * COLUMNS) == 0 else 1)
    partial, stats = kernel(
        [q, *kept, mx.array(keys) if length is None else length, mx.array(scale)],
        shapes=[(batch, heads, time, blocks, size), (batch, heads, time, blocks, 2)],
        dtypes=[mx.float32, mx.float32],
        grid=(blocks * simdgroups * 32, shares, batch),
        threadgroup=(simdgroups * 32, 1, 1),
        template={"T": q.dtype, "D": size, "ROWS": rows, "TILE": TILE, "SIMDGROUPS": simdgroups, **template},
    )
    (y,) = COMBINE(
        [partial, stats, q if gate is None else gate],  # q stands in for a gate that is not read
        shapes=[(batch, time, heads * size)],
        dtypes=[q.dtype],
        grid=(batch * heads * time * COMBINING * 32, 1, 1),
        threadgroup=(COMBINING * 32, 1, 1),
        template={"T": q.dtype, "D": size, "SIMDGROUPS": COMBINING, "GATED": gate is not None},
    )
    return y


def metal(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    hidden: mx.array | None,
    gate: mx.array | None,
    length: mx.array | None = None,
) -> mx.array:
    return in_blocks(BLOCKS, {}, q, (k, v), scale, gate, length)


def _power_of_two(count: int) -> int:
    """The smallest that is at least `count`."""
    return 1 << (count - 1).bit_length()


def _blocks(keys: int, shares: int) -> int:
    """Into how many blocks of whole tiles the keys are cut."""
    tiles = -(-keys // TILE)
    each = -(-tiles // -(-THREADGROUPS // shares))
    return -(-tiles // each)


MOST_QUERIES: Final = 8
"""Positions up to which the kernel is meant: one token, or a few that speculation put forward."""


def fits(q: mx.array, kv_heads: int, hidden: mx.array | None, gate: mx.array | None) -> bool:
    """Whether the kernel takes these queries, however keys and values are kept."""
    return (
        hidden is None
        and 0 < q.shape[2] <= MOST_QUERIES
        and q.shape[3] % 32 == 0
        and q.shape[3] <= 256
        and q.shape[1] % kv_heads == 0
        and (gate is None or gate.dtype == q.dtype)
    )


def supports(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    hidden: mx.array | None,
    gate: mx.array | None,
    length: mx.array | None = None,
) -> bool:
    return (
        fits(q, k.shape[1], hidden, gate)
        and q.shape[3] == k.shape[3]
        and k.shape == v.shape
        and q.dtype == k.dtype == v.dtype
    )


attend = Op(
    "attend",
    reference=reference,
    portable=portable,
    host=host,
    host_when=lambda q, k, v, scale, hidden, gate, length=None: (
        hidden is None and length is None and q.dtype == mx.float32 and q.shape[2] > 1
    ),
    metal=metal,
    supports=supports,
    # a context grows by a key with every token
    key=lambda q, k, v, scale, hidden, gate, length=None: (
        choice.shapes(q, gate),
        k.shape[1],
        choice.size_class(k.shape[2]),
    ),
)
