"""`Snapshot`: what a timeline held at one position, as copies that outlive it.

Recurrent states, and keys and values from the last grid line on (the tail), belong to the snapshot alone. Keys and
values before that are in segments of GRID positions, which all snapshots over the same tokens share.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from moelocal.cache.cache import Cache, Chunks
from moelocal.cache.keys import GRID
from moelocal.cache.layers import AttentionCache, LayerCache, RecurrentCache, copy
from moelocal.errors import RequestError


@dataclass(frozen=True)
class Segment:
    """Keys and values of GRID positions, [2, Hkv, GRID, D] for each attention layer."""

    arrays: tuple[mx.array, ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True)
class Snapshot:
    """`key` and `links` (of its segments) as in `Chain`, `chunks` as in `Cache`. `layers` has one letter per layer:
    "r" recurrent, "a" attention; `states` conv and state of each "r", `tail` [2, Hkv, < GRID, D] of each "a", none on a
    grid line."""

    key: str
    position: int
    links: tuple[str, ...]
    chunks: Chunks
    layers: str
    states: tuple[mx.array, ...]
    tail: tuple[mx.array, ...]

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """Those that are not in segments."""
        return (*self.states, *self.tail)

    @cached_property
    def nbytes(self) -> int:
        """Bytes without those of the segments."""
        return sum(array.nbytes for array in self.arrays)

    def restore(self, segments: Sequence[Segment]) -> Cache:
        """A timeline at its position. States are shared, as nothing ever writes into them; keys and values are copied
        into buffers with room to grow."""
        states, layers, attention = iter(self.states), list[LayerCache](), 0
        for kind in self.layers:
            if kind == "r":
                layers.append(RecurrentCache(next(states), next(states)))
            else:
                parts = [segment.arrays[attention] for segment in segments]
                if self.tail:
                    parts.append(self.tail[attention])
                layers.append(AttentionCache.joined(parts, self.position))
                attention += 1
        cache = Cache.of(layers, self.chunks)
        mx.eval(cache.arrays)
        return cache


def check(tokens: Sequence[int], cache: Cache) -> None:
    """Raises `RequestError` for what no snapshot is taken of."""
    if not tokens or cache.position != len(tokens):
        raise RequestError(
            f"snapshot: expected the {cache.position} tokens of the timeline, got {len(tokens)}"
        )
    rows = {1}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, RecurrentCache):
            whole = len(layer.arrays) == 2
        else:
            whole = layer.length == cache.position
        if not whole:
            raise RequestError(
                f"snapshot: layer {index} has no state of the timeline's {cache.position} tokens"
            )
        rows |= {a.shape[0] // (2 if isinstance(layer, AttentionCache) else 1) for a in layer.arrays}
    if rows != {1} or cache.padding is not None:
        raise RequestError(f"snapshot: expected one row without padding, got {max(rows)} rows")


def parts(cache: Cache, start: int, stop: int) -> list[mx.array]:
    """Keys and values of these positions, of each attention layer: views."""
    return [layer.part(start, stop) for layer in cache.layers if isinstance(layer, AttentionCache)]


def sizes(cache: Cache) -> tuple[int, int]:
    """Bytes of a snapshot of `cache` without its segments, and of one segment."""
    position = cache.position
    one = sum(part.nbytes for part in parts(cache, 0, 1))
    states = sum(
        a.nbytes for layer in cache.layers if isinstance(layer, RecurrentCache) for a in layer.arrays
    )
    return states + one * (position % GRID), one * GRID


def take(
    key: str, links: Sequence[str], cache: Cache, have: Container[str]
) -> tuple[Snapshot, dict[str, Segment]]:
    """A snapshot of `cache` under this name, and those of its segments `links` that are not in `have`."""
    position = cache.position
    floor = len(links) * GRID
    states = tuple(
        copy(a) for layer in cache.layers if isinstance(layer, RecurrentCache) for a in layer.arrays
    )
    tail = tuple(map(copy, parts(cache, floor, position))) if floor < position else ()
    segments = {
        link: Segment(tuple(map(copy, parts(cache, cell * GRID, (cell + 1) * GRID))))
        for cell, link in enumerate(links)
        if link not in have
    }
    layers = "".join("r" if isinstance(layer, RecurrentCache) else "a" for layer in cache.layers)
    snapshot = Snapshot(key, position, tuple(links), tuple(cache.chunks), layers, states, tail)
    mx.eval(snapshot.arrays, [segment.arrays for segment in segments.values()])
    return snapshot, segments
