"""How much of a prompt was not evaluated again, and why not more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from moelocal.engine.chunks import MESSAGE_START, boundaries, cuts
from moelocal.text.tokenizer import Tokenizer

Cause = Literal[
    "reasoning dropped",
    "tools changed",
    "system prompt changed",
    "edited",
    "evicted",
    "never stored",
    "fingerprint",
]

_AROUND = 12
"""Tokens of text to show on each side of a difference."""


@dataclass(frozen=True, slots=True)
class Miss:
    """Why less was reused than the timeline before this one had in common with the prompt, or less than all of it.

    `position`: the first token that differs from the timeline before, or that had to be evaluated again. `before` and
    `now`: the texts around it, of that timeline and of the prompt; equal where nothing differs. `cause`:
    - "reasoning dropped": the template leaves out what the model thought in an earlier turn;
    - "tools changed", "system prompt changed": a difference before the first message of the user, a date for example;
    - "edited": a message is another one than before;
    - "evicted": it was stored, and had to make room; "never stored": nothing was kept near the position;
    - "fingerprint": it is on disk, but of other weights, settings or versions, and of no use to these.
    """

    position: int
    before: str
    now: str
    cause: Cause


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    most = min(len(a), len(b))
    if list(a[:most]) == list(b[:most]):
        return most
    low, high = (
        0,
        most,
    )  # the first half that differs, again and again: slices compare faster than a loop does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if list(a[low:middle]) == list(b[low:middle]) else (low, middle)
    return low


def explain(
    before: Sequence[int],
    now: Sequence[int],
    cached: int,
    evicted: Callable[[int], bool],
    tokenizer: Tokenizer | None,
    start: int | None,
) -> Miss | None:
    """Why only `cached` tokens of the prompt `now` were reused after the timeline `before`; None if all of that
    timeline was, or as much as a prompt allows: its last token is always evaluated, and chunks are those of a cold run.

    `evicted(shared)`: whether a snapshot behind more than the cached, at most `shared` tokens had to make room.
    `start`: the token with which a message begins. Without a tokenizer the texts are empty.
    """
    shared, whole = common(before, now), min(len(before), len(now) - 1)
    if shared >= whole and cached >= max(cut for cut in [0, *cuts(now, start)] if cut <= whole):
        return None
    if shared < min(len(before), len(now)):
        position, cause = shared, _cause(before, now, shared, tokenizer, start)
    else:
        position, cause = cached, "evicted" if evicted(shared) else "never stored"
    old, new = (_around(tokens, position, tokenizer) for tokens in (before, now))
    return Miss(position, old, new, cause)


def foreign(now: Sequence[int], cached: int, tokenizer: Tokenizer | None) -> Miss:
    """Why only `cached` tokens of `now` were reused where more are on disk under another fingerprint."""
    text = _around(now, cached, tokenizer)
    return Miss(cached, text, text, "fingerprint")


def _around(tokens: Sequence[int], position: int, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return ""
    nearby = tokens[max(0, position - _AROUND) : position + _AROUND]
    return tokenizer.decode([t for t in nearby if tokenizer.is_token(t)], skip_special=False)


def _cause(
    before: Sequence[int], now: Sequence[int], shared: int, tokenizer: Tokenizer | None, start: int | None
) -> Cause:
    if tokenizer is None:
        return "edited"
    old, new = (tokenizer.decode(_message(t, shared, start), skip_special=False) for t in (before, now))
    if any(text.startswith(f"{MESSAGE_START}system") for text in (old, new)):
        return "system prompt changed" if _tools(old) == _tools(new) else "tools changed"
    return "reasoning dropped" if _thought(old) and not _thought(new) else "edited"


def _tools(message: str) -> str:
    return message.partition("<tools>")[2].partition("</tools>")[0]


def _message(tokens: Sequence[int], position: int, start: int | None) -> Sequence[int]:
    """The message that holds `position`."""
    starts = [0, *boundaries(tokens, start), len(tokens)]
    first = max(s for s in starts if s <= position)
    return tokens[first : next((s for s in starts if s > first), len(tokens))]


def _thought(message: str) -> bool:
    """Whether a message has a block for reasoning, be it empty."""
    return "<think>" in message
