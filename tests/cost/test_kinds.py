"""The rule table of kinds, row by row, and that its order is what decides."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.cost.fields import Prompt
from moelocal.cost.kinds import KINDS, NOT_RECORDED, OTHER, RULES, kind_of
from moelocal.cost.shapes import Entry


def asked(*turns: str, system: str = "", **prompt: object) -> str:
    """The kind of a call with these turns of the user."""
    messages = [("system", system)] if system else []
    for turn in turns:
        messages += [("user", turn), ("assistant", "Yes.")]
    return kind_of(Entry("x", "call", prompt=Prompt(tuple(messages[:-1]), **prompt)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Translate into German: good morning", "translation"),
        ("Summarise this article: Translation memory", "summarising"),
        ("tl;dr please", "summarising"),
        ("Classify the sentiment of this review: I love it", "classification"),
        ("Extract name and age: Ada is 36", "extraction"),
        ("Give me the parts as JSON object", "extraction"),
        ("Why does this fail?\n```\nx = [\n```", "code"),
        ("def add(a, b): return a - b", "code"),
        ("Refactor the loop, please", "code"),
        ("Write a function that sorts words", "code"),
        ("Draft an e-mail to my landlord", "writing"),
        ("Rewrite this paragraph: it was", "writing"),
        ("What is the capital of France?", "question answering"),
        ("is it cold on the moon", "question answering"),
        ("Hello!", "chat"),
        ("river engine harbour", "other"),
        ("", "other"),
    ],
)
def test_a_prompt_has_the_kind_of_its_words(text, kind):
    assert asked(text) == kind


def test_fields_of_the_request_decide_before_words():
    assert asked("What is it?", tools=({"type": "function"},)) == "tool use"
    assert asked("What is it?", wants_json=True) == "extraction"
    assert kind_of(Entry("x", "call", embedding=True)) == "embedding"
    assert kind_of(Entry("x", "call", tool_calls=True)) == "tool use"


def test_the_system_message_counts_where_the_user_says_nothing():
    assert asked("bonjour", system="You translate to English.") == "translation"
    assert asked("a long text", system="Summarize what the user sends.") == "summarising"


def test_several_turns_are_a_chat():
    assert asked("river", "harbour") == "chat"


def test_without_a_prompt_the_kind_is_not_recorded():
    assert kind_of(Entry("x", "call")) == NOT_RECORDED


def test_the_documentation_has_every_rule(root):
    text = (root / "docs/cost.md").read_text()
    for rule in RULES:
        assert f"| {rule.kind} | {rule.why} |" in text
    assert KINDS[-2:] == (OTHER, NOT_RECORDED)


@given(st.text(max_size=300))
def test_any_text_has_one_kind(text):
    assert asked(text) in KINDS


@pytest.mark.parametrize(
    "piece", ["class a ", "write ", "in ", "as ", "rate the ", "   ", "a?", "translate into"]
)
def test_no_text_takes_the_rules_long(piece):
    started = time.process_time()
    asked(piece * (1_000_000 // len(piece)))
    assert (
        time.process_time() - started < 1.0
    )  # a second for a megabyte: what grows with its square takes hours
