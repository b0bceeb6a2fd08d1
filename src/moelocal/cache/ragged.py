"""`Rows`: timelines of unequal length that advance together, a token each."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from moelocal.cache.cache import Cache
from moelocal.cache.layers import AttentionCache, RecurrentCache

RaggedLayer = RecurrentCache | list[AttentionCache]
"""One layer of all rows: recurrent states stacked along B, keys and values in the cache of each row."""


class Rows:
    """A batch of caches, each of one row and with a position of its own.

    Keys and values stay where they are: nothing is padded, and a row comes and goes without a copy of the others'.
    Recurrent states, which are small and as large for every row, are stacked when the rows first step together, and
    again after the batch has changed. In between `caches` hold positions, keys and values only.
    """

    __slots__ = ("_together", "caches")

    def __init__(self, caches: Iterable[Cache] = ()) -> None:
        self.caches = list(caches)
        self._together: list[RaggedLayer] | None = None

    def join(self, cache: Cache) -> None:
        """Add a row, the last one. Its tokens so far were evaluated in `cache` alone."""
        self.apart()
        self.caches.append(cache)

    def leave(self, cache: Cache) -> None:
        """Take a row out; those after it move up. Its recurrent states are slices that hold those of all rows: copy
        what is to be kept."""
        self.apart()
        self.caches.remove(cache)

    def begin(self) -> None:
        """Note that layers are about to evaluate tokens of every row."""
        for cache in self.caches:
            cache.begin()

    def advance(self, count: int) -> None:
        """Note that `count` more tokens of every row were evaluated."""
        for cache in self.caches:
            cache.advance(count)

    def together(self) -> list[RaggedLayer]:
        """All layers, in the form in which the rows step together."""
        if self._together is None:
            self._together = [
                _stacked(layers) for layers in zip(*(c.layers for c in self.caches), strict=True)
            ]
        return self._together

    def apart(self) -> list[Cache]:
        """All caches, each complete."""
        for index, layer in enumerate(self._together or ()):
            if isinstance(layer, RecurrentCache):
                for row, cache in enumerate(self.caches):
                    own = cache.layers[index]
                    assert (
                        isinstance(own, RecurrentCache) and layer.conv is not None and layer.state is not None
                    )
                    own.conv, own.state = layer.conv[row : row + 1], layer.state[row : row + 1]
        self._together = None
        return self.caches


def _stacked(layers: Iterable[AttentionCache | RecurrentCache]) -> RaggedLayer:
    attention, recurrent = [], RecurrentCache()
    convs, states = [], []
    for layer in layers:
        if isinstance(layer, AttentionCache):
            attention.append(layer)
            continue
        assert layer.conv is not None and layer.state is not None  # a row has evaluated its prompt
        convs.append(layer.conv)
        states.append(layer.state)
        layer.conv = layer.state = None  # else held for as long as the row stays
    if attention:
        return attention
    recurrent.conv, recurrent.state = mx.concatenate(convs), mx.concatenate(states)
    return recurrent
