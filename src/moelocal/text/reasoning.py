"""Separates the thinking part of an answer from the rest, in a stream."""

from __future__ import annotations

import re
from typing import Literal

from moelocal.text.partial import partial_suffix

_OPEN, _CLOSE = "<think>", "</think>"
_CALL = re.compile(r"<tool_call>\s{0,8}(?:<function=|\{)")
# What may still become _CALL at the end of a text: the tag, then white space, then the beginning of
# "<function=".
_CALL_BEGUN = re.compile(r"<tool_call>\s{0,8}(?:<(?:f(?:u(?:n(?:c(?:t(?:i(?:on?)?)?)?)?)?)?)?)?\Z")

Part = tuple[Literal["reasoning", "text"], str]


class ReasoningSplitter:
    """Splits at `</think>`; takes away the tags and the newlines around them that the template writes.

    `inside`: the prompt ended with `<think>`, so the text begins inside the reasoning. Otherwise a `<think>`
    at the very beginning opens it, and one further on is plain text.

    A tool call inside reasoning that was not closed (a frequent slip of Qwen models) ends the reasoning: the
    call, and what follows, is text. Only a real beginning counts, `<tool_call>` followed by `<function=` or
    `{`; a mere mention of the tag does not. `calls_end_it=False` turns this off, for requests without tools.
    """

    def __init__(self, inside: bool, *, calls_end_it: bool = True) -> None:
        self._state: Literal["start", "reasoning", "text"] = "reasoning" if inside else "start"
        self._calls_end_it = calls_end_it
        self._held = ""
        self._trim = inside  # drop newlines at the beginning of the current part

    def add(self, text: str) -> list[Part]:
        """The parts that are certain, in order; empty ones are left out."""
        self._held += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What was held back, when the text ends."""
        held, self._held = self._held, ""
        if self._trim:
            held = held.lstrip("\n")
        kind: Literal["reasoning", "text"] = "reasoning" if self._state == "reasoning" else "text"
        return [(kind, held)] if held else []

    def _step(self, parts: list[Part]) -> bool:
        """Handle the held text as far as possible; True when the state changed and there is more to do."""
        if self._state == "start":
            return self._start()
        if self._trim:
            self._held = self._held.lstrip("\n")
            self._trim = not self._held
        if self._state == "text":
            self._emit(parts, "text", len(self._held))
            return False
        return self._reasoning(parts)

    def _start(self) -> bool:
        begun = self._held.lstrip()
        if begun.startswith(_OPEN):
            self._state, self._held, self._trim = "reasoning", begun[len(_OPEN) :], True
            return True
        if _OPEN.startswith(begun):
            return False
        self._state = "text"
        return True

    def _reasoning(self, parts: list[Part]) -> bool:
        close = self._held.find(_CLOSE)
        call = _CALL.search(self._held) if self._calls_end_it else None
        if close >= 0 and (call is None or close < call.start()):
            self._end_reasoning(parts, close, close + len(_CLOSE))
            return True
        if call is not None:
            self._end_reasoning(parts, call.start(), call.start())
            return True
        begun = _CALL_BEGUN.search(self._held) if self._calls_end_it else None
        needles = (_CLOSE, "<tool_call>") if self._calls_end_it else (_CLOSE,)
        safe = begun.start() if begun else len(self._held) - partial_suffix(self._held, needles)
        # Newlines belong to the tag if it follows, so they wait as well.
        self._emit(parts, "reasoning", len(self._held[:safe].rstrip("\n")))
        return False

    def _end_reasoning(self, parts: list[Part], end: int, resume: int) -> None:
        rest = self._held[resume:]
        self._emit(parts, "reasoning", len(self._held[:end].rstrip("\n")))
        self._state, self._held, self._trim = "text", rest, True

    def _emit(self, parts: list[Part], kind: Literal["reasoning", "text"], length: int) -> None:
        if length:
            parts.append((kind, self._held[:length]))
        self._held = self._held[length:]
