"""The store: what comes out is what went in, bit for bit; it holds what it says; the budget is kept."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import moelocal
from cache.timelines import active, empty, extend, live_arrays, made, same
from moelocal.cache import AttentionCache, Cache, Disk, Found, RecurrentCache, Store, snapshot
from moelocal.cache import store as store_module
from moelocal.cache.keys import GRID, Chain
from moelocal.errors import RequestError

TOKENS = np.random.default_rng(2).integers(0, 500, 4000).tolist()
PLENTY = 1 << 30


def answers(model: moelocal.Model, cache: Cache, tokens: list[int]) -> mx.array:
    """Logits behind a chunk of tokens, and behind each of some that follow one by one."""
    logits = [model(mx.array([tokens[:-8]]), cache, rows=1)[0, -1]]
    logits += [model(mx.array([[token]]), cache, rows=1)[0, -1] for token in tokens[-8:]]
    mx.eval(logits, cache.arrays)
    return mx.stack(logits)


@pytest.mark.parametrize("position", [1, GRID - 1, GRID, GRID + 1, 3 * GRID, 1000])
def test_what_is_restored_goes_on_as_the_timeline_it_was_taken_of(position: int):
    model = moelocal.load()
    rest = TOKENS[position : position + 40]
    cold, cache = model.new_cache(), model.new_cache()
    for each in (cold, cache):
        model(mx.array([TOKENS[:position]]), each)
        mx.eval(each.arrays)
    expected = answers(model, cold, rest)
    store = Store("f", PLENTY)
    store.put(TOKENS[:position], cache)
    answers(model, cache, TOKENS[2000:2300])  # goes on elsewhere
    for _ in range(2):
        found = store.find(TOKENS)
        assert found is not None and (found.position, found.where) == (position, "memory")
        restored = store.restore(found)
        assert restored is not None
        assert mx.array_equal(answers(model, restored, rest), expected)
        assert same(restored, cold)


@pytest.mark.parametrize("position", [1, GRID - 1, GRID, GRID + 1, 2 * GRID, 700])
def test_it_holds_as_many_bytes_as_it_says(position: int):
    cache, store = made(TOKENS[:position]), Store("f", PLENTY)
    before = active()
    store.put(TOKENS[:position], cache)
    assert active() - before == store.nbytes
    one = snapshot.sizes(cache)
    assert store.nbytes == one[0] + one[1] * (position // GRID)
    before -= cache.nbytes
    del cache  # nothing of the timeline is held with it
    assert active() - before == store.nbytes
    store.clear()
    assert active() - before == store.nbytes == len(store) == 0


def test_a_real_model_s_snapshots_are_as_large_as_they_say():
    model, store = moelocal.load(), Store("f", PLENTY)
    warm = model.new_cache()  # what the first steps leave behind
    mx.eval(model(mx.array([TOKENS[:2048]]), warm, rows=1), model(mx.array([[1]]), warm))
    del warm
    base, cache = active(), model.new_cache()
    for stop in (300, 301, 900, 2048, 2100, 2101):
        model(mx.array([TOKENS[cache.position : stop]]), cache, rows=1)
        mx.eval(cache.arrays)
        before, held = active(), store.nbytes
        store.put(TOKENS[:stop], cache)
        assert active() - before == store.nbytes - held > 0
    del cache  # the last step left views into the rows of its convolution
    # scalars of what was compiled for that size of buffer; a pinned row would be 512 bytes in each of six layers
    assert 0 <= active() - base - store.nbytes < 512


def test_snapshots_over_the_same_tokens_share_their_segments():
    store = Store("f", PLENTY)
    cache, grown = made(()), []
    for position in (2 * GRID, 2 * GRID + 10, 3 * GRID + 10):
        extend(cache, TOKENS[: cache.position], TOKENS[cache.position : position])
        before, held = active(), store.nbytes
        store.put(TOKENS[:position], cache)
        grown.append(store.nbytes - held)
        assert active() - before == grown[-1]
    own, each = snapshot.sizes(made(TOKENS[: 2 * GRID]))
    tail = each * 10 // GRID
    assert grown == [own + 2 * each, own + tail, own + tail + each]


def test_a_snapshot_outlives_all_that_happens_to_its_timeline():
    cache, store = made(TOKENS[:300]), Store("f", PLENTY)
    mark = cache.mark()
    extend(cache, TOKENS[:300], TOKENS[300:700])
    store.put(TOKENS[:700], cache)
    cache.rewind(mark)
    extend(cache, TOKENS[:300], TOKENS[1000:1500])
    store.put([*TOKENS[:300], *TOKENS[1000:1500]], cache)
    found = store.find(TOKENS)
    assert found is not None
    restored = store.restore(found)
    assert restored is not None and same(restored, made(TOKENS[:700]))
    extend(restored, TOKENS[:700], TOKENS[2000:2400])
    again = store.restore(found)
    assert again is not None and same(again, made(TOKENS[:700]))


def test_what_was_restored_can_be_marked_forked_and_stored():
    store = Store("f", PLENTY)
    store.put(TOKENS[:700], made(TOKENS[:700]))
    found = store.find(TOKENS)
    assert found is not None
    restored = store.restore(found)
    assert restored is not None
    mark, fork = restored.mark(), restored.fork()
    extend(restored, TOKENS[:700], TOKENS[700:900])
    store.put(TOKENS[:900], restored)
    restored.rewind(mark)
    assert same(restored, made(TOKENS[:700])) and same(fork, restored)
    found = store.find(TOKENS)
    assert found is not None and found.position == 900
    deeper = store.restore(found)
    assert deeper is not None and same(deeper, made(TOKENS[:900]))


def test_the_least_recently_used_goes_first():
    sequences = [[number, *TOKENS[:9]] for number in range(4)]
    own, _ = snapshot.sizes(made(sequences[0]))
    store = Store("f", 3 * own)
    for tokens in sequences[:3]:
        store.put(tokens, made(tokens))
    first = store.find(sequences[0])
    assert first is not None and store.restore(first) is not None  # used: the second is now the oldest
    store.put(sequences[3], made(sequences[3]))
    assert [store.find(tokens) is not None for tokens in sequences] == [True, False, True, True]
    assert [store.fate(tokens) for tokens in sequences] == ["memory", "evicted", "memory", "memory"]
    assert store.fate(TOKENS[:5]) == "never stored"
    assert store.counts == {"put": 4, "memory": 1, "evicted": 1} and store.nbytes == store.budget
    store.put(sequences[1], made(sequences[1]))
    assert store.fate(sequences[1]) == "memory"


def test_storing_again_counts_as_use_and_copies_nothing():
    sequences = [[number, *TOKENS[:9]] for number in range(3)]
    own, _ = snapshot.sizes(made(sequences[0]))
    store = Store("f", 2 * own)
    first = made(sequences[0])
    store.put(sequences[0], first)
    store.put(sequences[1], made(sequences[1]))
    before = active()
    store.put(sequences[0], first)
    assert active() == before
    store.put(sequences[2], made(sequences[2]))
    assert [store.find(tokens) is not None for tokens in sequences] == [True, False, True]


def test_what_cannot_fit_evicts_nothing():
    own, each = snapshot.sizes(made(TOKENS[: 2 * GRID]))
    store = Store("f", own + each)
    store.put(TOKENS[:GRID], made(TOKENS[:GRID]))
    store.put(TOKENS[: 2 * GRID], made(TOKENS[: 2 * GRID]))
    found = store.find(TOKENS)
    assert found is not None and found.position == GRID
    assert store.counts == {"put": 1, "too large": 1}
    assert store.fate(TOKENS[: 2 * GRID]) == "refused"


def test_segments_that_a_new_snapshot_shares_survive_the_eviction_it_causes():
    own, each = snapshot.sizes(made(TOKENS[: 2 * GRID]))
    store = Store("f", own + 2 * each)
    store.put(TOKENS[:GRID], made(TOKENS[:GRID]))
    before, held = active(), store.nbytes
    cache = made(TOKENS[: 2 * GRID])
    before += cache.nbytes
    store.put(TOKENS[: 2 * GRID], cache)
    assert store.counts == {"put": 2, "evicted": 1} and len(store) == 1
    assert active() - before == store.nbytes - held == each
    found = store.find(TOKENS)
    assert found is not None
    restored = store.restore(found)
    assert restored is not None and same(restored, cache)


@pytest.mark.parametrize("kinds", ["r", "rr", "a", "aa", "ra", "8", "r8r8", "44"])
@pytest.mark.parametrize("position", [GRID, 600])
def test_models_of_one_kind_of_layer(kinds: str, position: int, tmp_path: Path):
    def timeline(count: int) -> Cache:
        cache = empty(kinds)
        extend(cache, (), TOKENS[:count])
        return cache

    store, base = Store("f", PLENTY, Disk(tmp_path, "f", PLENTY)), active()
    store.put(TOKENS[:position], timeline(position))
    assert store.disk is not None
    store.disk.flush()
    assert active() - base == store.nbytes
    for where in ("memory", "disk"):
        found = store.find(TOKENS)
        assert found is not None and found.where == where
        restored = store.restore(found)
        assert restored is not None and same(restored, timeline(position))
        store.clear()


def test_what_went_between_finding_and_restoring_is_none():
    store = Store("f", PLENTY)
    store.put(TOKENS[:300], made(TOKENS[:300]))
    found = store.find(TOKENS)
    assert found is not None
    store.drop(found)
    assert store.restore(found) is None and store.find(TOKENS) is None and store.nbytes == 0


def test_another_fingerprint_has_other_names():
    chains = [Chain(fingerprint, TOKENS[:600]) for fingerprint in ("one", "two")]
    names = [{c.root, c.key(600), *c.links([(1, 600)])} for c in chains]
    assert len(names[0]) == len(names[1]) == 4 and not names[0] & names[1]


@given(st.lists(st.integers(0, 1 << 17), min_size=1, max_size=700), st.data())
def test_keys_differ_where_tokens_or_positions_do(tokens: list[int], data: st.DataObject):
    chain = Chain("f", tokens)
    place = data.draw(st.integers(0, len(tokens) - 1))
    other = Chain("f", [*tokens[:place], tokens[place] ^ 1, *tokens[place + 1 :]])
    for position in range(1, len(tokens) + 1, 50):
        assert (chain.key(position) == other.key(position)) == (position <= place)
    keys = [chain.key(position) for position in range(len(tokens) + 1)]
    assert len(set(keys)) == len(keys)


Sizes = st.lists(st.sampled_from([1, 128, 256, 300, 512]), max_size=8)


def runs(sizes: list[int]) -> list[tuple[int, int]]:
    return [(len(list(group)), size) for size, group in itertools.groupby(sizes)]


@example([], [256], [128, 128], 4000)
@given(Sizes, Sizes, Sizes, st.integers(0, 4000))
def test_segments_have_one_name_exactly_if_all_up_to_the_end_of_their_chunk_is_the_same(
    shared: list[int], one: list[int], two: list[int], place: int
):
    """The names against their definition, position by position."""
    first, second = shared + one, shared + two
    tokens = TOKENS * 3
    other = [*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]]
    names = [
        Chain("f", t[: sum(sizes)]).links(runs(sizes)) for t, sizes in ((tokens, first), (other, second))
    ]
    assert [len(n) for n in names] == [sum(first) // GRID, sum(second) // GRID]
    assert len({*names[0], *names[1]}) >= max(map(len, names))

    def led_there(tokens: list[int], sizes: list[int], cell: int) -> tuple[list[int], list[int]]:
        ends = list(itertools.accumulate(sizes))
        last = next(index for index, end in enumerate(ends) if end >= (cell + 1) * GRID)
        return tokens[: ends[last]], sizes[: last + 1]

    for cell in range(min(map(len, names))):
        same_past = led_there(tokens, first, cell) == led_there(other, second, cell)
        assert (names[0][cell] == names[1][cell]) == same_past


def test_a_timeline_knows_the_chunks_it_was_evaluated_in():
    cache = made(())
    for stop in (300, 600, 601, 602, 603, 700):
        extend(cache, TOKENS[: cache.position], TOKENS[cache.position : stop], chunk=300)
    assert cache.chunks == [(2, 300), (3, 1), (1, 97)]


def test_segments_computed_in_other_chunks_are_not_shared():
    """Multiplied together with other rows a row differs in its last bits: the tokens of a segment do not say all."""
    model, store = moelocal.load(), Store("f", PLENTY)
    long, short = model.new_cache(), model.new_cache()
    model(mx.array([TOKENS[:700]]), long)
    model(mx.array([TOKENS[:400]]), short)
    store.put(TOKENS[:700], long)
    store.put(TOKENS[:400], short)
    for tokens, cache in ((TOKENS[:400], short), (TOKENS[:700], long)):
        found = store.find(tokens)
        assert found is not None
        restored = store.restore(found)
        assert restored is not None and same(restored, cache)


@pytest.mark.parametrize(
    ("tokens", "cache", "message"),
    [
        ([], lambda: made([1]), "snapshot: expected the 1 tokens of the timeline, got 0"),
        ([1, 2], lambda: made([1]), "snapshot: expected the 1 tokens of the timeline, got 2"),
        ([1], lambda: batch([1], 3), "snapshot: expected one row without padding, got 3 rows"),
        ([1], lambda: padded([1]), "snapshot: expected one row without padding, got 2 rows"),
        ([1], lambda: stripped([1]), "snapshot: layer 2 has no state of the timeline's 1 tokens"),
        ([1, 2], lambda: shortened([1, 2]), "snapshot: layer 1 has no state of the timeline's 2 tokens"),
    ],
)
def test_what_is_no_timeline_of_these_tokens_is_refused(
    tokens: list[int], cache: Callable[[], Cache], message: str
):
    store = Store("f", PLENTY)
    with pytest.raises(RequestError) as caught:
        store.put(tokens, cache())
    assert str(caught.value) == message and store.nbytes == 0


def batch(tokens: list[int], rows: int) -> Cache:
    cache = made(tokens)
    for layer in cache.layers:
        if isinstance(layer, RecurrentCache):
            layer.conv, layer.state = (mx.repeat(a, rows, axis=0) for a in layer.arrays)
        else:
            assert layer.buffers
            layer.buffers = (mx.repeat(layer.buffers[0], rows, axis=0),)
    return cache


def padded(tokens: list[int]) -> Cache:
    cache = batch(tokens, 2)
    cache.padding = mx.array([0, 1])
    return cache


def stripped(tokens: list[int]) -> Cache:
    cache = made(tokens)
    layer = cache.layers[2]
    assert isinstance(layer, RecurrentCache)
    layer.conv = None
    return cache


def shortened(tokens: list[int]) -> Cache:
    cache = made(tokens)
    layer = cache.layers[1]
    assert isinstance(layer, AttentionCache)
    layer.length = 1
    return cache


class Conversations(RuleBasedStateMachine):
    """Any mixture of storing, finding, restoring, going on and evicting, against a plain account of it."""

    @initialize(budget=st.integers(0, 300_000))
    def begin(self, budget: int) -> None:
        self.store = Store("f", budget)
        self.known: set[tuple[int, ...]] = set()
        self.base = active()

    def tokens(self, path: list[int]) -> list[int]:
        """Tokens by the branches taken: 120 of each."""
        return [500 * depth + branch + i % 7 for depth, branch in enumerate(path) for i in range(120)]

    @rule(path=st.lists(st.integers(0, 2), min_size=1, max_size=7), cut=st.integers(0, 119))
    def put(self, path: list[int], cut: int) -> None:
        tokens = self.tokens(path)
        tokens = tokens[: len(tokens) - cut]
        self.store.put(tokens, made(tokens))
        self.known.add(tuple(tokens))

    @rule(path=st.lists(st.integers(0, 2), min_size=1, max_size=8), cut=st.integers(0, 119))
    def find(self, path: list[int], cut: int) -> None:
        tokens = self.tokens(path)
        tokens = tokens[: len(tokens) - cut]
        here = {k for k in self.known if self.store.fate(k) == "memory"}
        assert len(here) == len(self.store)
        best = max((len(k) for k in here if list(k) == tokens[: len(k)]), default=0)
        found = self.store.find(tokens)
        assert (found.position if found else 0) == best
        if found is not None:
            restored = self.store.restore(found)
            assert restored is not None and same(restored, made(tokens[:best]))
            extend(restored, tokens[:best], [1, 2, 3])

    @rule()
    def clear(self) -> None:
        self.store.clear()

    @invariant()
    def counted(self) -> None:
        assert self.store.nbytes <= self.store.budget
        assert active() - self.base == self.store.nbytes


TestConversations = Conversations.TestCase
TestConversations.settings = settings(max_examples=12, stateful_step_count=10)


def churn(store: Store, steps: int, tokens: Callable[[random.Random], list[int]]) -> list[tuple[int, int]]:
    """Store, evict and restore at random; bytes besides those of the store, and array objects, ten times."""
    chance, readings = random.Random(3), []
    every = steps // 10
    for step in range(steps):
        each = tokens(chance)
        found: Found | None = store.find(each)
        cache = store.restore(found) if found else None
        position = found.position if found else 0
        cache = cache or made(())
        extend(cache, each[:position], each[position:])
        store.put(each, cache)
        if step % every == every - 1:
            del cache, found
            store_size = store.nbytes
            store.clear()
            arrays = live_arrays()
            readings.append((active(), arrays))
            assert store_size > store.budget // 2
    return readings


@pytest.mark.parametrize("steps", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_storing_evicting_and_restoring_leaves_memory_and_arrays_flat(steps: int):
    def tokens(chance: random.Random) -> list[int]:
        branch = chance.randrange(6)
        return [branch, *TOKENS[: chance.randrange(1, 900)]]

    store = Store("f", 400_000)
    readings = churn(store, steps, tokens)
    assert store.counts["evicted"] > steps // 4 and store.counts["memory"] > steps // 4
    assert len(set(readings)) == 1, readings
    assert len(store._lost) <= store_module.LOST


def test_distinct_requests_leave_memory_flat_at_the_budget():
    store = Store("f", 300_000)
    sizes = []
    base = active()
    for number in range(60):
        tokens = [number, *TOKENS[:500]]
        store.put(tokens, made(tokens))
        assert active() - base == store.nbytes <= store.budget
        sizes.append(store.nbytes)
    assert len(set(sizes[-50:])) == 1
    assert store._users == dict.fromkeys(store._segments, 1)


# Faults planted in each part, and the check that has to see them


def equality() -> bool:
    """Whether going on from a restored snapshot, and from a rewind, equals a timeline that never stopped."""
    model = moelocal.load()
    store = Store("f", PLENTY)
    for other in (TOKENS[700:1000], [*TOKENS[:280], *TOKENS[700:720]]):  # as long, in part the same
        cache = model.new_cache()
        model(mx.array([other]), cache)
        store.put(other, cache)
    cache = model.new_cache()
    model(mx.array([TOKENS[:300]]), cache)
    mx.eval(cache.arrays)
    mark = cache.mark()
    store.put(TOKENS[:300], cache)
    expected = answers(model, cache, TOKENS[300:340])
    store.put(TOKENS[:340], cache)
    cache.rewind(mark)
    fork = cache.fork()
    answers(model, cache, TOKENS[700:740])
    cache.rewind(mark)
    if cache.chunks != [(1, 300)]:
        return False
    found = store.find(TOKENS[:339])
    restored = None if found is None else store.restore(found)
    if found is None or restored is None or found.position != 300:
        return False
    return all(
        mx.array_equal(answers(model, each, TOKENS[300:340]), expected).item()
        for each in (restored, restored.fork(), cache, fork)
    )


def ledger() -> bool:
    """Whether the store holds what it says, and nothing of the timelines it was given."""
    store = Store("f", PLENTY)
    caches = [made(TOKENS[:stop]) for stop in (300, 700)]
    base = active()
    for cache in caches:
        store.put(TOKENS[: cache.position], cache)
    grown = active() - base == store.nbytes
    base -= sum(cache.nbytes for cache in caches)
    del cache, caches
    return grown and active() - base == store.nbytes


def state_not_copied(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(snapshot, "copy", lambda array: array)


def copies_that_alias(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(snapshot, "copy", lambda array: array[...])


def after_restoring(plant: pytest.MonkeyPatch, change: Callable[[list[RecurrentCache]], None]) -> None:
    restore = snapshot.Snapshot.restore

    def changed(self: snapshot.Snapshot, segments: Any) -> Cache:
        cache = restore(self, segments)
        change([layer for layer in cache.layers if isinstance(layer, RecurrentCache)])
        return cache

    plant.setattr(snapshot.Snapshot, "restore", changed)


def missing_state(plant: pytest.MonkeyPatch) -> None:
    def change(layers: list[RecurrentCache]) -> None:
        layers[-1].state = mx.zeros_like(layers[-1].state)

    after_restoring(plant, change)


def missing_conv(plant: pytest.MonkeyPatch) -> None:
    def change(layers: list[RecurrentCache]) -> None:
        layers[0].conv = mx.zeros_like(layers[0].conv)

    after_restoring(plant, change)


def state_of_another_layer(plant: pytest.MonkeyPatch) -> None:
    def change(layers: list[RecurrentCache]) -> None:
        layers[0].state, layers[1].state = layers[1].state, layers[0].state

    after_restoring(plant, change)


def wrong_position(plant: pytest.MonkeyPatch) -> None:
    restore = snapshot.Snapshot.restore

    def changed(self: snapshot.Snapshot, segments: Any) -> Cache:
        cache = restore(self, segments)
        cache.position -= 1
        return cache

    plant.setattr(snapshot.Snapshot, "restore", changed)


def wrong_length(plant: pytest.MonkeyPatch) -> None:
    joined = AttentionCache.joined.__func__  # type: ignore[attr-defined]
    plant.setattr(
        AttentionCache,
        "joined",
        classmethod(lambda cls, parts, length, bits: joined(cls, parts, length + 1, bits)),
    )


def key_without_its_tail(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(Chain, "key", lambda self, position: f"{self._lines[position // GRID].hex()}-{position}")


def key_of_the_next_position(plant: pytest.MonkeyPatch) -> None:
    key = Chain.key
    plant.setattr(Chain, "key", lambda self, position: key(self, min(position + 1, self.length)))


def keys_without_tokens(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(Chain, "tokens", lambda self, start, stop: b"")


def segments_without_their_chunks(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(Chain, "links", lambda self, chunks: tuple(line.hex() for line in self._lines[1:]))


def segments_without_their_tokens(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(
        Chain, "links", lambda self, chunks: tuple(f"{i:032x}" for i in range(len(self._lines) - 1))
    )


def chunks_forgotten_on_the_way_back(plant: pytest.MonkeyPatch) -> None:
    rewind = Cache.rewind

    def forgetful(self: Cache, mark: Any) -> None:
        chunks = list(self.chunks)
        rewind(self, mark)
        self.chunks = chunks

    plant.setattr(Cache, "rewind", forgetful)


def tail_from_the_wrong_line(plant: pytest.MonkeyPatch) -> None:
    parts = snapshot.parts
    plant.setattr(
        snapshot,
        "parts",
        lambda cache, start, stop: (
            parts(cache, 0, stop - start) if stop % GRID else parts(cache, start, stop)
        ),
    )


def fork_that_shares_its_writes(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(AttentionCache, "fork", lambda self: self)


def mark_without_states(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(Cache, "rewind", lambda self, mark: [
        layer.cut(mark.position) for layer in self.layers if isinstance(layer, AttentionCache)
    ] and setattr(self, "position", mark.position))  # fmt: skip


def rewind_that_keeps_its_length(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(AttentionCache, "cut", lambda self, length: None)


def conv_that_pins_its_chunk(plant: pytest.MonkeyPatch) -> None:
    plant.setattr(snapshot, "copy", lambda array: mx.contiguous(array))


@pytest.mark.parametrize(
    ("plant", "seen_by"),
    [
        (state_not_copied, ledger),
        (copies_that_alias, ledger),
        (conv_that_pins_its_chunk, ledger),
        (missing_state, equality),
        (missing_conv, equality),
        (state_of_another_layer, equality),
        (wrong_position, equality),
        (wrong_length, equality),
        (key_without_its_tail, equality),
        (key_of_the_next_position, equality),
        (keys_without_tokens, equality),
        (segments_without_their_chunks, equality),
        (segments_without_their_tokens, equality),
        (chunks_forgotten_on_the_way_back, equality),
        (tail_from_the_wrong_line, equality),
        (fork_that_shares_its_writes, equality),
        (mark_without_states, equality),
        (rewind_that_keeps_its_length, equality),
    ],
)
def test_a_planted_fault_is_seen(
    plant: Callable[[pytest.MonkeyPatch], None], seen_by: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        plant(patch)
        try:
            passed = seen_by()
        except (RequestError, AssertionError, KeyError, ValueError):
            passed = False
    assert not passed


@pytest.mark.parametrize("check", [equality, ledger])
def test_without_a_planted_fault_all_is_well(check: Callable[[], bool]):
    assert check()
