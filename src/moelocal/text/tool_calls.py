"""Tool calls in the text of a model, parsed as they stream in.

Two formats, both between `<tool_call>` and `</tool_call>`: the XML of Qwen3.5, Qwen3.6 and the Coder models

    <function=NAME>\\n<parameter=P>\\nVALUE\\n</parameter>\\n</function>

and the JSON of Qwen3, `{"name": ..., "arguments": {...}}`. The XML escapes nothing, so a value may contain
anything, also the tags themselves. The rules that decide where a value ends are written at `ToolCallParser`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moelocal.text.json_scan import JsonObjectScanner
from moelocal.text.partial import partial_suffix
from moelocal.text.tool_values import ANY_PARAMETERS, Parameters, parameters_of, parse_argument, read_json

_BLOCK, _BLOCK_END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END, _PARAMETER = "<function=", "</function>", "<parameter="
_NAME = re.compile(r"([^>\n]{1,128})>")
_NAME_BEGUN = re.compile(r"[^>\n]{0,128}\Z")
# No pattern matches more characters than this, so a longer tail need not be searched again.
_LONGEST_TAG = 256

_Layout = Literal["nested", "flat", "lenient"]
_SECOND_READINGS: tuple[_Layout, ...] = ("flat", "lenient")


def _value_tags(value_end: str) -> re.Pattern[str]:
    """The three things that matter inside a value: a complete call that begins there, its end or that of this
    call, and the next parameter. White space is bounded, so that a match has a bounded length."""
    return re.compile(
        r"(?P<opens>\n<tool_call>\s{0,8}<function=)"
        rf"|(?P<ends>{value_end}\s{{0,8}})?</function>\s{{0,8}}(?P<after></tool_call>|<function=)"
        rf"|{value_end}\s{{0,8}}<parameter=(?P<next>[^>\n]{{1,128}})>"
    )


_ON_LINES = _value_tags(r"\n</parameter>")  # the layout of the templates
_INLINE = _value_tags(r"\n?</parameter>")  # <parameter=city>Paris</parameter>
_LENIENT = _value_tags(r"(?:\n?</parameter>|\n?)")  # a closing tag is missing or stands on the wrong line


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete call. `arguments` are JSON values. The formats carry no `id`; a server may add one."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


class ToolCallParser:
    """Takes text in pieces and gives back the text between calls and the complete calls, in order.

    The result does not depend on how the text was cut. Nothing is lost: what begins like a call and turns out
    not to be one is text, and so is a call that is cut off by the end. White space that separates text from a
    call, calls from each other, or a call from the end is dropped.

    `tools` (OpenAI form) give the arguments their types, see `parse_argument`. Before the name of one of them
    `<tool_call>` may be missing (Coder models leave it out at times), `</tool_call>` may not.

    A value keeps every byte between the newline after `<parameter=P>` and the newline before its closing tag.
    `</parameter>` closes it only when followed by

    - the next `<parameter=Q>`, where this call has no Q yet, and the tool knows Q. If the tool does not list
      its parameters, allows additional ones, or the value cannot be a string, any Q that the call does not
      have will do.
    - `</function>` and after it `</tool_call>` or the next `<function=`.

    Complete calls inside a value (a file that explains this format, say) are skipped by counting. So a value
    is cut too early only if it holds such a closing sequence outside of a complete call: the format cannot
    express it. A value that begins a call and does not complete it delays its call to the end of the text.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        self._tools = dict(parameters_of(tool) for tool in tools or ())
        self._openings = (_BLOCK, *(f"{_FUNCTION}{name}>" for name in self._tools))
        self._buffer = ""
        self._out: list[str | ToolCall] = []
        self._after_call = False  # only white space came since the last call
        self._layout: _Layout = "nested"
        self._begin_outside()

    def add(self, text: str) -> list[str | ToolCall]:
        """The text and the calls that are certain now; adjacent texts are not joined."""
        self._buffer += text
        return self._advance()

    def finish(self) -> list[str | ToolCall]:
        """What was held back, when the text ends.

        A call may be open because calls inside its values do not pair up, or because its layout is damaged
        (a missing `</parameter>`, say). If the text ends with `</tool_call>`, so that nothing seems cut off,
        it is read again: first without pairing, then leniently.
        """
        out: list[str | ToolCall] = []
        for self._layout in _SECOND_READINGS:
            if self._inside and self._buffer.rstrip().endswith(_BLOCK_END):
                self._rewind()
                out += self._advance()
        held, self._buffer = self._buffer, ""
        if held.strip() or not self._after_call:
            out += [held] if held else []
        self._begin_outside()
        return out

    # The states. Each is a method that returns True when it made progress and False when it needs more text.

    def _advance(self) -> list[str | ToolCall]:
        while self._state():
            pass
        out, self._out = self._out, []
        return out

    def _begin_outside(self) -> None:
        self._inside = False
        self._state = self._outside

    def _outside(self) -> bool:
        found = [begin for opening in self._openings if (begin := self._buffer.find(opening)) >= 0]
        safe = min(found, default=len(self._buffer) - partial_suffix(self._buffer, self._openings))
        # White space may turn out to separate text from a call; it waits.
        text = len(self._buffer[:safe].rstrip())
        self._emit_text(text)
        if not found:
            return False
        self._inside = True
        self._block = safe - text
        self._rewind()
        return True

    def _rewind(self) -> None:
        """Go to the beginning of the block, just after its first tag."""
        first = _BLOCK if self._buffer.startswith(_BLOCK, self._block) else ""
        self._at = self._block + len(first)
        self._state = self._opening if first else self._function

    def _opening(self) -> bool:
        """After `<tool_call>`."""
        tag = self._tag(_FUNCTION, "{")
        if tag == "{":
            self._scanner = JsonObjectScanner(self._at)
            self._state = self._json
        elif tag:
            self._state = self._function
        return self._found(tag)

    def _json(self) -> bool:
        end = self._scanner.end(self._buffer)
        if end is None:
            return False
        begin, self._at = self._at, end
        tag = self._tag(_BLOCK_END)
        if tag:
            call = _read_json_call(self._buffer[begin:end])
            if call is None:
                self._disprove()
                return True
            self._emit_call(call, self._at + len(tag))
        elif tag is None:
            self._at = begin
        return self._found(tag)

    def _function(self) -> bool:
        """At `<function=`."""
        name = self._name(len(_FUNCTION))
        if name:
            self._call = ToolCall(name, {})
            self._state = self._body
        return self._found(name)

    def _body(self) -> bool:
        """Between the parameters of a function."""
        tag = self._tag(_PARAMETER, _FUNCTION_END)
        if tag == _FUNCTION_END:
            self._at += len(tag)
            self._state = self._function_end
        elif tag:
            self._state = self._parameter
        return self._found(tag)

    def _parameter(self) -> bool:
        """At `<parameter=`."""
        begin = self._at
        name = self._name(len(_PARAMETER))
        if name and self._at == len(self._buffer):
            self._at = begin  # the next character decides about the layout
            return False
        if name:
            self._parameter_name = name
            on_line = self._buffer.startswith("\n", self._at)
            self._tags = _LENIENT if self._layout == "lenient" else _ON_LINES if on_line else _INLINE
            self._value = self._at + on_line
            self._depth = 0
            self._state = self._in_value
        return self._found(name)

    def _in_value(self) -> bool:
        # The newline before the value may be that of its closing tag: an empty value on one line less.
        for match in self._tags.finditer(self._buffer, self._at):
            if match["opens"]:
                self._depth += self._layout == "nested"
            elif self._depth:
                self._depth -= match["after"] == _BLOCK_END
            elif match["ends"] is not None or self._may_follow(match["next"]):
                self._end_value(match)
                return True
            self._at = match.end()
        self._at = max(self._at, len(self._buffer) - _LONGEST_TAG)
        return False

    def _may_follow(self, name: str | None) -> bool:
        if name is None or name == self._parameter_name or name in self._call.arguments:
            return False
        return self._parameters().may_follow(self._parameter_name, name)

    def _end_value(self, match: re.Match[str]) -> None:
        text = self._buffer[self._value : max(self._value, match.start())]
        schema = self._parameters().schemas.get(self._parameter_name)
        self._call.arguments[self._parameter_name] = parse_argument(text, schema)
        end = match.start("after") if match["next"] is None else match.start("next")
        tag = _FUNCTION_END if match["next"] is None else _PARAMETER
        self._at = self._buffer.rindex(tag, match.start(), end)
        self._state = self._body

    def _function_end(self) -> bool:
        """After `</function>`."""
        tag = self._tag(_BLOCK_END, _FUNCTION)
        if tag:
            self._emit_call(self._call, self._at + len(tag) * (tag == _BLOCK_END))
        if tag == _FUNCTION:  # a second function in the same block
            self._inside, self._block, self._at = True, 0, 0
            self._state = self._function
        return self._found(tag)

    # Helpers

    def _tag(self, *tags: str) -> str | None:
        """Skip white space and say which tag comes; "" if none of them can, None while it is open."""
        ahead = self._buffer[self._at : self._at + _LONGEST_TAG]
        rest = ahead.lstrip()
        for tag in tags:
            if rest.startswith(tag):
                self._at += len(ahead) - len(rest)
                return tag
        # A run of white space without end is no call, and must not be looked at again and again.
        possible = len(ahead) < _LONGEST_TAG and any(tag.startswith(rest) for tag in tags)
        return None if possible else ""

    def _name(self, skip: int) -> str | None:
        """The name that follows after `skip` characters; "" if there is none, None while it is open."""
        match = _NAME.match(self._buffer, self._at + skip)
        if match:
            self._at = match.end()
            return match[1]
        return None if _NAME_BEGUN.match(self._buffer, self._at + skip) else ""

    def _found(self, what: str | None) -> bool:
        """Turn the answer of `_tag` or `_name` into progress; "" disproves the call."""
        if what == "":
            self._disprove()
        return what is not None

    def _disprove(self) -> None:
        """No call begins here: its first character is text, the rest is searched again."""
        self._emit_text(self._block + 1)
        self._begin_outside()

    def _parameters(self) -> Parameters:
        return self._tools.get(self._call.name, ANY_PARAMETERS)

    def _emit_text(self, length: int) -> None:
        if length:
            self._out.append(self._buffer[:length])
            self._after_call = False
        self._buffer = self._buffer[length:]

    def _emit_call(self, call: ToolCall, end: int) -> None:
        self._out.append(call)
        self._after_call = True
        self._buffer = self._buffer[end:]
        self._begin_outside()


def _read_json_call(text: str) -> ToolCall | None:
    content = read_json(text)
    if not isinstance(content, dict):
        return None
    name, arguments = content.get("name"), content.get("arguments", {})
    if isinstance(arguments, str):
        arguments = read_json(arguments)
    return ToolCall(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None
