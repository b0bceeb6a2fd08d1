"""`Store`: snapshots of timelines in memory under a budget in bytes, and behind it on disk."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

from moelocal.cache.cache import Cache
from moelocal.cache.disk import Accept, Disk
from moelocal.cache.keys import Chain
from moelocal.cache.snapshot import Segment, Snapshot, check, sizes, take

Where = Literal["memory", "disk"]
Fate = Literal["memory", "disk", "evicted", "refused", "never stored"]

LOST: Final = 4096
"""Snapshots remembered, by name, after they went."""


@dataclass(frozen=True, slots=True)
class Found:
    """A stored prefix of some tokens: the first `position` of them, and where it lies."""

    position: int
    where: Where
    key: str
    chain: Chain = field(repr=False)


class Store:
    """Snapshots by the tokens that led to them. For one thread.

    `fingerprint` names everything but the tokens and chunks that the states depend on. `budget`: bytes of arrays held;
    the least recently used snapshot goes first, a segment when no snapshot needs it. (MLX may give an array up to two
    pages of memory more than its `nbytes`.) `disk`: gets a copy of what is put, and is asked for what is not in memory.
    `counts` has "put", "memory", "disk" (restored from there), "evicted", "too large".
    """

    def __init__(self, fingerprint: str, budget: int, disk: Disk | None = None) -> None:
        self.fingerprint, self.budget, self.disk = fingerprint, budget, disk
        self.counts: Counter[str] = Counter()
        self.nbytes = 0
        self._room: int | None = None
        self._snapshots: OrderedDict[str, Snapshot] = OrderedDict()
        self._positions: Counter[int] = Counter()
        self._segments: dict[str, Segment] = {}
        self._users: Counter[str] = Counter()
        """How many snapshots need a segment."""
        self._lost: OrderedDict[str, Fate] = OrderedDict()

    def __len__(self) -> int:
        return len(self._snapshots)

    def find(self, tokens: Sequence[int], accept: Accept = lambda chunks: True) -> Found | None:
        """The longest prefix of `tokens` that is stored and was evaluated in chunks that `accept` finds good."""
        chain = Chain(self.fingerprint, tokens)
        here, there = self._longest(chain, accept), self.disk.find(chain, accept) if self.disk else 0
        position = max(here, there)
        if not position:
            return None
        return Found(position, "memory" if here == position else "disk", chain.key(position), chain)

    def _longest(self, chain: Chain, accept: Accept) -> int:
        for position in sorted(self._positions, reverse=True):
            snapshot = self._snapshots.get(chain.key(position)) if position <= chain.length else None
            if snapshot is not None and accept(snapshot.chunks):
                return position
        return 0

    def fate(self, tokens: Sequence[int]) -> Fate:
        """What became of the snapshot behind exactly these tokens, as far as this store remembers."""
        chain = Chain(self.fingerprint, tokens)
        key = chain.key(chain.length)
        if key in self._snapshots:
            return "memory"
        if self.disk and self.disk.has(chain, chain.length):
            return "disk"
        return self._lost.get(key, "never stored")

    def elsewhere(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` are stored on disk under another fingerprint: of no use here."""
        return self.disk.elsewhere(tokens) if self.disk else 0

    def put(self, tokens: Sequence[int], cache: Cache, *, keep: bool = True) -> None:
        """Store what `cache` holds, which are `tokens`; on disk only with `keep`. Evaluates it, and copies what is not
        there yet. What is stored already is as if used, and replaced if it was evaluated in other chunks; what cannot
        fit the budget goes to disk alone.

        Raises `RequestError` if the cache has padding or several rows, or does not stand behind `tokens`.
        """
        check(tokens, cache)
        chain = Chain(self.fingerprint, tokens)
        key, links = chain.key(chain.length), chain.links(cache.chunks)
        if key in self._snapshots and self._snapshots[key].chunks != tuple(cache.chunks):
            self._remove(key)
        if key not in self._snapshots:
            own, each = sizes(cache)
            if own + each * len(links) > self._most:
                self.counts["too large"] += 1
                self._lose(key, "refused")
                if keep and self.disk:  # what is there already need not be copied
                    self.disk.put(chain, *take(key, links, cache, self.disk.known))
                return
            with self._held(links) as held:
                self._make_room(own + each * (len(links) - len(held)))
                self._add(*take(key, links, cache, self._segments))
        self._snapshots.move_to_end(key)
        self.counts["put"] += 1
        if keep and self.disk:
            self.disk.put(chain, self._snapshots[key], self._segments)

    def restore(self, found: Found) -> Cache | None:
        """A timeline of its own at `found.position`; None if the snapshot has gone meanwhile or was refused."""
        snapshot = self._snapshots.get(found.key)
        if snapshot is not None:
            self._snapshots.move_to_end(found.key)
            self.counts["memory"] += 1
            return snapshot.restore([self._segments[link] for link in snapshot.links])
        read = self.disk.get(found.chain, found.position, self._segments) if self.disk else None
        if read is None:
            self._lose(found.key, "refused" if found.where == "disk" else "evicted")
            return None
        snapshot, segments = read
        self.counts["disk"] += 1
        if snapshot.nbytes + sum(s.nbytes for s in segments) <= self._most:
            with self._held(snapshot.links) as held:
                fresh = {x: s for x, s in zip(snapshot.links, segments, strict=True) if x not in held}
                self._make_room(snapshot.nbytes + sum(s.nbytes for s in fresh.values()))
                self._add(snapshot, fresh)
        return snapshot.restore(segments)

    def drop(self, found: Found) -> None:
        """Forget this snapshot, in memory and on disk."""
        if found.key in self._snapshots:
            self._remove(found.key)
        if self.disk:
            self.disk.drop(found.chain, found.position)

    def give_way(self, room: int) -> None:
        """Hold at most `room` bytes until this is called again, if that is less than the budget."""
        self._room = max(room, 0)
        self._make_room(0)

    @property
    def _most(self) -> int:
        return self.budget if self._room is None else min(self.budget, self._room)

    def clear(self) -> None:
        """Forget all snapshots in memory."""
        while self._snapshots:
            self._remove(next(iter(self._snapshots)))

    def close(self) -> None:
        """Forget all snapshots in memory, and wait until the disk has what it was given."""
        self.clear()
        if self.disk:
            self.disk.close()

    def _make_room(self, nbytes: int) -> None:
        while self._snapshots and self.nbytes + nbytes > self._most:
            key = next(iter(self._snapshots))
            self._remove(key)
            self.counts["evicted"] += 1
            self._lose(key, "evicted")

    def _add(self, snapshot: Snapshot, fresh: Mapping[str, Segment]) -> None:
        self._segments.update(fresh)
        self.nbytes += sum(segment.nbytes for segment in fresh.values())
        self._snapshots[snapshot.key] = snapshot
        self._positions[snapshot.position] += 1
        self._lost.pop(snapshot.key, None)
        self.nbytes += snapshot.nbytes
        self._claim(snapshot.links)

    def _remove(self, key: str) -> None:
        snapshot = self._snapshots.pop(key)
        self._positions -= Counter([snapshot.position])
        self.nbytes -= snapshot.nbytes
        self._release(snapshot.links)

    @contextmanager
    def _held(self, links: Iterable[str]) -> Iterator[set[str]]:
        """Those of `links` that are there; they stay meanwhile."""
        held = {link for link in links if link in self._segments}
        self._claim(held)
        try:
            yield held
        finally:
            self._release(held)

    def _claim(self, links: Iterable[str]) -> None:
        self._users.update(links)

    def _release(self, links: Iterable[str]) -> None:
        for link in links:
            self._users[link] -= 1
            if not self._users[link]:
                del self._users[link]
                self.nbytes -= self._segments.pop(link).nbytes

    def _lose(self, key: str, fate: Fate) -> None:
        self._lost[key] = fate
        self._lost.move_to_end(key)
        if len(self._lost) > LOST:
            self._lost.popitem(last=False)
