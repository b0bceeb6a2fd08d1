"""One argument of a tool call: from the text that a model writes to a JSON value, as the tool's schema says.

The format has no types: templates write strings as they are and everything else as JSON (Qwen3.5 writes
Python's `True`, `False` and `None`). So `5` may be a string or a number, and only the schema can tell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})
_PYTHON_LITERALS = {"True": True, "False": False, "None": None}
UNREADABLE = object()


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a tool: `schemas` by name; `open`: whether others are to be expected as well."""

    schemas: Mapping[str, Any]
    open: bool

    def may_follow(self, current: str, name: str) -> bool:
        """Whether `<parameter=name>` after a closing tag in `current` is a parameter rather than text."""
        types = allowed_types(self.schemas.get(current))
        return self.open or name in self.schemas or (types is not None and "string" not in types)


ANY_PARAMETERS = Parameters({}, open=True)


def parameters_of(tool: Mapping[str, Any]) -> tuple[str, Parameters]:
    """The name of a tool (OpenAI form, or its `function` alone) and its parameters."""
    function = tool.get("function", tool)
    schema = function.get("parameters") or {}
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return function["name"], ANY_PARAMETERS
    return function["name"], Parameters(properties, open=bool(schema.get("additionalProperties", False)))


def parse_argument(text: str, schema: object) -> Any:
    """The value that `text` stands for under a JSON schema (`type`, `enum`, `const`, `anyOf`, `oneOf`,
    `allOf`, `nullable`, `properties` and `items` are understood, `$ref` is not).

    - Only strings allowed: the text as it is, whatever it looks like.
    - No strings allowed: the text read as JSON, or as True, False or None, if the result has an allowed type.
    - Strings and other types allowed, or no type known: another type only if the text is exactly the JSON
      that a template would write for it (`7`, not `007`); a string otherwise.

    What cannot be read as an allowed type stays a string: nothing is lost, and nothing raised.
    """
    for choice in _choices(schema):
        if choice == text or (not isinstance(choice, str) and json.dumps(choice) == text):
            return choice
    types = allowed_types(schema)
    if types == frozenset({"string"}):
        return text
    if types is not None and "string" not in types:
        bare = text.strip()
        value = _PYTHON_LITERALS[bare] if bare in _PYTHON_LITERALS else read_json(bare)
        value = _as_integer(value) if "integer" in types and "number" not in types else value
        return value if _type_matches(value, types) else text
    value = read_json(text)
    return value if _is_written_like_this(value, text) and _type_matches(value, types) else text


def allowed_types(schema: object) -> frozenset[str] | None:
    """The JSON types that a schema allows; None where it does not say."""
    if not isinstance(schema, Mapping):
        return None
    found: list[frozenset[str] | None] = []
    declared = schema.get("type")
    names = [declared] if isinstance(declared, str) else declared
    if (
        isinstance(names, Sequence)
        and names
        and all(name in _TYPES for name in names if isinstance(name, str))
    ):
        found.append(frozenset(name for name in names if isinstance(name, str)))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), Sequence):
            options = [allowed_types(option) for option in schema[key]]
            if options and None not in options:
                found.append(frozenset().union(*(option for option in options if option)))
    if isinstance(schema.get("allOf"), Sequence):
        found += [allowed_types(option) for option in schema["allOf"]]
    choices = _choices(schema)
    if choices:
        found.append(frozenset(_type_of(choice) for choice in choices))
    known = [types for types in found if types is not None]
    if not known:
        implied = [name for key, name in (("properties", "object"), ("items", "array")) if key in schema]
        known = [frozenset(implied)] if implied else []
    if not known:
        return None
    types = frozenset.intersection(*known)
    return types | {"null"} if schema.get("nullable") is True else types


def _choices(schema: object) -> list[Any]:
    if not isinstance(schema, Mapping):
        return []
    if "const" in schema:
        return [schema["const"]]
    choices = schema.get("enum")
    return list(choices) if isinstance(choices, list | tuple) else []


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = (
        (bool, "boolean"),
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (Mapping, "object"),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "array")


def _type_matches(value: Any, types: frozenset[str] | None) -> bool:
    if value is UNREADABLE:
        return False
    name = _type_of(value)
    return types is None or name in types or (name == "integer" and "number" in types)


def read_json(text: str) -> Any:
    """The JSON value of a text, integers exact whatever their size; `UNREADABLE` if it is none."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):  # ValueError also for integers of more than 4,300 digits
        return UNREADABLE


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a float")
    return value


def _as_integer(value: Any) -> Any:
    """5.0 is an integer to JSON schema; from 2^53 on a float no longer says which one."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _is_written_like_this(value: Any, text: str) -> bool:
    if value is UNREADABLE or isinstance(value, str):
        return False
    return json.dumps(value, ensure_ascii=False) == text
