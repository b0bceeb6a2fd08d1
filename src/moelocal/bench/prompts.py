"""Texts of a known number of tokens, each unlike the others from its beginning on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

from moelocal.errors import RequestError
from moelocal.quantize.corpus import documentation

_ATTEMPTS: Final = 40

Count = Callable[[str], int]
"""How many tokens a text has, with all that stands around it."""


@cache
def _documents() -> tuple[str, ...]:
    return tuple(documentation("evaluation"))


def text_of(count: Count, tokens: int, number: int) -> str:
    """Text number `number` of `tokens` tokens, or as close below as is possible, but never empty. It begins with its
    number, so that nobody who keeps what was read before can use it again.

    Prose, so that its tokens choose experts as those of people do: Python's own documentation, which every Python has.
    Raises `RequestError` for a Python without it.
    """
    documents = _documents()
    if not documents:
        raise RequestError(
            "this Python has no documentation in it (pydoc_data.topics), the text of the prompts"
        )
    start = number % len(documents)
    shortest = str(number)
    whole = f"{shortest}. {''.join(documents[start:] + documents[:start]).lstrip()}"
    if count(shortest) >= tokens:
        return shortest
    sample = whole[:20_000]
    per_token = len(sample) / count(sample)
    whole *= 1 + int(1.5 * tokens * per_token) // len(whole)
    length, best = int(tokens * per_token), shortest
    for _ in range(_ATTEMPTS):
        text = whole[: max(length, len(shortest))]
        found = count(text)
        if found == tokens:
            return text
        if found < tokens and len(text) > len(best):
            best = text
        step = round((tokens - found) * per_token)
        length += step or (1 if found < tokens else -1)
    while count(best + " a") <= tokens:
        best += " a"
    return best
