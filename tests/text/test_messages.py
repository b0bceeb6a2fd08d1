"""Messages and tools: what is accepted, what it becomes, and what is said about the rest."""

from __future__ import annotations

import copy
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.errors import RequestError
from moelocal.text.messages import prepare, prepare_tools
from moelocal.text.template import ChatTemplate
from moelocal.text.tool_calls import ToolCall

HI = {"role": "user", "content": "Hi"}


def system(content: str, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def assistant(content: str | None = "Hello", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: object, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}, **more}


def test_a_string_is_a_user_message() -> None:
    assert prepare("Hi") == [HI]


def test_what_is_fine_stays() -> None:
    messages = [
        system("Be brief."),
        HI,
        assistant("", reasoning_content="hm", tool_calls=[call({"a": 1}, id="c1")]),
        {"role": "tool", "content": "sunny", "tool_call_id": "c1", "name": "f"},
        assistant("Sunny."),
    ]
    assert prepare(messages) == messages


# System and developer messages


def test_leading_system_messages_become_one() -> None:
    messages = [system("a"), system("b", "developer"), system("c"), HI]
    assert prepare(messages) == [system("a\n\nb\n\nc"), HI]
    assert prepare([system("a", "developer"), HI]) == [system("a"), HI]


def test_a_later_one_goes_before_the_user_message_that_follows() -> None:
    messages = [HI, assistant(), system("b"), system("c", "developer"), HI]
    note = "<system>\nb\n</system>\n\n<system>\nc\n</system>"
    assert prepare(messages) == [HI, assistant(), {"role": "user", "content": f"{note}\n\nHi"}]


def test_or_after_the_user_message_before() -> None:
    for following in ([], [assistant()]):
        folded = {"role": "user", "content": "Hi\n\n<system>\nb\n</system>"}
        assert prepare([system("a"), HI, system("b"), *following]) == [system("a"), folded, *following]


def test_or_stands_alone() -> None:
    messages = [HI, assistant(), system("b")]
    assert prepare(messages) == [HI, assistant(), {"role": "user", "content": "<system>\nb\n</system>"}]


EMBEDDED = Path(str(files("moelocal"))) / "embedded" / "chat_template.jinja"
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool"])


@pytest.mark.skipif(not EMBEDDED.is_file(), reason="no embedded model in this checkout")
@given(roles=st.lists(ROLES, min_size=1, max_size=8).filter(lambda roles: "user" in roles))
def test_no_order_of_roles_upsets_a_strict_template(roles: list[str]) -> None:
    template = ChatTemplate(EMBEDDED.read_text(encoding="utf-8"))
    messages = [{"role": role, "content": f"text {index}"} for index, role in enumerate(roles)]
    rendered = template.render(prepare(messages))
    for message in messages:
        assert message["content"] in rendered


# Contents


def test_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert prepare([{"role": "user", "content": parts}]) == [{"role": "user", "content": "ab"}]


def test_none_counts_as_absent() -> None:
    # As the OpenAI client writes an assistant message.
    message = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "audio": None,
        "tool_calls": [call("{}")],
    }
    assert prepare([HI, message])[1] == {"role": "assistant", "content": "", "tool_calls": [call({})]}
    assert prepare([HI, assistant(None, reasoning="cut off")])[1] == assistant(
        "", reasoning_content="cut off"
    )


def test_reasoning_under_either_name() -> None:
    for keys in (["reasoning"], ["reasoning_content"], ["reasoning", "reasoning_content"]):
        message = assistant(**dict.fromkeys(keys, "hm"))
        assert prepare([HI, message])[1] == assistant(reasoning_content="hm")


def test_tool_calls_in_every_form() -> None:
    calls = [
        call('{"a": [1, "é"]}'),
        call(""),
        call(None),
        {"name": "f", "arguments": {"b": 2}},
        {"function": {"name": "f"}},
        ToolCall("f", {"c": None}, id="x"),
        ToolCall("f", {}),
    ]
    prepared = prepare([HI, assistant("", tool_calls=calls)])[1]["tool_calls"]
    assert prepared == [
        call({"a": [1, "é"]}),
        call({}),
        call({}),
        call({"b": 2}),
        call({}),
        call({"c": None}, id="x"),
        call({}),
    ]


def test_the_input_is_not_changed() -> None:
    arguments = {"a": [1]}
    messages = [HI, system("late"), assistant(tool_calls=[call(arguments)]), system("later"), HI]
    before = copy.deepcopy(messages)
    prepared = prepare(messages)
    assert messages == before
    prepared[1]["tool_calls"][0]["function"]["arguments"]["a"].append(2)
    assert arguments == {"a": [1]}


# Refusals


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("", "the prompt is empty"),
        ([], "messages must be a text or a non-empty list of messages"),
        (None, "messages must be a text or a non-empty list of messages"),
        ({"role": "user"}, "messages must be a text or a non-empty list of messages"),
        ([system("a")], "no message has the role 'user'; a conversation needs at least one"),
        ([assistant()], "no message has the role 'user'; a conversation needs at least one"),
        (["Hi"], "message 0: expected a dict with role and content, found str"),
        (
            [HI, {"role": "bot", "content": ""}],
            "message 1: role must be one of system, developer, user, assistant, tool, found 'bot'",
        ),
        (
            [{"content": "Hi"}],
            "message 0: role must be one of system, developer, user, assistant, tool, found None",
        ),
        (
            [{"role": ["user"], "content": "Hi"}],
            "message 0: role must be one of system, developer, user, assistant, tool, found ['user']",
        ),
        (
            [{**HI, "contnet": 1, 5: 2}],
            "message 0: unknown keys 'contnet', 5; known are role, content, reasoning_content, reasoning, "
            "tool_calls, tool_call_id, name",
        ),
        ([{"role": "user"}], "message 0: content is missing"),
        ([HI, assistant(None)], "message 1: content is missing"),
        (
            [{"role": "user", "content": 3}],
            "message 0: content must be a string or a list of parts, found int",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "message 0: a part has the type 'image_url', but this library reads text only",
        ),
        (
            [{"role": "user", "content": ["Hi"]}],
            'message 0: a part must be {"type": "text", "text": "..."}, found \'Hi\'',
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            'message 0: a part must be {"type": "text", "text": "..."}, found {\'type\': \'text\'}',
        ),
        ([{**HI, "tool_calls": []}], "message 0: tool_calls belongs to the role 'assistant', not 'user'"),
        (
            [HI, assistant(reasoning="a", reasoning_content="b")],
            "message 1: reasoning and reasoning_content differ; give one of them",
        ),
        ([HI, assistant(reasoning=3)], "message 1: reasoning_content must be a string, found int"),
        (
            [HI, {"role": "tool", "content": "x", "tool_call_id": 3}],
            "message 1: tool_call_id must be a string, found int",
        ),
        ([HI, assistant(tool_calls={})], "message 1: tool_calls must be a list, found dict"),
        ([HI, assistant(tool_calls=["f"])], "message 1, tool call 0: expected a dict, found str"),
        (
            [HI, assistant(tool_calls=[{"function": "f"}])],
            "message 1, tool call 0: function must be a dict, found str",
        ),
        (
            [HI, assistant(tool_calls=[{"name": "a b"}])],
            "message 1, tool call 0: name must be a string without spaces and < >, found 'a b'",
        ),
        (
            [HI, assistant(tool_calls=[call([])])],
            "message 1, tool call 0: arguments must be an object, found list",
        ),
        (
            [HI, assistant(tool_calls=[call("[1]")])],
            "message 1, tool call 0: arguments must be an object, found list",
        ),
        (
            [HI, assistant(tool_calls=[call("{")])],
            "message 1, tool call 0: arguments are not JSON (",
        ),
        (
            [HI, assistant(tool_calls=[call({"a>": 1})])],
            "message 1, tool call 0: 'a>' cannot be the name of a parameter",
        ),
        (
            [HI, assistant(tool_calls=[call({"a": {1}})])],
            "message 1, tool call 0: arguments must be JSON values (",
        ),
    ],
)
def test_bad_messages(messages: Any, error: str) -> None:
    with pytest.raises(RequestError) as caught:
        prepare(messages)
    # What follows a bracket is the wording of Python, which differs between versions.
    said = str(caught.value)
    assert (said.startswith(error) and said.endswith(")")) if error.endswith("(") else said == error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "tool_calls", "function", "name", "arguments", "type", "text"]
            ),
            inner | st.sampled_from(["user", "assistant", "function", "text"]),
            max_size=4,
        )
    ),
    max_leaves=15,
)


@given(messages=JSON)
def test_any_json_is_accepted_or_refused(messages: Any) -> None:
    try:
        prepare(messages)
    except RequestError:
        return
    assert isinstance(messages, str | list)


# Tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {}},
    },
}


def test_tools() -> None:
    assert prepare_tools(None) is None
    assert prepare_tools([]) is None
    prepared = prepare_tools([WEATHER])
    assert prepared == [WEATHER]
    assert prepared is not None and prepared[0]["function"] is not WEATHER["function"]
    assert list(prepared[0]["function"]) == ["name", "description", "parameters"]


def test_flat_tools() -> None:
    flat = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    assert prepare_tools([flat, {"name": "g"}]) == [WEATHER, {"type": "function", "function": {"name": "g"}}]


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ("tools", "tools must be a list of tool definitions"),
        (WEATHER, "tools must be a list of tool definitions"),
        ([3], "tool 0: expected a dict, found int"),
        ([{"type": "retrieval"}], "tool 0: type must be 'function', found 'retrieval'"),
        ([WEATHER, {"function": 3}], "tool 1: function must be a dict, found int"),
        ([{}], "tool 0: name must be a string without spaces and < >, found None"),
        ([{"name": "a\nb"}], "tool 0: name must be a string without spaces and < >, found 'a\\nb'"),
        ([{"name": "f", "parameters": []}], "tool 0: parameters must be a JSON schema, found list"),
        (
            [{"name": "f", "parameters": {"default": float("nan")}}],
            "tool 0: must hold JSON values only (",
        ),
        (
            [{"name": "f", "parameters": {"properties": {"a\nb": {}}}}],
            "tool 0: 'a\\nb' cannot be the name of a parameter",
        ),
        ([WEATHER, WEATHER], "two tools have the name 'get_weather'"),
    ],
)
def test_bad_tools(tools: Any, error: str) -> None:
    with pytest.raises(RequestError) as caught:
        prepare_tools(tools)
    # What follows a bracket is the wording of Python, which differs between versions.
    said = str(caught.value)
    assert (said.startswith(error) and said.endswith(")")) if error.endswith("(") else said == error
