"""The cache of one layer: keys and values that only grow, or a recurrent state that is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import mlx.core as mx

STEP: Final = 256
"""Positions by which the buffer of an attention cache grows; long ones grow by a 32nd in multiples of it, since each
size is copied, and traced, once."""


def capacity(length: int) -> int:
    """The positions that a buffer with `length` of them has room for: a function of the length alone, so that what
    is computed at a position does not depend on how a timeline came there."""
    room = 0
    while room < length:
        room += max(room // 32 // STEP, 1) * STEP
    return room


class AttentionCache:
    """Keys and values in one buffer [2·B, Hkv, capacity, D], the keys of all rows before the values, so that a step is
    one write (docs/decisions/0004-cache-write.md). `length` positions are filled. Append-only."""

    __slots__ = ("buffer", "length")

    def __init__(self) -> None:
        self.buffer: mx.array | None = None
        self.length = 0

    @classmethod
    def joined(cls, parts: Sequence[mx.array], length: int) -> AttentionCache:
        """A cache that holds these keys and values, [2·B, Hkv, T, D] each and `length` positions together."""
        cache = cls()
        if parts:
            batches, heads, _, size = parts[0].shape
            room = mx.zeros((batches, heads, capacity(length) - length, size), parts[0].dtype)
            cache.buffer = mx.concatenate([*parts, room], axis=2)
            cache.length = length
        return cache

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
        room = mx.zeros((batches, heads, capacity(stop) - start, size), stored.dtype)
        return room if self.buffer is None else mx.concatenate([self.buffer[:, :, :start], room], axis=2)

    def part(self, start: int, stop: int) -> mx.array:
        """Keys and values of these positions [2·B, Hkv, T, D]: a view."""
        assert self.buffer is not None and stop <= self.length
        return self.buffer[:, :, start:stop]

    def cut(self, length: int) -> None:
        """Forget what is behind `length` positions, and the room that a timeline of that length does not have."""
        assert length <= self.length
        self.length, room = length, capacity(length)
        if self.buffer is not None and room < self.buffer.shape[2]:
            self.buffer = self.buffer[:, :, :room] if room else None

    def fork(self) -> AttentionCache:
        """The same content in a buffer of its own from the first write on."""
        other = AttentionCache()
        # an array object of its own: assigning to a part of one rebinds that object, and MLX writes in place only
        # into memory that nothing else refers to
        other.buffer = None if self.buffer is None else self.buffer[...]
        other.length = self.length
        return other

    @property
    def arrays(self) -> list[mx.array]:
        return [] if self.buffer is None else [self.buffer]


class RecurrentCache:
    """`conv` [B, W − 1, C]: the last rows before the convolution; `state` [B, Hv, Dv, Dk] float32. Both are rebound,
    never written into, so that a held reference stays what it was."""

    __slots__ = ("conv", "state")

    def __init__(self, conv: mx.array | None = None, state: mx.array | None = None) -> None:
        self.conv, self.state = conv, state

    def fork(self) -> RecurrentCache:
        """Another cache that goes on from the same state."""
        return RecurrentCache(self.conv, self.state)

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in (self.conv, self.state) if a is not None]


LayerCache = AttentionCache | RecurrentCache


def copy(array: mx.array) -> mx.array:
    """The same bits in memory of their own, lazily, row after row.

    `mx.contiguous` alone may alias, and arithmetic on floats may flush subnormal numbers: integers times one do not.
    """
    kind = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
    return mx.contiguous(array.view(kind) * 1).view(array.dtype)
