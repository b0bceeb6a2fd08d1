"""The cache of one layer: keys and values that only grow, or a recurrent state that is replaced."""

from __future__ import annotations

from typing import Final

import mlx.core as mx

STEP: Final = 256
"""Positions by which the buffers of an attention cache grow: one allocation per STEP tokens."""


class AttentionCache:
    """Keys and values [B, Hkv, capacity, D], of which the first `length` positions are filled. Append-only."""

    __slots__ = ("keys", "length", "values")

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.length = 0

    def append(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Store k, v [B, Hkv, T, D] behind what is there; return all keys and values [B, Hkv, length, D]."""
        start, stop = self.length, self.length + k.shape[2]
        self.keys = _written(self.keys, k, start, stop)
        self.values = _written(self.values, v, start, stop)
        self.length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in (self.keys, self.values) if a is not None]


def _written(buffer: mx.array | None, new: mx.array, start: int, stop: int) -> mx.array:
    """`buffer` with `new` at positions start..stop, grown first where it is too short."""
    if buffer is None or stop > buffer.shape[2]:
        batch, heads, _, size = new.shape
        room = mx.zeros((batch, heads, -(-stop // STEP) * STEP - start, size), new.dtype)
        buffer = room if buffer is None else mx.concatenate([buffer[:, :, :start], room], axis=2)
    buffer[:, :, start:stop] = new
    return buffer


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
