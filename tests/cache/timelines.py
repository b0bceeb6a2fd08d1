"""Timelines without a model: every byte a layer holds is made of all the tokens before it, as in a real one."""

from __future__ import annotations

import gc
import sys
import zlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from moelocal.cache import AttentionCache, Cache, RecurrentCache
from moelocal.cache.layers import copy

KINDS = "rara"
HEADS, SIZE, PACKED = 2, 8, 64
"""`PACKED`: the size of heads that are kept as codes"""
CONV, STATE = (1, 3, 16), (1, 2, 4, 8)


def _digests(tokens: Sequence[int]) -> np.ndarray:
    """One number per position, made of all tokens up to it: uint32 [T]."""
    found, digest = [], 0
    for token in tokens:
        digest = zlib.crc32(int(token).to_bytes(4, "little"), digest)
        found.append(digest)
    return np.array(found, np.uint32)


def _spread(digests: np.ndarray, count: int, salt: int) -> mx.array:
    """`count` different 16-bit numbers per digest: float32 [T, count]."""
    factors = np.arange(1, 2 * count, 2, dtype=np.uint32) * np.uint32(2654435761) + np.uint32(2 * salt)
    return mx.array(((digests[:, None] * factors) >> 16).astype(np.float32) - 32768)


def made(tokens: Sequence[int], chunk: int = 300) -> Cache:
    """The timeline of `tokens`: attention in bfloat16, conv in float16, states in float32."""
    cache = empty(KINDS)
    extend(cache, (), tokens, chunk)
    return cache


def empty(kinds: str) -> Cache:
    """Without a token; a letter for each layer, as in `Snapshot.layers`."""
    layers = {
        "r": RecurrentCache,
        "a": AttentionCache,
        "8": lambda: AttentionCache(8),
        "4": lambda: AttentionCache(4),
    }
    return Cache.of([layers[kind]() for kind in kinds], ())


def extend(cache: Cache, before: Sequence[int], more: Sequence[int], chunk: int = 300) -> None:
    """Go on from `before`, which `cache` holds, with `more`."""
    assert cache.position == len(before)
    tokens = [*before, *more]
    digests = _digests(tokens)
    for start in range(len(before), len(tokens), chunk):
        stop = min(start + chunk, len(tokens))
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, AttentionCache):
                size = SIZE if layer.bits is None else PACKED
                rows = _spread(digests[start:stop], 2 * HEADS * size, index)
                stored = rows.reshape(stop - start, 2, HEADS, size).transpose(1, 2, 0, 3)
                layer.append(stored.astype(mx.bfloat16))
            else:
                last = digests[stop - 1 : stop]
                layer.conv = _spread(last, 48, index).reshape(CONV).astype(mx.float16)
                if stop - start > 1:  # as in a model: the last of the rows of the whole chunk
                    rows = mx.concatenate([mx.zeros((1, 2048, CONV[2]), mx.float16), layer.conv], axis=1)
                    layer.conv = mx.contiguous(rows[:, 2048:])
                layer.state = _spread(last, 64, index + 9).reshape(STATE)
        cache.advance(stop - start)
        mx.eval(cache.arrays)


def held(cache: Cache) -> list[mx.array]:
    """All that a timeline is, without the reserve of its buffers."""
    return [
        part
        for layer in cache.layers
        for part in (
            layer.part(0, cache.position)
            if isinstance(layer, AttentionCache) and layer.length
            else layer.arrays
        )
    ]


def same(first: Cache, second: Cache) -> bool:
    """Whether two timelines hold the same bits at the same position, with room for as much."""
    if first.position != second.position or len(first.layers) != len(second.layers):
        return False
    lengths = [[x.length for x in c.layers if isinstance(x, AttentionCache)] for c in (first, second)]
    shapes = [[a.shape for a in c.arrays] for c in (first, second)]
    if lengths[0] != lengths[1] or shapes[0] != shapes[1]:
        return False
    return all(
        a.dtype == b.dtype and mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)).item()
        for a, b in zip(map(copy, held(first)), map(copy, held(second)), strict=True)
    )


def active() -> int:
    """Bytes that MLX holds for live arrays."""
    mx.synchronize()
    return mx.get_active_memory()


def live_arrays() -> int:
    """Array objects that Python holds: each refers to its type."""
    gc.collect()
    return sys.getrefcount(mx.array)
