"""Arguments of tool calls: from text to value, led by the schema."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.text.tool_values import allowed_types, parse_argument

STRING = {"type": "string"}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {},
            STRING,
            {"type": "integer"},
            {"type": "number"},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "object"},
            {"type": "array"},
            {"type": ["string", "null"]},
            {"type": "integer", "nullable": True},
            {"enum": ["a", "1", 1, None]},
            {"const": 3},
            {"$ref": "#/x"},
            {"type": "unheard of"},
            {"type": 3},
        ]
    ),
    lambda inner: st.builds(
        lambda key, options: {key: options},
        st.sampled_from(["anyOf", "oneOf", "allOf"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=4,
)


def same(left: Any, right: Any) -> bool:
    """Equal, and of the same type all the way down (1 is not True, and not 1.0)."""
    return json.dumps(left) == json.dumps(right)


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "true",
        "007",
        "3",
        "",
        " ",
        "\n",
        "\n\n a \n",
        "[1]",
        '"quoted"',
        "None",
        "</parameter>",
        "<tool_call>",
    ],
)
def test_a_string_stays_byte_exact(text: str) -> None:
    for schema in (STRING, {"anyOf": [STRING]}, {"type": ["string"]}, {"type": "string", "minLength": 1}):
        assert parse_argument(text, schema) == text


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("9007199254740993", "integer", 9007199254740993),
        ("12345678901234567890123456789", "integer", 12345678901234567890123456789),
        ("9007199254740993", "number", 9007199254740993),
        ("-3", "integer", -3),
        (" 3\n", "integer", 3),
        ("5.0", "integer", 5),
        ("5.0", "number", 5.0),
        ("1e3", "integer", 1000),
        ("0.1", "number", 0.1),
        ("true", "boolean", True),
        ("False", "boolean", False),
        ("null", "null", None),
        ("None", "null", None),
        ('{"a": [1, "x"]}', "object", {"a": [1, "x"]}),
        ("[true, null]", "array", [True, None]),
        # Not of the type: the text, as it is.
        ("1", "boolean", "1"),
        ("true", "integer", "true"),
        ("5.5", "integer", "5.5"),
        ("9007199254740993.0", "integer", "9007199254740993.0"),
        ("007", "integer", "007"),
        ("five", "integer", "five"),
        ("", "integer", ""),
        ("NaN", "number", "NaN"),
        ("1e999", "number", "1e999"),
        ("9" * 5000, "integer", "9" * 5000),
        ("[1, 2", "array", "[1, 2"),
        ("[" * 100_000, "array", "[" * 100_000),
        ('{"a": 1}', "array", '{"a": 1}'),
        ("{'a': 1}", "object", "{'a': 1}"),
    ],
)
def test_one_type(text: str, schema: str, value: Any) -> None:
    assert same(parse_argument(text, {"type": schema}), value)


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 5),
        ("null", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("None", {"oneOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("5", {"anyOf": [{"type": "integer"}, STRING]}, 5),
        ("005", {"anyOf": [{"type": "integer"}, STRING]}, "005"),
        ("true", {"anyOf": [{"type": "integer"}, STRING]}, "true"),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": "string", "nullable": True}, None),
        ("None", {"type": ["string", "null"]}, "None"),
        ("nullable", {"type": ["string", "null"]}, "nullable"),
        ("5", {"allOf": [{"type": "integer"}, {"minimum": 0}]}, 5),
        ("5", {"type": ["string", "integer"], "allOf": [{"type": "string"}]}, "5"),
        ("1", {"enum": ["1", "2"]}, "1"),
        ("1", {"enum": [1, 2]}, 1),
        ("1", {"enum": [1, "x"]}, 1),
        ("7", {"enum": ["a", "b"]}, "7"),
        ("true", {"const": True}, True),
        ("True", {"const": True}, True),
        ('{"a": 1}', {"properties": {"a": {}}}, {"a": 1}),
        ("[1]", {"items": {}}, [1]),
        ("text", {"items": {}}, "text"),
    ],
)
def test_several_types(text: str, schema: dict[str, Any], value: Any) -> None:
    assert same(parse_argument(text, schema), value)


@pytest.mark.parametrize(
    "schema", [None, {}, {"description": "x"}, {"$ref": "#/x"}, {"type": "any"}, {"type": []}, True]
)
def test_no_type(schema: object) -> None:
    """Then only what a template would have written as JSON is not a string."""
    for text, value in [
        ("5", 5),
        ("true", True),
        ("null", None),
        ('{"a": [1, 2.5]}', {"a": [1, 2.5]}),
        ("1.0", 1.0),
        ("12345678901234567890", 12345678901234567890),
        ("005", "005"),
        (" 5", " 5"),
        ("1e3", "1e3"),
        ('{"a":1}', '{"a":1}'),
        ('"x"', '"x"'),
        ("True", "True"),
        ("NaN", "NaN"),
        ("", ""),
    ]:
        assert same(parse_argument(text, schema), value)


def test_allowed_types() -> None:
    assert allowed_types({"anyOf": [{"type": "integer"}, {}]}) is None
    assert allowed_types({"anyOf": [{"type": "integer"}, STRING]}) == {"integer", "string"}
    assert allowed_types({"enum": [1, 1.5, True, None, "a", [], {}]}) == {
        "integer",
        "number",
        "boolean",
        "null",
        "string",
        "array",
        "object",
    }


@given(value=JSON_VALUES.filter(lambda value: not isinstance(value, str)), schema=st.sampled_from([None, {}]))
def test_json_without_a_type_comes_back(value: Any, schema: object) -> None:
    assert same(parse_argument(json.dumps(value, ensure_ascii=False), schema), value)


@given(text=st.text() | JSON_VALUES.map(json.dumps), schema=SCHEMAS)
def test_never_raises_and_loses_nothing(text: str, schema: dict[str, Any]) -> None:
    value = parse_argument(text, schema)
    if isinstance(value, str):
        assert value == text
