"""Marks, rewinds and forks: the same bits as a timeline that never went elsewhere."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moelocal
from cache.timelines import active, extend, made, same
from moelocal.cache import AttentionCache, Cache, Mark, RecurrentCache
from moelocal.cache.layers import STEP, capacity, copy
from moelocal.errors import RequestError
from moelocal.ops.op import force

TOKENS = np.random.default_rng(1).integers(0, 500, 3000).tolist()


def evaluated(model: moelocal.Model, cache: Cache, tokens: list[int]) -> mx.array:
    """Logits behind each token, which are evaluated one by one."""
    logits = [model(mx.array([[token]]), cache, rows=1)[0, -1] for token in tokens]
    mx.eval(logits, cache.arrays)
    return mx.stack(logits)


@given(st.lists(st.integers(1, 2048), min_size=1, max_size=40))
def test_room_depends_on_the_length_alone(sizes: list[int]):
    cache, length = AttentionCache(), 0
    for size in sizes:
        (buffer,) = cache.append(mx.zeros((2, 1, size, 1)))
        length += size
        assert buffer.shape[2] == capacity(length)


def test_room_grows_by_a_32nd():
    for length in (1, STEP, STEP + 1, 40 * STEP, 64 * STEP + 1, 100_000, 262_144):
        assert length <= capacity(length) <= max(length + STEP, length * 33 // 32 + STEP)
    assert capacity(0) == 0 and capacity(64 * STEP) == 64 * STEP and capacity(64 * STEP + 1) == 66 * STEP
    assert len({capacity(length) for length in range(0, 262_145, 64)}) < 200


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint32])
def test_a_copy_has_every_bit_and_memory_of_its_own(dtype: mx.Dtype):
    words = mx.arange(1 << 16).astype(
        mx.uint16
    )  # NaNs, infinities, subnormals and both zeros of 16-bit types
    array = words.view(dtype) if dtype.size == 2 else (words.astype(mx.uint32) * 65537).view(dtype)
    parts = array.reshape(2, 4, -1, 8)[:, :, 5:700]
    mx.eval(array)
    before = active()
    copied = copy(parts)
    mx.eval(copied)
    assert active() - before == copied.nbytes == parts.nbytes
    view = memoryview(copied.view(mx.uint8))
    assert view.c_contiguous and copied.dtype == dtype
    assert np.array_equal(np.array(copied.view(mx.uint8)), np.array(parts.view(mx.uint8)))


@pytest.mark.parametrize("position", [0, 1, 300, 2 * STEP, 700])
def test_going_back_gives_the_same_answers_as_never_having_gone_on(position: int):
    model = moelocal.load()
    cold = model.new_cache()
    if position:
        model(mx.array([TOKENS[:position]]), cold)
    expected = evaluated(model, cold, TOKENS[position : position + 20])
    cache = model.new_cache()
    if position:
        model(mx.array([TOKENS[:position]]), cache)
    mark = cache.mark()
    model(mx.array([TOKENS[1000:1700]]), cache)
    evaluated(model, cache, TOKENS[:5])
    cache.rewind(mark)
    assert cache.position == position
    assert mx.array_equal(evaluated(model, cache, TOKENS[position : position + 20]), expected)
    cache.rewind(mark)  # and again
    assert mx.array_equal(evaluated(model, cache, TOKENS[position : position + 20]), expected)
    assert same(cache, cold)


def test_forks_and_their_origin_go_on_alone():
    model = moelocal.load()
    cache = model.new_cache()
    model(mx.array([TOKENS[:505]]), cache)
    mx.eval(cache.arrays)
    forks = [cache.fork() for _ in range(2)]
    continuations = [TOKENS[start : start + 12] for start in (600, 900, 1300)]
    found = [
        evaluated(model, c, t[:3]) for c, t in zip([cache, *forks], continuations, strict=True)
    ]  # in turns, so that each writes while the others share
    found = [
        mx.concatenate([first, evaluated(model, c, t[3:])])
        for first, c, t in zip(found, [cache, *forks], continuations, strict=True)
    ]
    for continuation, got in zip(continuations, found, strict=True):
        alone = model.new_cache()
        model(mx.array([TOKENS[:505]]), alone)
        assert mx.array_equal(evaluated(model, alone, continuation), got)


def test_appending_after_a_rewind_alters_no_fork():
    cache = made(TOKENS[:300])
    mark = cache.mark()
    extend(cache, TOKENS[:300], TOKENS[300:500])
    fork = cache.fork()
    cache.rewind(mark)
    extend(cache, TOKENS[:300], TOKENS[1000:1200])
    assert same(fork, made(TOKENS[:500]))
    assert same(cache, made([*TOKENS[:300], *TOKENS[1000:1200]]))


def test_a_fork_can_go_back_to_before_it_was_one():
    cache = made(TOKENS[:300])
    mark = cache.mark()
    extend(cache, TOKENS[:300], TOKENS[300:600])
    fork = cache.fork()
    fork.rewind(mark)
    extend(fork, TOKENS[:300], TOKENS[700:710])
    assert same(cache, made(TOKENS[:600])) and same(fork, made([*TOKENS[:300], *TOKENS[700:710]]))
    cache.rewind(mark)
    assert same(cache, made(TOKENS[:300]))


def test_a_fork_shares_until_one_writes():
    cache = made(TOKENS[:700])
    before = active()
    fork = cache.fork()
    assert active() == before
    extend(fork, TOKENS[:700], TOKENS[700:701])
    buffers = sum(
        b.nbytes for layer in cache.layers if isinstance(layer, AttentionCache) for b in layer.buffers
    )
    assert buffers <= active() - before <= fork.nbytes
    del fork
    assert active() == before


def test_marks_of_other_timelines_are_refused():
    cache = made(TOKENS[:10])
    early = cache.mark()
    extend(cache, TOKENS[:10], TOKENS[10:20])
    late, fork = cache.mark(), cache.fork()
    after = fork.mark()
    with pytest.raises(RequestError, match="has no such mark at 20"):
        cache.rewind(after)
    cache.rewind(early)
    extend(cache, TOKENS[:10], TOKENS[30:50])
    for timeline, mark in ((cache, late), (cache, after), (made(TOKENS[:20]), early)):
        held = list(timeline.arrays)
        with pytest.raises(RequestError) as caught:
            timeline.rewind(mark)
        assert str(caught.value) == (
            f"rewind: this timeline of {timeline.position} tokens has no such mark at {mark.position}: it is another "
            "timeline's, or was left behind by a rewind to before it"
        )
        assert all(a is b for a, b in zip(held, timeline.arrays, strict=True))
    fork.rewind(late)  # there it still is one
    assert same(fork, made(TOKENS[:20]))


def test_a_mark_costs_no_memory_and_frees_what_it_held():
    cache = made(TOKENS[:700])
    before = active()
    mark = cache.mark()
    assert active() == before
    extend(cache, TOKENS[:700], TOKENS[700:702])
    assert active() - before == mark.nbytes == sum(a.nbytes for pair in mark.states for a in pair)
    del mark
    assert active() == before


@pytest.mark.parametrize("form", ["auto", "portable"])
def test_what_a_long_chunk_leaves_is_as_large_as_it_says(form: str):
    model = moelocal.load()
    with force(form):
        mx.eval(model(mx.array([TOKENS[:500]])))
        before = active()
        cache = model.new_cache()
        model(mx.array([TOKENS[:500]]), cache)
        mx.eval(cache.arrays)
        assert active() - before == cache.nbytes


def test_a_batch_with_padding_goes_back_too():
    model = moelocal.load()
    cache = model.new_cache([2, 0])
    model(mx.array([TOKENS[:9], TOKENS[9:18]]), cache)
    mark, fork = cache.mark(), cache.fork()
    more = mx.array([TOKENS[20:25], TOKENS[25:30]])
    expected = model(more, cache)
    cache.rewind(mark)
    assert mx.array_equal(model(more, cache), expected) and mx.array_equal(model(more, fork), expected)


def test_a_timeline_without_attention_or_without_recurrence():
    for kind in (RecurrentCache, AttentionCache):
        cache = Cache.of([kind()], ())
        extend(cache, (), TOKENS[:20])
        mark = cache.mark()
        extend(cache, TOKENS[:20], TOKENS[20:30])
        cache.rewind(mark)
        extend(cache, TOKENS[:20], TOKENS[40:45])
        straight = Cache.of([kind()], ())
        extend(straight, (), [*TOKENS[:20], *TOKENS[40:45]])
        assert same(cache, straight)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("gmrf"), st.integers(0, 50)), max_size=25))
def test_any_way_through_a_tree_of_timelines_ends_like_the_straight_one(steps: list[tuple[str, int]]):
    timelines = [(made(()), list[int](), list[Mark]())]
    for action, number in steps:
        cache, tokens, marks = timelines[number % len(timelines)]
        if action == "g":
            extend(cache, tokens, more := TOKENS[number * 40 : number * 41 + 1])
            tokens += more
        elif action == "m":
            marks.append(cache.mark())
        elif action == "r" and marks:
            cache.rewind(marks[number % len(marks)])
            del tokens[cache.position :]
            marks[:] = [mark for mark in marks if mark.position <= cache.position]
        elif action == "f":
            timelines.append((cache.fork(), list(tokens), list(marks)))
    for cache, tokens, _ in timelines:
        assert same(cache, made(tokens))
