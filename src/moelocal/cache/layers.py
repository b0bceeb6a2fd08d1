"""The cache of one layer: keys and values that only grow, or a recurrent state that is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import mlx.core as mx

from moelocal.config import AttentionSpec
from moelocal.errors import ConfigError

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


def group_of(head_dim: int) -> int:
    """Elements of a head that share scale and bias where keys and values are kept as codes. Raises `ConfigError`."""
    for group in (64, 32):
        if head_dim % group == 0:
            return group
    raise ConfigError(
        f"kv_bits: heads of {head_dim} elements do not divide into groups of 32; keep keys and values as they are"
    )


def kv_nbytes(spec: AttentionSpec, size: int, kv_bits: int | None) -> int:
    """Bytes of the keys and values of one position in one layer: numbers of `size` bytes, or codes of `kv_bits` with a
    scale and a bias of that size for each group."""
    count = 2 * spec.kv_heads * spec.head_dim
    if kv_bits is None:
        return count * size
    return count * kv_bits // 8 + count // group_of(spec.head_dim) * 2 * size


class AttentionCache:
    """Keys and values, the keys of all rows before the values, so that a step is one write
    (docs/decisions/0004-cache-write.md): one buffer [2·B, Hkv, capacity, D] as they were computed, or with `bits` (4 or
    8) affine codes uint32 [2·B, Hkv, capacity, D·bits/32], scales and biases [2·B, Hkv, capacity, D/group]. `length`
    positions are filled. Append-only."""

    __slots__ = ("bits", "buffers", "length")

    def __init__(self, bits: int | None = None) -> None:
        self.bits = bits
        self.buffers: tuple[mx.array, ...] = ()
        self.length = 0

    @classmethod
    def joined(
        cls, parts: Sequence[Sequence[mx.array]], length: int, bits: int | None = None
    ) -> AttentionCache:
        """A cache that holds what `part` gave, piece after piece, `length` positions together."""
        cache = cls(bits)
        if parts:
            cache.buffers = tuple(_extended(pieces, length) for pieces in zip(*parts, strict=True))
            cache.length = length
        return cache

    def append(self, stored: mx.array) -> tuple[mx.array, ...]:
        """Store keys and values [2·B, Hkv, T, D] behind what is there; return the buffers."""
        start, stop = self.length, self.length + stored.shape[2]
        parts: tuple[mx.array, ...] = (stored,)
        if self.bits is not None:
            parts = tuple(mx.quantize(stored, group_size=group_of(stored.shape[3]), bits=self.bits))
        if not self.buffers:
            self.buffers = tuple(_extended([part[:, :, :0]], stop) for part in parts)
        elif stop > self.buffers[0].shape[2]:
            self.buffers = tuple(_extended([buffer[:, :, :start]], stop) for buffer in self.buffers)
        for buffer, part in zip(self.buffers, parts, strict=True):
            buffer[:, :, start:stop] = part
        self.length = stop
        return self.buffers

    def part(self, start: int, stop: int) -> tuple[mx.array, ...]:
        """These positions of every buffer: views."""
        assert self.buffers and stop <= self.length
        return tuple(buffer[:, :, start:stop] for buffer in self.buffers)

    def cut(self, length: int) -> None:
        """Forget what is behind `length` positions, and the room that a timeline of that length does not have."""
        assert length <= self.length
        self.length, room = length, capacity(length)
        if self.buffers and room < self.buffers[0].shape[2]:
            self.buffers = tuple(buffer[:, :, :room] for buffer in self.buffers) if room else ()

    def fork(self) -> AttentionCache:
        """The same content in buffers of its own from the first write on."""
        other = AttentionCache(self.bits)
        # array objects of its own: assigning to a part of one rebinds that object, and MLX writes in place only into
        # memory that nothing else refers to
        other.buffers = tuple(buffer[...] for buffer in self.buffers)
        other.length = self.length
        return other

    @property
    def arrays(self) -> list[mx.array]:
        return list(self.buffers)


def _extended(parts: Sequence[mx.array], length: int) -> mx.array:
    """What is in `parts`, position after position, with room for `length` and what a timeline of that length has."""
    batches, heads, _, size = parts[0].shape
    room = capacity(length) - sum(part.shape[2] for part in parts)
    return mx.concatenate([*parts, mx.zeros((batches, heads, room, size), parts[0].dtype)], axis=2)


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
