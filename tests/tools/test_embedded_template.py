"""The template shipped with the embedded model against renderings written down here: these need nothing beside the
checkout. tests/text/test_template.py compares it with Qwen3.6's own renderings where those are at hand."""

from __future__ import annotations

from typing import Any

import pytest

from moelocal.errors import TemplateError
from moelocal.hub import EMBEDDED
from moelocal.text.template import ChatTemplate


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate.open(EMBEDDED)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


CALL = {"function": {"name": "add", "arguments": {"a": 1, "of": {"x": True}, "note": "<é> & 'b'"}}}
CALL_TEXT = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n"
    '<parameter=of>\n{"x": true}\n</parameter>\n'
    "<parameter=note>\n<é> & 'b'\n</parameter>\n</function>\n</tool_call>"
)
ASK = "<|im_start|>user\nHi<|im_end|>\n"
OPEN = "<|im_start|>assistant\n<think>\n"
TWO_TURNS = [user("Hi"), assistant("Hello", reasoning_content="greet"), user("Again")]


@pytest.mark.parametrize(
    ("messages", "arguments", "expected"),
    [
        ([user(" Hi\n")], {}, ASK + OPEN),
        ([user("Hi")], {"thinking": True}, ASK + OPEN),
        ([user("Hi")], {"thinking": False}, ASK + OPEN + "\n</think>\n\n"),
        (
            [{"role": "system", "content": "Be brief."}, user("Hi")],
            {},
            "<|im_start|>system\nBe brief.<|im_end|>\n" + ASK + OPEN,
        ),
        (
            TWO_TURNS,
            {},
            ASK + "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n" + OPEN,
        ),
        (
            [user("Hi"), assistant("<think>\ngreet\n</think>\n\nHello")],
            {"add_generation_prompt": False},
            ASK + OPEN + "greet\n</think>\n\nHello<|im_end|>\n",
        ),
        (
            [user("Hi"), assistant("First.", tool_calls=[CALL, CALL]), {"role": "tool", "content": "1"},
             {"role": "tool", "content": "2"}],
            {},
            ASK + OPEN + f"\n</think>\n\nFirst.\n\n{CALL_TEXT}\n{CALL_TEXT}<|im_end|>\n"
            "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
            "<|im_end|>\n" + OPEN,
        ),
        (
            [user([{"type": "image", "image": "x"}, {"type": "text", "text": "Hi"}])],
            {},
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n" + OPEN,
        ),
    ],
)  # fmt: skip
def test_a_chat_is_rendered(template, messages, arguments, expected):
    assert template.render(messages, **arguments) == expected


def test_tools_stand_in_the_system_turn_as_one_json_per_line(template):
    tools = [{"type": "function", "function": {"name": n, "description": "<&é>"}} for n in ("z", "a")]
    rendered = template.render([{"role": "system", "content": "Be brief."}, user("Hi")], tools=tools)
    listed = rendered.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert listed.splitlines() == [
        '{"type": "function", "function": {"name": "z", "description": "<&é>"}}',
        '{"type": "function", "function": {"name": "a", "description": "<&é>"}}',
    ]
    assert rendered.startswith("<|im_start|>system\n# Tools\n\n")
    assert rendered.endswith("</IMPORTANT>\n\nBe brief.<|im_end|>\n" + ASK + OPEN)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([assistant("x")], "No user query found in messages."),
        ([user("x"), {"role": "system", "content": "b"}], "System message must be at the beginning."),
        ([user("x"), {"role": "critic", "content": "b"}], "Unexpected message role."),
        ([user([{"type": "scent"}])], "Unexpected item type in content."),
        ([user(5)], "Unexpected content type."),
        (
            [{"role": "system", "content": [{"type": "image", "image": "x"}]}, user("x")],
            "System message cannot contain images.",
        ),
    ],
)
def test_what_cannot_be_rendered_raises(template, messages, text):
    with pytest.raises(TemplateError) as raised:
        template.render(messages)
    assert str(raised.value) == f"the chat template failed: {text}"
