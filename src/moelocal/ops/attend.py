"""Causal softmax attention with grouped heads.

q [B, Hq, T, D]; k, v [B, Hkv, S, D] with S >= T, the last T of them the positions of q; query head h reads key-value
head h // (Hq / Hkv). `hidden` [B] counts leading positions of each row that are padding, or None.
-> [B, Hq, T, D] in the dtype of q. Scores and softmax in float32.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from moelocal.ops.host import borrow
from moelocal.ops.op import Op


def visible(queries: int, keys: int, hidden: mx.array | None) -> mx.array:
    """Which key each query sees: bool [T, S], or [B, 1, T, S] with padding. A padding query sees itself: it has to stay
    finite."""
    position = mx.arange(keys - queries, keys)[:, None]
    seen = position >= mx.arange(keys)
    if hidden is None:
        return seen
    padding = mx.arange(keys) < hidden[:, None, None, None]
    return (seen & ~padding) | (position == mx.arange(keys))


def reference(q: mx.array, k: mx.array, v: mx.array, scale: float, hidden: mx.array | None) -> mx.array:
    ratio = q.shape[1] // k.shape[1]
    keys, values = (mx.repeat(a.astype(mx.float32), ratio, axis=1) for a in (k, v))
    scores = q.astype(mx.float32) @ mx.swapaxes(keys, -1, -2) * scale
    scores = mx.where(visible(q.shape[2], k.shape[2], hidden), scores, -mx.inf)
    return (mx.softmax(scores, axis=-1, precise=True) @ values).astype(q.dtype)


def portable(q: mx.array, k: mx.array, v: mx.array, scale: float, hidden: mx.array | None) -> mx.array:
    mask: mx.array | str | None
    if hidden is not None:
        mask = visible(q.shape[2], k.shape[2], hidden)
    else:
        mask = "causal" if q.shape[2] > 1 else None
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


BLOCK = 256
"""Queries scored at once by the host form: the keys after the block are never multiplied."""


def host(q: mx.array, k: mx.array, v: mx.array, scale: float, hidden: mx.array | None) -> mx.array:
    mx.eval(q, k, v)
    batch, heads, queries, size = q.shape
    groups, keys = k.shape[1], k.shape[2]
    hq = borrow(q).reshape(batch, groups, heads // groups, queries, size)
    hk, hv = (borrow(a).reshape(batch, groups, 1, keys, size) for a in (k, v))
    out = np.empty_like(hq)
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        end = keys - queries + stop
        scores = np.matmul(hq[..., start:stop, :], hk[..., :end, :].swapaxes(-1, -2))
        scores *= scale
        scores[..., end - (stop - start) :][..., ~np.tri(stop - start, dtype=bool)] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        np.matmul(scores, hv[..., :end, :], out=out[..., start:stop, :])
        out[..., start:stop, :] /= total
    return mx.array(out.reshape(batch, heads, queries, size))


attend = Op(
    "attend",
    reference=reference,
    portable=portable,
    host=host,
    host_when=lambda q, k, v, scale, hidden: hidden is None and q.dtype == mx.float32 and q.shape[2] >= 32,
)
