"""The cache of one attention layer: what goes in comes out, wherever the buffer grows."""

from __future__ import annotations

import mlx.core as mx
import pytest

from moelocal.cache.layers import STEP, AttentionCache, kv_nbytes
from moelocal.config import AttentionSpec
from moelocal.errors import ConfigError


@pytest.mark.parametrize(
    "sizes", [[1, 1, 1], [STEP, 1], [STEP - 1, 1, 1], [3 * STEP + 7, STEP, 2], [5, STEP, 600]]
)
def test_keys_and_values_come_back_in_order(sizes: list[int]):
    cache, batch = AttentionCache(), 2
    parts = [mx.random.normal((2 * batch, 3, size, 8)) for size in sizes]
    for count in range(1, len(parts) + 1):
        cache.append(parts[count - 1])
        (held,) = cache.part(0, cache.length)
        assert mx.array_equal(held, mx.concatenate(parts[:count], axis=2))
    (buffer,) = cache.arrays
    assert cache.length == sum(sizes) <= buffer.shape[2] < sum(sizes) + STEP


def test_what_was_handed_out_stays_what_it_was():
    cache = AttentionCache()
    first = mx.random.normal((2, 1, 5, 8))
    cache.append(first)
    (held,) = cache.part(0, 5)
    cache.length = 3  # going back is forgetting a length
    cache.append(mx.random.normal((2, 1, 2, 8)))
    (later,) = cache.part(0, 5)
    assert mx.array_equal(held, first)
    assert mx.array_equal(later[:, :, :3], first[:, :, :3])
    assert not mx.any(later[:, :, 3:] == first[:, :, 3:]).item()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("size", "group"), [(64, 64), (96, 32), (256, 64)])
def test_codes_stand_for_what_was_stored_to_half_a_step(bits: int, size: int, group: int):
    cache, batch = AttentionCache(bits), 2
    parts = [mx.random.normal((2 * batch, 3, count, size)) for count in (1, STEP + 5, 40)]
    for part in parts:
        cache.append(part)
    stored = mx.concatenate(parts, axis=2)
    kept = cache.part(0, cache.length)
    assert [a.shape[-1] for a in kept] == [size * bits // 32, size // group, size // group]
    groups = stored.reshape(*stored.shape[:-1], -1, group)
    step = (groups.max(axis=-1) - groups.min(axis=-1)) / (2**bits - 1)
    back = mx.dequantize(*kept, group_size=group, bits=bits).reshape(groups.shape)
    # an edge of the group is moved so that zero is a code, by at most half a step: one whole step at the far end
    assert mx.all(mx.abs(back - groups) <= 1.01 * step[..., None]).item()
    assert (
        mx.mean(mx.abs(back - groups) / step[..., None]).item() < 0.3
    )  # a quarter for errors that are uniform
    spec = AttentionSpec(6, 3, size, 2, 1e4, False)
    reserve = sum(buffer[:, :, cache.length :].nbytes for buffer in cache.buffers)
    assert sum(a.nbytes for a in cache.arrays) - reserve == batch * cache.length * kv_nbytes(spec, 4, bits)


def test_a_head_that_has_no_groups_is_refused():
    with pytest.raises(ConfigError, match="heads of 80 elements do not divide into groups of 32"):
        AttentionCache(8).append(mx.zeros((2, 1, 1, 80)))


def test_an_empty_cache_holds_nothing():
    assert AttentionCache().arrays == []
