"""`Cache`: all layers of one timeline, which move together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakSet

import mlx.core as mx

from moelocal.cache.layers import AttentionCache, LayerCache, RecurrentCache
from moelocal.config import AttentionSpec, ModelConfig
from moelocal.errors import RequestError

Chunks = Sequence[tuple[int, int]]
"""How positions were evaluated, from the first on: numbers of chunks, each with the tokens in every one of them."""


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Mark:
    """A position of a timeline to come back to. Holds the recurrent states of that position by reference, in the order
    of the layers, and no keys and values: those the timeline still has."""

    position: int
    states: tuple[tuple[mx.array | None, mx.array | None], ...]

    @property
    def nbytes(self) -> int:
        """Bytes held, shared with the timeline until that has gone on."""
        return sum(array.nbytes for pair in self.states for array in pair if array is not None)


class Cache:
    """The caches of all layers and the one `position` (tokens evaluated) that they share.

    With `padding` the batch holds one row per entry, each preceded by that many padding tokens, which are evaluated
    with the rest but seen by nothing; `position` counts them.

    `chunks` says how they were evaluated: what a layer holds at a position depends, in its last bits, on the chunk that
    the position was evaluated in.

    `torn`: its layers stand at different positions, as they do while tokens are evaluated; still so afterwards if that
    was interrupted, and then it is good for nothing.
    """

    __slots__ = ("_marks", "chunks", "layers", "padding", "position", "torn")

    def __init__(
        self, config: ModelConfig, padding: Sequence[int] | None = None, kv_bits: int | None = None
    ) -> None:
        """`kv_bits`: of the codes of keys and values (`AttentionCache`); None keeps them as they are."""
        if padding is not None and (not padding or min(padding) < 0):
            raise RequestError(f"padding: expected one count of at least 0 per row, got {list(padding)}")
        self.layers: list[LayerCache] = [
            AttentionCache(kv_bits) if isinstance(layer.mixer, AttentionSpec) else RecurrentCache()
            for layer in config.layers
        ]
        self.padding = mx.array(list(padding)) if padding is not None and any(padding) else None
        self.position = 0
        self.chunks: list[tuple[int, int]] = []
        self.torn = False
        self._marks: WeakSet[Mark] = WeakSet()

    @classmethod
    def of(cls, layers: Sequence[LayerCache], chunks: Chunks) -> Cache:
        """The timeline without padding whose layers hold what was evaluated in these chunks."""
        cache = cls.__new__(cls)
        cache.layers, cache.padding, cache.chunks, cache._marks = list(layers), None, list(chunks), WeakSet()
        cache.position, cache.torn = sum(count * size for count, size in cache.chunks), False
        return cache

    def begin(self) -> None:
        """Note that layers are about to evaluate tokens. Raises `RequestError` if that was interrupted before."""
        if self.torn:
            raise RequestError(
                f"cache: the evaluation behind its {self.position} tokens was interrupted; begin with a new one"
            )
        self.torn = True

    def advance(self, count: int) -> None:
        """Note that `count` more tokens were evaluated by every layer."""
        self.position += count
        number, size = self.chunks.pop() if self.chunks else (0, count)
        if size == count:
            self.chunks.append((number + 1, size))
        else:
            self.chunks += (number, size), (1, count)
        self.torn = False

    @property
    def _recurrent(self) -> list[RecurrentCache]:
        return [layer for layer in self.layers if isinstance(layer, RecurrentCache)]

    def mark(self) -> Mark:
        """The position now, to `rewind` to later. Costs no copy; whoever holds it keeps the states of then."""
        mark = Mark(self.position, tuple((layer.conv, layer.state) for layer in self._recurrent))
        self._marks.add(mark)
        return mark

    def rewind(self, mark: Mark) -> None:
        """Go back to `mark`: one of this timeline, or made before this one was forked from that one.

        Marks behind it are of no more use. Raises `RequestError` for those and for marks of other timelines.
        """
        if mark not in self._marks:
            raise RequestError(
                f"rewind: this timeline of {self.position} tokens has no such mark at {mark.position}: it is another "
                "timeline's, or was left behind by a rewind to before it"
            )
        self.begin()
        for layer in self.layers:
            if isinstance(layer, AttentionCache):
                layer.cut(mark.position)
        for recurrent, (conv, state) in zip(self._recurrent, mark.states, strict=True):
            recurrent.conv, recurrent.state = conv, state
        while self.position > mark.position:
            number, size = self.chunks.pop()
            kept = max(number - (self.position - mark.position) // size, 0)
            self.position -= (number - kept) * size
            if kept:
                self.chunks.append((kept, size))
        self._marks = WeakSet(each for each in self._marks if each.position <= mark.position)
        self.torn = False

    def fork(self) -> Cache:
        """A timeline that goes on from here on its own. Keys and values are shared until one of both is written to;
        MLX then copies them for the one."""
        other = Cache.of([layer.fork() for layer in self.layers], self.chunks)
        other.padding, other._marks, other.torn = self.padding, WeakSet(self._marks), self.torn
        return other

    @property
    def arrays(self) -> list[mx.array]:
        """Every array held, for `mx.eval`."""
        return [array for layer in self.layers for array in layer.arrays]

    @property
    def nbytes(self) -> int:
        """Bytes held, reserve included."""
        return sum(array.nbytes for array in self.arrays)
