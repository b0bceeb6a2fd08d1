"""`Snapshot`: what a timeline held at one position, as copies that outlive it.

Recurrent states, and keys and values from the last grid line on (the tail), belong to the snapshot alone. Keys and
values before that are in segments of GRID positions, which all snapshots over the same tokens share.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import mlx.core as mx

from moelocal.cache.cache import Cache, Chunks
from moelocal.cache.keys import GRID
from moelocal.cache.layers import AttentionCache, LayerCache, RecurrentCache, copy
from moelocal.errors import RequestError


@dataclass(frozen=True)
class Segment:
    """Keys and values of GRID positions: of each attention layer what `AttentionCache.part` gives."""

    arrays: tuple[mx.array, ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True)
class Snapshot:
    """`key` and `links` (of its segments) as in `Chain`, `chunks` as in `Cache`. `layers` has one letter per layer:
    "r" recurrent, "a" attention, "8" and "4" attention with codes of so many bits; `states` conv and state of each "r";
    `tail`, as in `Segment`, less than GRID positions of each of the others, none on a grid line."""

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
        states, layers = iter(self.states), list[LayerCache]()
        pieces = [iter(segment.arrays) for segment in segments] + ([iter(self.tail)] if self.tail else [])
        for kind in self.layers:
            if kind == "r":
                layers.append(RecurrentCache(next(states), next(states)))
            else:
                bits = None if kind == "a" else int(kind)
                parts = [list(islice(piece, 1 if bits is None else 3)) for piece in pieces]
                layers.append(AttentionCache.joined(parts, self.position, bits))
        cache = Cache.of(layers, self.chunks)
        mx.eval(cache.arrays)
        return cache


def check(tokens: Sequence[int], cache: Cache) -> None:
    """Raises `RequestError` for what no snapshot is taken of."""
    if cache.torn:
        raise RequestError("snapshot: an evaluation of this timeline was interrupted")
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
    """Keys and values of these positions, of all attention layers: views."""
    kept = [layer.part(start, stop) for layer in cache.layers if isinstance(layer, AttentionCache)]
    return [array for arrays in kept for array in arrays]


def _letter(layer: LayerCache) -> str:
    if isinstance(layer, RecurrentCache):
        return "r"
    return "a" if layer.bits is None else str(layer.bits)


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
    layers = "".join(map(_letter, cache.layers))
    snapshot = Snapshot(key, position, tuple(links), tuple(cache.chunks), layers, states, tail)
    mx.eval(snapshot.arrays, [segment.arrays for segment in segments.values()])
    return snapshot, segments
