"""What snapshots and segments are called: digests of all that led there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final

import numpy as np

GRID: Final = 256
"""Positions of one segment: keys and values are shared, kept and written in pieces of so many."""


def _digest(kind: bytes, *parts: bytes) -> bytes:
    digest = blake2b(digest_size=16, person=kind)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _number(number: int) -> bytes:
    return number.to_bytes(8, "little")


class Chain:
    """Names along a sequence of tokens, all 32 hexadecimal digits.

    A snapshot is looked for by tokens: its key is a digest of the fingerprint and of all tokens up to its position. It
    is made of lines[0] = H(fingerprint), lines[i + 1] = H(lines[i], GRID tokens as int32, the lowest byte first).
    """

    def __init__(self, fingerprint: str, tokens: Sequence[int], root: str | None = None) -> None:
        """`root`: in place of a fingerprint, its name."""
        self.length = len(tokens)
        self._data = np.asarray(tokens, dtype="<i4").tobytes()
        self._lines = [_digest(b"fingerprint", fingerprint.encode()) if root is None else bytes.fromhex(root)]
        for start in range(0, self.length - GRID + 1, GRID):
            self._lines.append(_digest(b"line", self._lines[-1], self.tokens(start, start + GRID)))

    @property
    def root(self) -> str:
        """The name of the fingerprint."""
        return self._lines[0].hex()

    def tokens(self, start: int, stop: int) -> bytes:
        """Tokens as int32, the lowest byte first."""
        return self._data[4 * start : 4 * stop]

    def key(self, position: int) -> str:
        """The name of the snapshot at `position`."""
        line = position // GRID
        tail = self.tokens(line * GRID, position)
        return _digest(b"snapshot", self._lines[line], _number(position), tail).hex()

    def links(self, chunks: Iterable[tuple[int, int]]) -> tuple[str, ...]:
        """The names of all segments of a timeline of these tokens, which were evaluated in `chunks` (`Cache.chunks`).

        Keys and values at a position differ in their last bits with the chunk in which it was evaluated, all tokens of
        it. So a segment is named after all tokens, and all chunks, up to the end of the chunk that its last position is
        in: link = H(d, number of the segment), d = H(d before, tokens and chunks since then).
        """
        links: list[str] = []
        digest, done, position = self._lines[0], 0, 0
        pending = b""
        for number, size in chunks:
            while number:
                line = (len(links) + 1) * GRID
                # chunks up to the one that reaches the next grid line, at most all of this run
                take = min(-(-(line - position) // size), number)
                position, number = position + take * size, number - take
                pending += _number(take) + _number(size)
                if position >= line:
                    digest = _digest(b"chunks", digest, pending, self.tokens(done, position))
                    done, pending = position, b""
                    for cell in range(len(links), position // GRID):
                        links.append(_digest(b"segment", digest, _number(cell)).hex())
        return tuple(links)
