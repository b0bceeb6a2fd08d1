"""How much of a prompt was not evaluated again, and why not more."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from moelocal.engine.chunks import MESSAGE_START, boundaries, cuts
from moelocal.text.tokenizer import Tokenizer

Cause = Literal[
    "reasoning dropped",
    "answer rendered anew",
    "tools changed",
    "volatile line in the system prompt",
    "system prompt changed",
    "edited",
    "evicted",
    "never stored",
    "fingerprint",
]

_AROUND: Final = 12
"""Tokens of text to show on each side of a difference."""

_DATED: Final = re.compile(
    r".*\d.*|\W*((mon|tues|wednes|thurs|fri|satur|sun)day|january|february|march|april|may|june|july|august|september"
    r"|october|november|december|[ap]m)\W*",
    re.IGNORECASE,
)
"""Words of a date, a time or a counter."""


@dataclass(frozen=True, slots=True)
class Miss:
    """Why less was reused than the timeline before this one had in common with the prompt, or less than all of it.

    `position`: the first token that differs from the timeline before, or that had to be evaluated again. `before` and
    `now`: the texts around it, of that timeline and of the prompt; equal where nothing differs. `cause`:
    - "reasoning dropped": the template leaves out what the model thought in an earlier turn;
    - "answer rendered anew": an answer that came from the model is in the prompt in other tokens, or with other white
      space, than the model chose;
    - "tools changed": the list of tools, and nothing else before the first message of the user;
    - "volatile line in the system prompt": one line of it differs, only in numbers, dates or times, and nothing else
      before the first message of the user; `before` and `now` are that line;
    - "system prompt changed": any other difference there, with other tools or without;
    - "edited": a message is another one than before;
    - "evicted": it was stored, and had to make room; "never stored": nothing was kept near the position;
    - "fingerprint": it is on disk, but of other weights, settings or versions, and of no use to these.
    Another answer to the same messages, with thinking or without, misses nothing.
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
    shared = common(before, now)
    opened = _opened(now, tokenizer, start)
    if (
        shared >= opened
    ):  # all messages are the same; the answer that was asked for behind them was another one
        shared = whole = min(len(before), opened, len(now) - 1)
    else:
        whole = min(len(before), len(now) - 1)
    if shared >= whole and cached >= max(cut for cut in [0, *cuts(now, start)] if cut <= whole):
        return None
    if shared < min(len(before), opened):
        return _difference(before, now, shared, tokenizer, start)
    old, new = (_around(tokens, cached, tokenizer) for tokens in (before, now))
    return Miss(cached, old, new, "evicted" if evicted(shared) else "never stored")


def foreign(now: Sequence[int], cached: int, tokenizer: Tokenizer | None) -> Miss:
    """Why only `cached` tokens of `now` were reused where more are on disk under another fingerprint."""
    text = _around(now, cached, tokenizer)
    return Miss(cached, text, text, "fingerprint")


def _around(tokens: Sequence[int], position: int, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return ""
    return _text(tokens[max(0, position - _AROUND) : position + _AROUND], tokenizer)


def _opened(now: Sequence[int], tokenizer: Tokenizer | None, start: int | None) -> int:
    """Where the answer is asked for: the last message, if it is the assistant's; else the end."""
    ends = boundaries(now, start)
    if tokenizer is None or not ends or not _is_from("assistant", _text(now[ends[-1] :], tokenizer)):
        return len(now)
    return ends[-1]


def _difference(
    before: Sequence[int], now: Sequence[int], shared: int, tokenizer: Tokenizer | None, start: int | None
) -> Miss:
    if tokenizer is None:
        return Miss(shared, "", "", "edited")
    around = [_around(tokens, shared, tokenizer) for tokens in (before, now)]
    old, new = (_text(_message(tokens, shared, start), tokenizer) for tokens in (before, now))
    cause: Cause = "edited"
    if _is_from("system", old) or _is_from("system", new):
        cause = "system prompt changed"
        if _tools(old) != _tools(new):
            cause = "tools changed" if _only_tools(old, new) else cause
        elif lines := _volatile(old, new):
            cause, around = "volatile line in the system prompt", list(lines)
    elif _is_from("assistant", old) and _is_from("assistant", new):
        if "".join(old.split()) == "".join(new.split()):
            cause = "answer rendered anew"
        elif "<think>" in old and "<think>" not in new:  # be the block empty
            cause = "reasoning dropped"
    return Miss(shared, around[0], around[1], cause)


def _text(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode([t for t in tokens if tokenizer.is_token(t)], skip_special=False)


def _is_from(role: str, message: str) -> bool:
    return message.startswith(f"{MESSAGE_START}{role}")


def _message(tokens: Sequence[int], position: int, start: int | None) -> Sequence[int]:
    """The message that holds `position`."""
    starts = [0, *boundaries(tokens, start), len(tokens)]
    first = max(s for s in starts if s <= position)
    return tokens[first : next((s for s in starts if s > first), len(tokens))]


def _tools(message: str) -> str:
    return message.partition("<tools>")[2].partition("</tools>")[0]


def _only_tools(old: str, new: str) -> bool:
    """Whether two first messages, whose tools differ, say the same besides. A template writes instructions around the
    tools, and the text of the system message before those or behind."""
    if _tools(old) and _tools(new):
        return old.replace(_tools(old), "") == new.replace(_tools(new), "")
    plain, full = (old, new) if _tools(new) else (new, old)
    if not _is_from("system", plain):
        return True
    text, whole = _body(plain), _body(full)
    return whole.startswith(f"{text}\n\n") or whole.endswith(f"\n\n{text}")


def _body(message: str) -> str:
    return message.removeprefix(f"{MESSAGE_START}system").partition("<|im_end|>")[0].strip()


def _volatile(old: str, new: str) -> tuple[str, str] | None:
    """The one line that two texts differ in, before and now, if it does only in numbers, dates or times."""
    pairs = list(zip(old.splitlines(), new.splitlines(), strict=False))
    different = [(a, b) for a, b in pairs if a != b]
    if len(old.splitlines()) != len(new.splitlines()) or len(different) != 1:
        return None
    a, b = (_body(line) for line in different[0])
    words = [pair for pair in zip(a.split(), b.split(), strict=False) if pair[0] != pair[1]]
    same_count = len(a.split()) == len(b.split())
    return (a, b) if same_count and all(_DATED.fullmatch(w) for pair in words for w in pair) else None
