"""A long answer leaves nothing behind but its keys and values."""

from __future__ import annotations

import gc
import sys

import mlx.core as mx
import pytest

import moelocal
from moelocal.cache import AttentionCache


def live_arrays() -> int:
    """Arrays alive: each holds a reference to its type, and the garbage collector does not track them."""
    gc.collect()
    return sys.getrefcount(mx.array)


def test_live_arrays_are_counted():
    before = live_arrays()
    held = [mx.array(i) for i in range(100)]
    assert live_arrays() == before + len(held)
    del held
    assert live_arrays() == before


@pytest.mark.slow
def test_20000_tokens_hold_live_arrays_and_graph_depth_flat(monkeypatch):
    # attention over a growing cache would dominate the time: it is kept to a window here, all else is the real path
    model = moelocal.load()
    append = AttentionCache.append

    def windowed(self, stored):
        if self.length >= 64:
            self.length = 32
        return append(self, stored)

    monkeypatch.setattr(AttentionCache, "append", windowed)
    cache = model.new_cache()
    token = mx.argmax(model(mx.array([[1, 2, 3]]), cache, rows=1)[0, -1])
    counts, memory, edges = [], [], []
    for step in range(20_000):
        token = mx.argmax(model(token.reshape(1, 1), cache, rows=1)[0, -1])
        if step % 5000 == 100:
            edges.append(depth(token, *cache.arrays))
        mx.async_eval(token)
        if step % 5000 == 101:
            mx.eval(token, cache.arrays)
            counts.append(live_arrays())
            memory.append(mx.get_active_memory())
    assert len(set(edges)) == 1, edges
    assert len(set(counts)) == 1, counts
    assert max(memory) - min(memory) < 1 << 20, memory


def depth(*arrays: mx.array) -> int:
    """Size of the unevaluated graph behind the arrays, as its drawing in the dot language has it."""
    import io

    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return text.getvalue().count("->")
