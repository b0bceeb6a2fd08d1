"""What the end of a text may become: shared by the parsers that read a stream."""

from __future__ import annotations

from collections.abc import Iterable


def partial_suffix(text: str, needles: Iterable[str]) -> int:
    """Length of the longest end of `text` that is a beginning of a needle (and not the whole needle)."""
    longest = 0
    for needle in needles:
        for length in range(min(len(needle) - 1, len(text)), longest, -1):
            if text.endswith(needle[:length]):
                longest = length
                break
    return longest
