"""Tool calls: hostile values come back byte for byte, and the cuts of the stream do not matter."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moelocal.text.template import ChatTemplate
from moelocal.text.tool_calls import ToolCall, ToolCallParser


def tool(name: str, properties: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", **more} | ({} if properties is None else {"properties": properties})
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
EVERY_TYPE = tool("every", {kind: {"type": kind} for kind in TYPES})
WRITE = tool("write", {"path": {"type": "string"}, "content": {"type": "string"}})
TOOLS = [EVERY_TYPE, WRITE]


def render(*calls: ToolCall) -> str:
    """As the template of Qwen3.6 writes calls."""
    blocks = []
    for call in calls:
        texts = {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in call.arguments.items()
        }
        parameters = "".join(f"<parameter={name}>\n{text}\n</parameter>\n" for name, text in texts.items())
        blocks.append(f"<tool_call>\n<function={call.name}>\n{parameters}</function>\n</tool_call>")
    return "\n".join(blocks)


def parse(text: str, tools: Any = None, cuts: tuple[int, ...] = ()) -> list[str | ToolCall]:
    """Texts and calls in order, neighbouring texts joined, so that only the cuts could make a difference."""
    parser, pieces = ToolCallParser(tools), []
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for begin, end in pairwise(borders):
        pieces += parser.add(text[begin:end])
    pieces += parser.finish()
    joined: list[str | ToolCall] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def every_cut(text: str, tools: Any = None) -> list[str | ToolCall]:
    whole = parse(text, tools)
    assert parse(text, tools, tuple(range(len(text)))) == whole
    for cut in range(len(text)):
        assert parse(text, tools, (cut,)) == whole
    return whole


# Strings that look like the format

FRAGMENTS = (
    "\n",
    "</parameter>",
    "<parameter=path>",
    "<parameter=content>",
    "<parameter=other>",
    "</function>",
    "<function=write>",
    "<tool_call>",
    "</tool_call>",
    "{",
    "}",
    " ",
    "null",
    "true",
    "007",
    "é",
    "🦖",
)
HOSTILE = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=12).map("".join)
CLOSING = re.compile(r"\n</parameter>\s*(<parameter=|</function>\s*(</tool_call>|<function=))")
OPENING = re.compile(r"\n<tool_call>\s*<function=")


def ambiguous(value: str) -> bool:
    """What the format cannot express: a value with the closing sequence itself."""
    return CLOSING.search(f"\n{value}") is not None


EXPRESSIBLE = HOSTILE.filter(lambda value: not ambiguous(value))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=5,
)
VALUES = {
    "string": EXPRESSIBLE,
    "integer": st.integers(),
    "number": st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    "boolean": st.booleans(),
    "null": st.none(),
    "array": st.lists(JSON_VALUES, max_size=3),
    "object": st.dictionaries(HOSTILE, JSON_VALUES, max_size=3),
}
EVERY_CALL = st.fixed_dictionaries({}, optional=VALUES).map(lambda arguments: ToolCall("every", arguments))
WRITE_CALL = st.fixed_dictionaries({"path": EXPRESSIBLE, "content": EXPRESSIBLE}).map(
    lambda arguments: ToolCall("write", arguments)
)
CUTS = st.lists(st.integers(0, 300), max_size=8).map(tuple)


def types_equal(left: ToolCall, right: ToolCall) -> bool:
    return left == right and json.dumps(left.arguments) == json.dumps(right.arguments)


@given(call=EVERY_CALL | WRITE_CALL, cuts=CUTS)
def test_a_call_comes_back(call: ToolCall, cuts: tuple[int, ...]) -> None:
    (parsed,) = parse(render(call), TOOLS, cuts)
    assert isinstance(parsed, ToolCall)
    assert types_equal(parsed, call)


@given(calls=st.lists(EVERY_CALL | WRITE_CALL, min_size=2, max_size=4), before=EXPRESSIBLE, cuts=CUTS)
def test_several_calls_come_back(calls: list[ToolCall], before: str, cuts: tuple[int, ...]) -> None:
    strings = [value for call in calls for value in call.arguments.values() if isinstance(value, str)]
    assume(not any(OPENING.search(f"\n{value}") for value in strings))  # it would pair with the next call
    assume("<tool_call>" not in before and "<function=" not in before)
    parsed = parse(f"{before}\n\n{render(*calls)}", TOOLS, cuts)
    assert parsed == ([before.rstrip()] if before.strip() else []) + calls


@given(value=EXPRESSIBLE, cuts=CUTS)
def test_strings_without_a_schema(value: str, cuts: tuple[int, ...]) -> None:
    call = ToolCall("f", {"a": value, "b": ""})
    (parsed,) = parse(render(call), None, cuts)
    assert isinstance(parsed, ToolCall)
    try:
        spelled = json.loads(value)
    except ValueError:
        spelled = value
    assert parsed.arguments["a"] in (value, spelled)
    assert isinstance(parsed.arguments["a"], str) or json.dumps(spelled, ensure_ascii=False) == value


@given(pieces=st.lists(HOSTILE | st.just(render(ToolCall("write", {"path": "a"}))), max_size=4), cuts=CUTS)
@settings(max_examples=300)
def test_cuts_never_matter_and_nothing_is_lost(pieces: list[str], cuts: tuple[int, ...]) -> None:
    text = "".join(pieces)
    parsed = parse(text, TOOLS, cuts)
    assert parsed == parse(text, TOOLS) == parse(text, TOOLS, tuple(range(len(text))))
    if not any(isinstance(piece, ToolCall) for piece in parsed):
        assert "".join(map(str, parsed)) == text


def test_every_single_cut() -> None:
    call = ToolCall(
        "every", {"string": "a\n</parameter>\n", "object": {"b": "</tool_call>"}, "integer": 10**20}
    )
    text = "Let me look.\n\n" + render(call, ToolCall("write", {})) + "\nDone <tool_call> now"
    assert every_cut(text, TOOLS) == ["Let me look.", call, ToolCall("write", {}), "\nDone <tool_call> now"]


@given(call=EVERY_CALL | WRITE_CALL, data=st.data())
def test_a_cut_off_call_is_text(call: ToolCall, data: st.DataObject) -> None:
    strings = [value for value in call.arguments.values() if isinstance(value, str)]
    assume(not any("</tool_call>" in value for value in strings))
    text = "So: " + render(call)
    cut = data.draw(st.integers(0, len(text) - 1))
    assert parse(text[:cut], TOOLS) == ([text[:cut]] if cut else [])


# Values with whole calls in them


def test_a_file_about_this_format() -> None:
    example = render(ToolCall("every", {"string": "x", "integer": 1}), ToolCall("write", {}))
    content = f"# How calls look\n\n{example}\n\nThat is all.\n"
    call = ToolCall("write", {"path": "calls.md", "content": content})
    assert every_cut(render(call, call), TOOLS) == [call, call]


def test_the_beginning_of_a_call_in_a_value() -> None:
    call = ToolCall("write", {"path": "x", "content": "<tool_call>\n<function=write>\n<parameter=path>\n"})
    assert every_cut(render(call), TOOLS) == [call]


# Which parameter may follow

UNLISTED = (
    "<tool_call>\n<function={}>\n<parameter={}>\n{}\n</parameter>\n<parameter=new>\n5\n</parameter>\n"
    "</function>\n</tool_call>"
)


def test_an_unknown_parameter_after_a_string_is_its_text() -> None:
    (call,) = parse(UNLISTED.format("write", "path", "a"), TOOLS)
    assert call == ToolCall("write", {"path": "a\n</parameter>\n<parameter=new>\n5"})


@pytest.mark.parametrize(
    "tools",
    [
        None,
        [tool("other", {})],
        [tool("write", None)],
        [tool("write", {"path": {"type": "string"}}, additionalProperties=True)],
        [tool("write", {"path": {"type": "string"}}, additionalProperties={"type": "integer"})],
        [{"type": "function", "function": {"name": "write"}}],
        [{"type": "function", "function": {"name": "write", "parameters": {"properties": 3}}}],
    ],
)
def test_an_unknown_parameter_where_any_may_come(tools: Any) -> None:
    (call,) = parse(UNLISTED.format("write", "path", "a"), tools)
    assert call == ToolCall("write", {"path": "a", "new": 5})


def test_an_unknown_parameter_after_an_object() -> None:
    (call,) = parse(UNLISTED.format("every", "object", '{"a": 1}'), TOOLS)
    assert call == ToolCall("every", {"object": {"a": 1}, "new": 5})


def test_a_parameter_does_not_come_twice() -> None:
    content = "a\n</parameter>\n<parameter=path>\nb\n</parameter>\n<parameter=content>\nc"
    call = ToolCall("write", {"path": "p", "content": content})
    assert parse(render(call), TOOLS) == [call]


# Layouts that models slip into


BLOCK = "<tool_call>\n<function=write>\n{}</function>\n</tool_call>"


@pytest.mark.parametrize(
    "text",
    [
        BLOCK.format("<parameter=path>a</parameter>\n<parameter=content>b c</parameter>\n"),
        BLOCK.format("<parameter=path>a</parameter><parameter=content>b c</parameter>").replace("\n", ""),
        # The last closing tag on the line of the value, or missing.
        BLOCK.format("<parameter=path>\na\n</parameter>\n<parameter=content>\nb c</parameter>\n"),
        BLOCK.format("<parameter=path>\na\n</parameter>\n<parameter=content>\nb c\n"),
        BLOCK.format("<parameter=path>\na\n<parameter=content>\nb c</parameter>\n") + "\n",
    ],
)
def test_other_layouts(text: str) -> None:
    assert every_cut(text, TOOLS) == [ToolCall("write", {"path": "a", "content": "b c"})]


def test_tags_on_the_wrong_line_are_text_if_the_call_can_be_read() -> None:
    text = BLOCK.format("<parameter=path>\na</parameter>\n<parameter=content>\nb\n</parameter>\n")
    assert every_cut(text, TOOLS) == [ToolCall("write", {"path": "a</parameter>\n<parameter=content>\nb"})]


def test_an_empty_value_in_either_layout() -> None:
    for value in ("", "\n"):
        text = f"<tool_call>\n<function=f>\n<parameter=a>\n{value}</parameter>\n</function>\n</tool_call>"
        assert every_cut(text) == [ToolCall("f", {"a": ""})]


def test_the_first_tag_is_missing() -> None:
    call = ToolCall("write", {"path": "a"})
    text = "Let me see.\n" + render(call, call).replace("<tool_call>\n", "")
    assert every_cut(text, TOOLS) == ["Let me see.", call, call]
    assert every_cut(text) == [text]
    only_function = render(call)[len("<tool_call>\n") : -len("</tool_call>")]
    assert every_cut(only_function, TOOLS) == [only_function]


def test_two_functions_in_one_block() -> None:
    text = render(ToolCall("write", {"path": "a"}), ToolCall("every", {"integer": 2}))
    text = text.replace("</tool_call>\n<tool_call>\n", "")
    assert every_cut(text, TOOLS) == [ToolCall("write", {"path": "a"}), ToolCall("every", {"integer": 2})]


def test_a_second_function_that_is_cut_off_is_text() -> None:
    text = render(ToolCall("write", {"path": "a"}), ToolCall("every", {"integer": 2}))
    text = text.replace("</tool_call>\n<tool_call>\n", "").removesuffix("\n</tool_call>")
    assert every_cut(text, TOOLS)[0] == ToolCall("write", {"path": "a"})
    assert every_cut(text, TOOLS)[1] == text[text.index("<function=every>") :]


# Text that is no call


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a < b",
        "<tool_call>",
        "the tag <tool_call> opens it",
        "<tool_call>\nplain</tool_call>",
        "<tool_call>\n<function=f\n></function></tool_call>",
        "<tool_call>\n<function=></function></tool_call>",
        "<tool_call>\n<function=f>\ntext\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=\n></parameter></function></tool_call>",
        "<tool_call>\n<function=f>\n</function>\n",
        "<tool_call>\n<function=f>\n</function> and so on </tool_call>",
        f"<tool_call>\n<function={'f' * 200}>\n</function>\n</tool_call>",
        "<function=f>\n</function>",
        "<tool_call>" + "\n" * 300,
        "</tool_call>",
        '<tool_call>\n{"name": "f"\n</tool_call>',
        '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>',
        "<tool_call>\n{'name': 'f'}\n</tool_call>",
        '<tool_call>\n{"name": "f"} more\n</tool_call>',
        "<tool_call>\n" + '{"a":' * 100_000,
    ],
)
def test_text_that_is_no_call(text: str) -> None:
    assert parse(text, TOOLS) == ([text] if text else [])
    assert parse(text, TOOLS, tuple(range(min(len(text), 300)))) == ([text] if text else [])


def test_text_is_released_as_soon_as_it_cannot_be_a_call() -> None:
    parser = ToolCallParser(TOOLS)
    assert parser.add("one <tool") == ["one"]
    assert parser.add("box>") == [" <toolbox>"]
    assert parser.add(" <tool_call> ") == []
    assert "".join(map(str, parser.add("two"))) == " <tool_call> two"


def test_a_call_after_a_false_start() -> None:
    text = f"<tool_call> looks so:\n<tool_call>\n{render(ToolCall('write', {}))}"
    assert every_cut(text, TOOLS) == ["<tool_call> looks so:\n<tool_call>", ToolCall("write", {})]


def test_text_after_a_call_keeps_its_white_space() -> None:
    assert every_cut(f"{render(ToolCall('write', {}))}\n\nDone. \n", TOOLS) == [
        ToolCall("write", {}),
        "\n\nDone. \n",
    ]


# The JSON form of Qwen3


@given(
    arguments=st.dictionaries(HOSTILE, JSON_VALUES, max_size=4),
    name=st.text(min_size=1, max_size=9),
    ascii_only=st.booleans(),
    cuts=CUTS,
)
def test_json_calls_come_back(
    arguments: dict[str, Any], name: str, ascii_only: bool, cuts: tuple[int, ...]
) -> None:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii_only)
    call = ToolCall(name, arguments)
    text = f"<tool_call>\n{body}\n</tool_call>"
    assert parse(f"{text}\n{text}", None, cuts) == [call, call]


def test_json_calls_in_other_forms() -> None:
    string = json.dumps({"arguments": json.dumps({"a": 2**70}), "name": "f"}, indent=2)
    text = f'<tool_call>{string}</tool_call><tool_call>\n{{"name": "g"}}\n</tool_call>'
    assert every_cut(text) == [ToolCall("f", {"a": 2**70}), ToolCall("g", {})]


# Templates of real models


@pytest.mark.parametrize(
    "name", ["qwen3.6_chat_template", "qwen3.5_chat_template", "qwen3-coder-next_chat_template"]
)
def test_what_a_real_template_writes(templates: Path, name: str) -> None:
    template = ChatTemplate((templates / f"{name}.jinja").read_text(encoding="utf-8"))
    arguments = {
        "string": "null",
        "integer": 9007199254740993,
        "number": 0.1,
        "boolean": False,
        "null": None,
        "array": [True, None, "<é>"],
        "object": {"a": "</parameter>"},
    }
    calls = [ToolCall("every", arguments), ToolCall("write", {"path": "007", "content": "\n a \n\n"})]
    functions = [{"function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": functions},
    ]
    answer = template.render(messages, add_generation_prompt=False).partition("<|im_start|>assistant\n")[2]
    answer = answer.removeprefix("<think>\n\n</think>\n\n").removesuffix("<|im_end|>\n")
    parsed = parse(answer, TOOLS)
    assert parsed == calls
    assert json.dumps(parsed[0].arguments) == json.dumps(arguments)  # type: ignore[union-attr]
