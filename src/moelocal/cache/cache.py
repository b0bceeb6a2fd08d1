"""`Cache`: all layers of one timeline, which move together."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from moelocal.cache.layers import AttentionCache, LayerCache, RecurrentCache
from moelocal.config import AttentionSpec, ModelConfig
from moelocal.errors import RequestError


class Cache:
    """The caches of all layers and the one `position` (tokens evaluated) that they share.

    With `padding` the batch holds one row per entry, each preceded by that many padding tokens, which are evaluated
    with the rest but seen by nothing; `position` counts them.
    """

    __slots__ = ("layers", "padding", "position")

    def __init__(self, config: ModelConfig, padding: Sequence[int] | None = None) -> None:
        if padding is not None and (not padding or min(padding) < 0):
            raise RequestError(f"padding: expected one count of at least 0 per row, got {list(padding)}")
        self.layers: list[LayerCache] = [
            AttentionCache() if isinstance(layer.mixer, AttentionSpec) else RecurrentCache()
            for layer in config.layers
        ]
        self.padding = mx.array(list(padding)) if padding is not None and any(padding) else None
        self.position = 0

    def advance(self, count: int) -> None:
        """Note that `count` more tokens were evaluated by every layer."""
        self.position += count

    @property
    def arrays(self) -> list[mx.array]:
        """Every array held, for `mx.eval`."""
        return [array for layer in self.layers for array in layer.arrays]

    @property
    def nbytes(self) -> int:
        """Bytes held, reserve included."""
        return sum(array.nbytes for array in self.arrays)
