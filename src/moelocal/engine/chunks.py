"""Where a prompt is cut into chunks.

Whether there is a cut depends on the position and the token behind it alone. So a prompt that goes on from stored state
is evaluated in the same chunks, by the same arithmetic, as one that is read from its beginning, and the results are the
same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

from moelocal.text.tokenizer import Tokenizer

STRIDE: Final = 2048
"""Chunks end at absolute multiples of this at the latest, which bounds the working memory of a prompt."""

MESSAGE_START: Final = "<|im_start|>"
"""The special token with which every message begins in the templates of all supported families."""


def message_start(tokenizer: Tokenizer) -> int | None:
    """The id of `MESSAGE_START`; None if the vocabulary has none, and chunks then end at the stride alone."""
    return tokenizer.id_of(MESSAGE_START)


def boundaries(tokens: Sequence[int], start: int | None) -> list[int]:
    """Positions at which a message begins and another ended, in order."""
    if start is None:
        return []
    found, position = list[int](), 0
    with contextlib.suppress(ValueError):  # no more of them; `index` compares faster than a loop does
        while True:
            position = tokens.index(start, position + 1)
            found.append(position)
    return found


def is_cut(tokens: Sequence[int], position: int, start: int | None) -> bool:
    """Whether a chunk ends at `position`, as in `cuts`."""
    return position == len(tokens) or position % STRIDE == 0 or tokens[position] == start


def cuts(tokens: Sequence[int], start: int | None) -> list[int]:
    """Positions at which chunks end: multiples of the stride, boundaries of messages, and the end."""
    marks = {*range(STRIDE, len(tokens), STRIDE), *boundaries(tokens, start), len(tokens)}
    return sorted(marks)
