"""The cache of one attention layer: what goes in comes out, wherever the buffer grows."""

from __future__ import annotations

import mlx.core as mx
import pytest

from moelocal.cache.layers import STEP, AttentionCache


@pytest.mark.parametrize(
    "sizes", [[1, 1, 1], [STEP, 1], [STEP - 1, 1, 1], [3 * STEP + 7, STEP, 2], [5, STEP, 600]]
)
def test_keys_and_values_come_back_in_order(sizes: list[int]):
    cache, batch = AttentionCache(), 2
    parts = [mx.random.normal((2 * batch, 3, size, 8)) for size in sizes]
    for count in range(1, len(parts) + 1):
        held = cache.append(parts[count - 1])[:, :, : cache.length]
        assert mx.array_equal(held, mx.concatenate(parts[:count], axis=2))
    (buffer,) = cache.arrays
    assert cache.length == sum(sizes) <= buffer.shape[2] < sum(sizes) + STEP


def test_what_was_handed_out_stays_what_it_was():
    cache = AttentionCache()
    first = mx.random.normal((2, 1, 5, 8))
    held = cache.append(first)[:, :, : cache.length]
    cache.length = 3  # going back is forgetting a length
    later = cache.append(mx.random.normal((2, 1, 2, 8)))[:, :, : cache.length]
    assert mx.array_equal(held, first)
    assert mx.array_equal(later[:, :, :3], first[:, :, :3])
    assert not mx.any(later[:, :, 3:] == first[:, :, 3:]).item()


def test_an_empty_cache_holds_nothing():
    assert AttentionCache().arrays == []
