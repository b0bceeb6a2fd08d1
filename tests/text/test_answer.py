"""The whole chain: reasoning, tool calls and stop strings in one stream."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelocal.errors import RequestError
from moelocal.text.answer import AnswerParser, Delta, ends_inside_thinking
from moelocal.text.tool_calls import ToolCall

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {"type": "object", "properties": {"content": {"type": "string"}}},
        },
    }
]
CALL = "<tool_call>\n<function=write>\n<parameter=content>\na STOP b\n</parameter>\n</function>\n</tool_call>"
WRITE = ToolCall("write", {"content": "a STOP b"})


def run(text: str, cuts: tuple[int, ...] = (), **settings_of_parser: Any) -> Delta:
    """The sum of all deltas, fed until a stop string, as an engine does."""
    parser = AnswerParser(**{"thinking_open": False, "stops": (), "tools": TOOLS} | settings_of_parser)
    deltas = []
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for begin, end in pairwise(borders):
        deltas.append(parser.add(text[begin:end]))
        if deltas[-1].stopped:
            assert parser.add("more") == Delta(stopped=True)
            break
    deltas.append(parser.finish())
    return Delta(
        "".join(delta.text for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        tuple(call for delta in deltas for call in delta.tool_calls),
        deltas[-1].stopped,
    )


FRAGMENTS = ("<think>", "</think>", "\n", "STOP", "ST", CALL, "<tool_call>", "x", " ", "é")


@settings(max_examples=300)
@given(
    text=st.lists(st.sampled_from(FRAGMENTS), max_size=10).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=8).map(tuple),
    thinking_open=st.booleans(),
    stops=st.sampled_from([(), ("STOP",), ("x", "T\n")]),
    tools=st.sampled_from([None, TOOLS]),
)
def test_the_cuts_do_not_matter(text: str, cuts: tuple[int, ...], **settings_of_parser: Any) -> None:
    whole = run(text, **settings_of_parser)
    assert run(text, cuts, **settings_of_parser) == whole
    assert run(text, tuple(range(len(text))), **settings_of_parser) == whole


def test_everything_at_once() -> None:
    text = f"Let me write STOP.\n</think>\n\nWriting.\n\n{CALL}\n{CALL}"
    expected = Delta("Writing.", "Let me write STOP.", (WRITE, WRITE))
    for cut in range(len(text)):
        assert run(text, (cut,), thinking_open=True, stops=["STOP"]) == expected


def test_a_stop_string_ends_the_answer() -> None:
    assert run("one STOP two", stops=["STOP"]) == Delta("one ", stopped=True)
    assert run(f"one STOP two\n{CALL}", stops=["STOP"]) == Delta("one ", stopped=True)
    assert run(f"{CALL}\nSTOP", stops=["STOP"]) == Delta("\n", "", (WRITE,), stopped=True)


def test_a_stop_string_does_not_reach_across_a_call() -> None:
    assert run(f"ST{CALL}OP", stops=["STOP"]) == Delta("STOP", "", (WRITE,))


def test_the_delta_that_stops_says_so() -> None:
    parser = AnswerParser(thinking_open=False, stops=["STOP"])
    assert parser.add("one ST") == Delta("one ")
    assert parser.add("OP two") == Delta(stopped=True)
    assert parser.finish() == Delta(stopped=True)


def test_a_call_inside_open_reasoning() -> None:
    assert run(f"hm\n{CALL}", thinking_open=True) == Delta("", "hm", (WRITE,))


def test_without_tools_nothing_is_a_call() -> None:
    for tools in (None, []):
        assert run(f"Look:\n\n{CALL}\n", tools=tools) == Delta(f"Look:\n\n{CALL}\n")
        assert run(f"hm\n{CALL}\n</think>Hi", thinking_open=True, tools=tools) == Delta("Hi", f"hm\n{CALL}")


def test_a_call_that_is_cut_off_is_text() -> None:
    assert run(CALL[:-1]) == Delta(CALL[:-1])


def test_empty_stop_string() -> None:
    with pytest.raises(RequestError, match="stop strings must be non-empty strings, but got ''"):
        AnswerParser(thinking_open=False, stops=[""])


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nFirst", True),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<|im_start|>user\n<think>", False),
        ("<s>[INST] Hi [/INST]<think>\n", True),
        ("<think> is a tag. Go on", False),
        ("", False),
    ],
)
def test_whether_the_prompt_ends_inside_thinking(prompt: str, inside: bool) -> None:
    assert ends_inside_thinking(prompt) is inside
