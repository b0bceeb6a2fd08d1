"""The text of a model, taken apart: reasoning, answer, tool calls, stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelocal.text.reasoning import Part, ReasoningSplitter
from moelocal.text.stop import StopStrings
from moelocal.text.tool_calls import ToolCall, ToolCallParser


@dataclass(frozen=True, slots=True)
class Delta:
    """What a piece of text added. `stopped`: a stop string is complete, so nothing can come any more."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    stopped: bool = False


class AnswerParser:
    """Reasoning first, then tool calls, then stop strings, on a stream of text.

    Stop strings apply to the answer only. They are not looked for in the reasoning, nor in the markup and
    arguments of a tool call, where they would cut a file that is being written.

    Calls are parsed only if tools were given; without them, text that looks like a call is text.
    """

    def __init__(
        self,
        *,
        thinking_open: bool,
        stops: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """`thinking_open`: the prompt ended inside `<think>`.

        Raises RequestError for an empty stop string.
        """
        self._reasoning = ReasoningSplitter(thinking_open, calls_end_it=bool(tools))
        self._calls = ToolCallParser(tools) if tools else None
        self._stops = StopStrings(stops)
        self._stopped = False

    def add(self, text: str) -> Delta:
        """What this piece of text made certain."""
        if self._stopped:
            return Delta(stopped=True)
        return self._sort(self._reasoning.add(text), last=False)

    def finish(self) -> Delta:
        """What was held back, when the text ends."""
        if self._stopped:
            return Delta(stopped=True)
        return self._sort(self._reasoning.finish(), last=True)

    def _sort(self, parts: list[Part], last: bool) -> Delta:
        reasoning = "".join(text for kind, text in parts if kind == "reasoning")
        answer = "".join(text for kind, text in parts if kind == "text")
        pieces: list[str | ToolCall] = self._calls.add(answer) if self._calls else [answer]
        if last and self._calls:
            pieces += self._calls.finish()
        texts: list[str] = []
        calls: list[ToolCall] = []
        for piece in pieces:
            if isinstance(piece, ToolCall):
                # A call ends the stretch of text before it: no stop string reaches across.
                texts.append(self._stops.finish())
                calls.append(piece)
                continue
            text, self._stopped = self._stops.add(piece)
            texts.append(text)
            if self._stopped:
                break
        if last:
            texts.append(self._stops.finish())
        return Delta("".join(texts), reasoning, tuple(calls), self._stopped)


def ends_inside_thinking(prompt: str) -> bool:
    """Whether a rendered prompt leaves `<think>` open, so that the answer begins with reasoning.

    Looks at the last turn only, and only if it is the assistant's: a user may write about the tag.
    """
    _before, marker, turn = prompt.rpartition("<|im_start|>")
    if marker:
        return turn.startswith("assistant") and turn.rfind("<think>") > turn.rfind("</think>")
    return prompt.rstrip().endswith("<think>")
