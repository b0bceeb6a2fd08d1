"""The fields of a record: messages, usage, dates, names, as the APIs write them, checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

_MOST_TOKENS: Final = 10**10
"""In one call. More is a damaged number, and would hide all others in a sum."""
_TIMES: Final = ("timestamp", "created_at", "created", "time", "date", "start_time", "createdAt")
_FIRST: Final = datetime(2020, 1, 1, tzinfo=UTC)
"""An earlier date is none: nobody sold tokens, so it is a damaged number, and would spoil the volume per month."""
_NAME: Final = 120
_PLAIN_ROLES: Final = ("system", "developer", "user", "assistant")


class Malformed(Exception):
    """A line that is not what it begins to be; the message says where."""


class UnknownShape(Exception):
    """Valid JSON that is none of the forms; the message says what it looks like."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a call, each counted once: `fresh` input that no cache had, `cached` input read from the provider's
    cache, `written` to it for minutes and `written_hour` for an hour, `output` with the reasoning."""

    fresh: int = 0
    cached: int = 0
    written: int = 0
    written_hour: int = 0
    output: int = 0

    @property
    def prompt(self) -> int:
        """All input."""
        return self.fresh + self.cached + self.written + self.written_hour


@dataclass(frozen=True, slots=True)
class Prompt:
    """What was asked. `messages`: (role, text); `plain`: nothing but text of system, user and assistant, so that a text
    model can be asked again; `tools`: as OpenAI's functions."""

    messages: tuple[tuple[str, str], ...] = ()
    plain: bool = True
    tools: tuple[Mapping[str, Any], ...] = ()
    wants_json: bool = False


def clean(text: str) -> str:
    """A name from a log, fit to be printed: no control characters, no half surrogate pairs, not too long."""
    if len(text) <= _NAME and text.isprintable():
        return text
    printable = "".join(c if c.isprintable() else "?" for c in text[: _NAME + 1])
    return printable if len(printable) <= _NAME else printable[: _NAME - 1] + "…"


def prompt_of(request: Mapping[str, Any]) -> Prompt:
    """The messages of a request of any of the APIs."""
    messages: list[tuple[str, str]] = []
    plain = True
    for key in ("instructions", "system"):
        if request.get(key):
            text, only_text = text_of(request[key])
            messages.append(("system", text))
            plain = plain and only_text
    asked = next((request[key] for key in ("messages", "input", "prompt") if key in request), None)
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    if not isinstance(asked, list):
        raise Malformed(f"messages: expected a list, got {kind(asked)}")
    for index, message in enumerate(asked):
        if isinstance(message, str):  # embeddings, text completions
            message = {"role": "user", "content": message}
        message = as_object(message, f"messages[{index}]")
        role = message.get("role")
        text, only_text = text_of(message.get("content", message.get("output")))
        known = isinstance(role, str) and role in _PLAIN_ROLES
        plain = plain and only_text and known and not message.get("tool_calls")
        name = "system" if role == "developer" else clean(role) if isinstance(role, str) else "tool"
        messages.append((name, text))
    if request.get("previous_response_id"):
        plain = False  # the earlier turns are not on this line
    tools = request.get("tools")
    return Prompt(
        tuple(messages), plain, _tools(tools if isinstance(tools, list) else []), _wants_json(request)
    )


def _tools(tools: Iterable[object]) -> tuple[Mapping[str, Any], ...]:
    """Function tools as chat templates take them; a provider's own (web search) are left as their type."""
    found: list[Mapping[str, Any]] = []
    for tool in tools:
        if not isinstance(tool, dict):
            continue
        if "input_schema" in tool:  # Anthropic
            function = {"name": tool.get("name"), "description": tool.get("description") or ""}
            found.append({"type": "function", "function": function | {"parameters": tool["input_schema"]}})
        else:
            found.append(tool)
    return tuple(found)


def _wants_json(request: Mapping[str, Any]) -> bool:
    """Whether the request asks for JSON by a field of its API."""
    forms = [request.get("response_format"), request.get("output_format")]
    for key in ("text", "output_config"):
        holder = request.get(key)
        forms.append(holder.get("format") if isinstance(holder, dict) else None)
    return any(isinstance(form, dict) and str(form.get("type", "")).startswith("json") for form in forms)


def text_of(content: object) -> tuple[str, bool]:
    """The text of a content, and whether it is nothing but text. Raises `Malformed`."""
    if content is None:
        return "", True
    if isinstance(content, str):
        return content, True
    if not isinstance(content, list):
        raise Malformed(f"content: expected a text or a list, got {kind(content)}")
    texts, only_text = [], True
    for index, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        part = as_object(part, f"content[{index}]")
        if part.get("type") in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            only_text = False
            if part.get("type") == "tool_result":
                texts.append(text_of(part.get("content"))[0])
    return "\n".join(texts), only_text


def openai_tokens(usage: object) -> Tokens | None:
    """OpenAI counts what was cached as part of the prompt; the responses API has other names for the same."""
    if usage is None:
        return None
    usage = as_object(usage, "usage")
    prompt_key = "input_tokens" if "input_tokens" in usage else "prompt_tokens"
    if prompt_key not in usage:
        return None
    prompt = count_of(usage, prompt_key)
    details = usage.get(f"{prompt_key}_details") or {}
    details = as_object(details, f"usage.{prompt_key}_details")
    cached, written = count_of(details, "cached_tokens"), count_of(details, "cache_write_tokens")
    if cached + written > prompt:
        raise Malformed(f"usage: {cached + written} tokens cached or written of a prompt of {prompt}")
    output = count_of(usage, "output_tokens" if "output_tokens" in usage else "completion_tokens")
    return Tokens(prompt - cached - written, cached, written, output=output)


def anthropic_tokens(usage: object) -> Tokens | None:
    """Anthropic counts what was cached and written beside `input_tokens`, and tells the lifetimes apart."""
    if usage is None:
        return None
    usage = as_object(usage, "usage")
    if "input_tokens" not in usage:
        return None
    written = count_of(usage, "cache_creation_input_tokens")
    split = as_object(usage.get("cache_creation") or {}, "usage.cache_creation")
    hour = count_of(split, "ephemeral_1h_input_tokens")
    if usage.get("cache_creation_input_tokens") is None:  # then only its parts say what was written
        written = hour + count_of(split, "ephemeral_5m_input_tokens")
    elif hour > written:
        raise Malformed(f"usage: {hour} tokens written for an hour of {written} written")
    cached = count_of(usage, "cache_read_input_tokens")
    return Tokens(
        count_of(usage, "input_tokens"), cached, written - hour, hour, count_of(usage, "output_tokens")
    )


def count_of(holder: Mapping[str, Any], key: str) -> int:
    """A number of tokens; 0 where there is none."""
    value = holder.get(key)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_TOKENS:
        raise Malformed(f"usage.{key}: expected a number of tokens, got {_shown(value)}")
    return value


def model_of(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The name of the model; empty if neither says it."""
    for holder in (first, second):
        name = holder.get("model")
        if name is not None:
            if not isinstance(name, str):
                raise Malformed(f"model: expected a name, got {kind(name)}")
            return clean(name)
    return ""


def tier_of(response: Mapping[str, Any]) -> str:
    usage = response.get("usage")
    tier = response.get("service_tier") or (usage.get("service_tier") if isinstance(usage, dict) else None)
    return "standard" if tier in (None, "default", "auto") or not isinstance(tier, str) else clean(tier)


def time_of(holder: Mapping[str, Any]) -> datetime | None:
    """The date of a record, from the first field that holds one."""
    for key in _TIMES:
        if (when := _moment(holder.get(key))) is not None:
            return when
    return None


def _moment(value: object) -> datetime | None:
    """Seconds or milliseconds since 1970, or ISO 8601 (UTC if it names no zone); None for anything else, and for a date
    before 2020 or more than a day from now."""
    # a string of more digits than a day has (20260101) is a number
    if isinstance(value, str) and len(value) > 8 and value.replace(".", "", 1).isdecimal():
        value = float(value)
    try:
        if isinstance(value, str):
            when = datetime.fromisoformat(value)
            when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            when = datetime.fromtimestamp(value / 1000 if value > 1e11 else value, UTC)
        else:
            return None
    except (ValueError, OverflowError, OSError):
        return None
    return when if _FIRST <= when <= datetime.now(UTC) + timedelta(days=1) else None


def seconds_of(outer: Mapping[str, Any]) -> float | None:
    """How long the call took, where whoever logged it wrote that down."""
    for key, unit in (
        ("seconds", 1.0),
        ("latency_seconds", 1.0),
        ("latency_ms", 1e-3),
        ("duration_ms", 1e-3),
    ):
        value = outer.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9:
            return value * unit
    return None


def as_object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"{where}: expected an object, got {kind(value)}")
    return value


def error_of(error: Mapping[str, Any]) -> str:
    inner = error.get("error")
    if isinstance(inner, dict):  # Anthropic wraps it
        error = inner
    return clean(str(error.get("type") or error.get("code") or error.get("message") or "error"))


def kind(value: object) -> str:
    """A JSON type in words."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), "something else")


def _shown(value: object) -> str:
    return clean(json.dumps(value)) if isinstance(value, (int, float, str)) else kind(value)
