"""Reasoning and answer, told apart in a stream."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelocal.text.reasoning import Part, ReasoningSplitter

FRAGMENTS = ("<think>", "</think>", "\n", " ", "<tool_call>", "<function=", "{", "a", "<", "</", "é")
TEXT = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)
CUTS = st.lists(st.integers(0, 80), max_size=8).map(tuple)


def split(text: str, inside: bool, cuts: tuple[int, ...] = (), calls_end_it: bool = True) -> tuple[str, str]:
    """The reasoning and the text; checks that they come in this order."""
    splitter = ReasoningSplitter(inside, calls_end_it=calls_end_it)
    parts: list[Part] = []
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for begin, end in pairwise(borders):
        parts += splitter.add(text[begin:end])
    parts += splitter.finish()
    kinds = [kind for kind, _ in parts]
    assert kinds == sorted(kinds)
    assert all(piece for _, piece in parts)
    return (
        "".join(piece for kind, piece in parts if kind == "reasoning"),
        "".join(piece for kind, piece in parts if kind == "text"),
    )


@settings(max_examples=300)
@given(text=TEXT, inside=st.booleans(), calls_end_it=st.booleans(), cuts=CUTS)
def test_the_cuts_do_not_matter(text: str, inside: bool, calls_end_it: bool, cuts: tuple[int, ...]) -> None:
    whole = split(text, inside, (), calls_end_it)
    assert split(text, inside, cuts, calls_end_it) == whole
    assert split(text, inside, tuple(range(len(text))), calls_end_it) == whole


CALL = "<tool_call>\n<function=f>"


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "answer"),
    [
        # As the templates write it.
        ("hm\n</think>\n\nHi", True, "hm", "Hi"),
        ("<think>\nhm\n</think>\n\nHi", False, "hm", "Hi"),
        ("\n\n<think>\nhm\n</think>\n\nHi\n", False, "hm", "Hi\n"),
        ("<think>\n\n</think>\n\nHi", False, "", "Hi"),
        ("\n</think>\n\nHi", True, "", "Hi"),
        # Only newlines around the tags go, and only there.
        ("\n a\n\nb \n</think>\n\n  c\n\nd", True, " a\n\nb ", "  c\n\nd"),
        ("hm</think>Hi", True, "hm", "Hi"),
        # No reasoning, or nothing but reasoning.
        ("Hi", False, "", "Hi"),
        ("\n Hi", False, "", "\n Hi"),
        ("", False, "", ""),
        ("", True, "", ""),
        ("hm\n", True, "hm\n", ""),
        ("<thi", False, "", "<thi"),
        ("hm </thi", True, "hm </thi", ""),
        # Tags elsewhere are text.
        ("So <think> opens", False, "", "So <think> opens"),
        ("So </think> closes", False, "", "So </think> closes"),
        ("a</think>b</think>c", True, "a", "b</think>c"),
        ("a <think> b</think>c", True, "a <think> b", "c"),
        # A tool call ends reasoning that was not closed; a mention of the tag does not.
        (f"hm\n\n{CALL}", True, "hm", CALL),
        ('hm\n<tool_call>{"name"', True, "hm", '<tool_call>{"name"'),
        (f"hm {CALL}</think>x", True, "hm ", f"{CALL}</think>x"),
        ("a <tool_call> b\n</think>\n\nc", True, "a <tool_call> b", "c"),
        ("a <tool_call>\n</think>\n\nc", True, "a <tool_call>", "c"),
        ("a <tool_call>\n<func", True, "a <tool_call>\n<func", ""),
        (f"a</think>b {CALL}", True, "a", f"b {CALL}"),
    ],
)
def test_what_is_reasoning(text: str, inside: bool, reasoning: str, answer: str) -> None:
    assert split(text, inside) == (reasoning, answer)
    for cut in range(len(text)):
        assert split(text, inside, (cut,)) == (reasoning, answer)


def test_without_tools_a_call_is_a_thought() -> None:
    text = f"I would write {CALL}\n</think>\n\nHi"
    assert split(text, True, calls_end_it=False) == (f"I would write {CALL}", "Hi")


def test_parts_come_as_soon_as_they_are_certain() -> None:
    splitter = ReasoningSplitter(True)
    assert splitter.add("one\n") == [("reasoning", "one")]
    assert splitter.add("two</th") == [("reasoning", "\ntwo")]
    assert splitter.add("is</think") == [("reasoning", "</this")]
    assert splitter.add(">\n") == []
    assert splitter.add("\nHi") == [("text", "Hi")]
    assert splitter.add("\n") == [("text", "\n")]
    assert splitter.finish() == []
