"""The cache of one layer: keys and values that only grow, or a recurrent state that is replaced."""

from __future__ import annotations

from typing import Final

import mlx.core as mx

STEP: Final = 256
"""Positions by which the buffer of an attention cache grows; long ones grow by a 32nd in multiples of it, since each
size is copied, and traced, once."""


class AttentionCache:
    """Keys and values in one buffer [2·B, Hkv, capacity, D], the keys of all rows before the values, so that a step is
    one write (docs/decisions/0004-cache-write.md). `length` positions are filled. Append-only."""

    __slots__ = ("buffer", "length")

    def __init__(self) -> None:
        self.buffer: mx.array | None = None
        self.length = 0

    def append(self, stored: mx.array) -> mx.array:
        """Store keys and values [2·B, Hkv, T, D] behind what is there; return the buffer."""
        start, stop = self.length, self.length + stored.shape[2]
        if self.buffer is None or stop > self.buffer.shape[2]:
            self.buffer = self._grown(stored, start, stop)
        self.buffer[:, :, start:stop] = stored
        self.length = stop
        return self.buffer

    def _grown(self, stored: mx.array, start: int, stop: int) -> mx.array:
        """A buffer with room for `stop` positions that holds the first `start`."""
        batches, heads, _, size = stored.shape
        step = max(start // 32 // STEP, 1) * STEP
        room = mx.zeros((batches, heads, -(-stop // step) * step - start, size), stored.dtype)
        return room if self.buffer is None else mx.concatenate([self.buffer[:, :, :start], room], axis=2)

    @property
    def arrays(self) -> list[mx.array]:
        return [] if self.buffer is None else [self.buffer]


class RecurrentCache:
    """`conv` [B, W − 1, C]: the last rows before the convolution; `state` [B, Hv, Dv, Dk] float32. Both are rebound,
    never written into, so that a held reference stays what it was."""

    __slots__ = ("conv", "state")

    def __init__(self) -> None:
        self.conv: mx.array | None = None
        self.state: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in (self.conv, self.state) if a is not None]


LayerCache = AttentionCache | RecurrentCache
