"""What callers pass as messages and tools, validated and brought into the one form that chat templates
take."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moelocal.errors import RequestError
from moelocal.text.tool_calls import ToolCall

_SYSTEM = ("system", "developer")
_ROLES = (*_SYSTEM, "user", "assistant", "tool")
_KEYS = ("role", "content", "reasoning_content", "reasoning", "tool_calls", "tool_call_id", "name")
_MEDIA = ("image", "image_url", "input_image", "video", "video_url", "audio", "input_audio")
# Names stand inside <function=NAME> and <parameter=NAME>, so they must not end that tag or its line.
_NAME = re.compile(r"[^\s<>]{1,128}")
_PARAMETER_NAME = re.compile(r"[^>\n]{1,128}")


def prepare(messages: Sequence[Mapping[str, Any]] | str) -> list[dict[str, Any]]:
    """Messages as templates take them: one system message at most, at the beginning; contents as strings;
    tool arguments as objects; reasoning under `reasoning_content`. The input is not changed.

    - A string is one user message.
    - System and developer messages at the beginning are joined by an empty line into one system message.
    - A later one would make strict templates raise. It is folded into the conversation at its place, as
      `<system>\\n...\\n</system>`: before the text of the user message that follows it, else after the text
      of the user message before it, else as a user message of its own. (Templates that drop the reasoning of
      earlier questions count such a message as a question.) The beginning of the prompt stays what it was, so
      a prefix cache keeps its use.
    - Keys with the value None count as absent, because clients send them so.

    Raises RequestError naming the message for everything that is malformed, for images and other media, for
    an empty prompt, and when there is no user message.
    """
    if isinstance(messages, str):
        if not messages:
            raise RequestError("the prompt is empty")
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages must be a text or a non-empty list of messages")
    checked = [_message(f"message {index}", message) for index, message in enumerate(messages)]
    if not any(message["role"] == "user" for message in checked):
        raise RequestError("no message has the role 'user'; a conversation needs at least one")
    leading = 0
    while checked[leading]["role"] in _SYSTEM:
        leading += 1
    system = "\n\n".join(message["content"] for message in checked[:leading])
    head = [{"role": "system", "content": system}] if leading else []
    return head + _fold_system(checked[leading:])


def prepare_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Copies of the tools as {"type": "function", "function": {"name", ...}}; None if there are none.

    The flat form {"type": "function", "name", ...} is accepted too. Key order is kept, as templates print it.
    Raises RequestError naming the tool for anything malformed, and for two tools of one name.
    """
    if tools is None:
        return None
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise RequestError("tools must be a list of tool definitions")
    prepared = [_tool(f"tool {index}", tool) for index, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in prepared]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"two tools have the name {name!r}")
    return prepared or None


def _fold_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    folded: list[dict[str, Any]] = []
    pending: list[str] = []  # late system texts, waiting to see whether a user message follows
    for message in [*messages, None]:
        if message is not None and message["role"] in _SYSTEM:
            pending.append(f"<system>\n{message['content']}\n</system>")
            continue
        if pending:
            note = "\n\n".join(pending)
            pending = []
            if message is not None and message["role"] == "user":
                message["content"] = f"{note}\n\n{message['content']}"
            elif folded and folded[-1]["role"] == "user":
                folded[-1]["content"] += f"\n\n{note}"
            else:
                folded.append({"role": "user", "content": note})
        if message is not None:
            folded.append(message)
    return folded


def _message(where: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where}: expected a dict with role and content, found {type(message).__name__}")
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role")
    if role not in _ROLES:
        raise RequestError(f"{where}: role must be one of {', '.join(_ROLES)}, found {role!r}")
    unknown = [key for key in given if key not in _KEYS]
    if unknown:
        raise RequestError(
            f"{where}: unknown keys {', '.join(map(repr, unknown))}; known are {', '.join(_KEYS)}"
        )
    if role != "assistant":
        for key in ("reasoning_content", "reasoning", "tool_calls"):
            if key in given:
                raise RequestError(f"{where}: {key} belongs to the role 'assistant', not {role!r}")
    prepared: dict[str, Any] = {"role": role}
    reasoning = _reasoning(where, given)
    calls = _tool_calls(where, given.get("tool_calls", ()))
    if "content" in given:
        prepared["content"] = _content(where, given["content"])
    elif role == "assistant" and (calls or reasoning is not None):
        prepared["content"] = ""
    else:
        raise RequestError(f"{where}: content is missing")
    if reasoning is not None:
        prepared["reasoning_content"] = reasoning
    if calls:
        prepared["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if key in given:
            if not isinstance(given[key], str):
                raise RequestError(f"{where}: {key} must be a string, found {type(given[key]).__name__}")
            prepared[key] = given[key]
    return prepared


def _content(where: str, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(
            f"{where}: content must be a string or a list of parts, found {type(content).__name__}"
        )
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _MEDIA:
            raise RequestError(f"{where}: a part has the type {kind!r}, but this library reads text only")
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise RequestError(
                f'{where}: a part must be {{"type": "text", "text": "..."}}, found {part!r:.100}'
            )
        texts.append(text)
    return "".join(texts)  # as the templates join them


def _reasoning(where: str, given: Mapping[str, Any]) -> str | None:
    texts = [given[key] for key in ("reasoning_content", "reasoning") if key in given]
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"{where}: reasoning_content must be a string, found {type(text).__name__}")
    if len(set(texts)) > 1:
        raise RequestError(f"{where}: reasoning and reasoning_content differ; give one of them")
    return texts[0] if texts else None


def _tool_calls(where: str, calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise RequestError(f"{where}: tool_calls must be a list, found {type(calls).__name__}")
    return [_tool_call(f"{where}, tool call {index}", call) for index, call in enumerate(calls)]


def _tool_call(where: str, call: object) -> dict[str, Any]:
    if isinstance(call, ToolCall):
        call = {"id": call.id or None, "function": {"name": call.name, "arguments": call.arguments}}
    if not isinstance(call, Mapping):
        raise RequestError(f"{where}: expected a dict, found {type(call).__name__}")
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise RequestError(f"{where}: function must be a dict, found {type(function).__name__}")
    name = _name(where, function.get("name"))
    prepared: dict[str, Any] = {"type": "function"}
    if call.get("id") is not None:
        prepared["id"] = call["id"]
    prepared["function"] = {"name": name, "arguments": _arguments(where, function.get("arguments"))}
    return prepared


def _arguments(where: str, arguments: object) -> dict[str, Any]:
    """An object, a string that spells one (the OpenAI form), or nothing for a call without arguments."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}: arguments are not JSON ({error})") from error
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{where}: arguments must be an object, found {type(arguments).__name__}")
    _parameter_names(where, arguments)
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where}: arguments must be JSON values ({error})") from error
    return copy.deepcopy(dict(arguments))


def _tool(where: str, tool: object) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise RequestError(f"{where}: expected a dict, found {type(tool).__name__}")
    if tool.get("type", "function") != "function":
        raise RequestError(f"{where}: type must be 'function', found {tool['type']!r}")
    function = tool.get("function")
    if function is None:
        function = {key: value for key, value in tool.items() if key != "type"}
        tool = {"type": "function", "function": function}
    if not isinstance(function, Mapping):
        raise RequestError(f"{where}: function must be a dict, found {type(function).__name__}")
    _name(where, function.get("name"))
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise RequestError(f"{where}: parameters must be a JSON schema, found {type(parameters).__name__}")
    properties = parameters.get("properties") if parameters else None
    if isinstance(properties, Mapping):
        _parameter_names(where, properties)
    try:
        json.dumps(tool, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where}: must hold JSON values only ({error})") from error
    return copy.deepcopy(dict(tool))


def _parameter_names(where: str, names: Iterable[object]) -> None:
    for name in names:
        if not isinstance(name, str) or not _PARAMETER_NAME.fullmatch(name):
            raise RequestError(f"{where}: {name!r} cannot be the name of a parameter")


def _name(where: str, name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"{where}: name must be a string without spaces and < >, found {name!r}")
    return name
