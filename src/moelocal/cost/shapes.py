"""What one line of a log is: every recorded form of a call, brought into one `Entry`.

Read are the forms that OpenAI and Anthropic document and export, and our own (docs/cost.md lists them with examples):
chat completions, responses, text completions and embeddings of OpenAI, alone or beside their request; its batch input
and output files; pages of stored completions; messages of Anthropic, alone or beside their request; its batch requests
and results; `moelocal` logs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from moelocal.cost import fields
from moelocal.cost.fields import Malformed, Prompt, Tokens, UnknownShape, clean

Outcome = Literal["call", "request", "failed"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A call, or a request without its answer, or a call that failed (`reason`).

    `shape`: its form in words; `when`: UTC; `tokens`: as recorded, None if they were not; `prompt`, `answer`: None
    where the line does not hold them; `custom_id`: what ties a batch result to its request; `tier`: "standard",
    "batch", "flex", "priority"; `local`: our own, which nobody billed; `seconds`: that it took, if recorded;
    `identity`: equal for two records of one call, None where they cannot be told apart.
    """

    shape: str
    outcome: Outcome
    model: str = ""
    when: datetime | None = None
    tokens: Tokens | None = None
    prompt: Prompt | None = None
    answer: str | None = None
    tool_calls: bool = False
    custom_id: str | None = None
    tier: str = "standard"
    local: bool = False
    embedding: bool = False
    seconds: float | None = None
    identity: tuple[str, ...] | None = None
    reason: str = ""


def page_of(value: object) -> list[Any] | None:
    """The items of a page of stored completions, for `parse` one by one; None for anything else."""
    if isinstance(value, dict) and value.get("object") == "list" and not _is_embeddings(value):
        items = value.get("data")
        return items if isinstance(items, list) else None
    return None


def parse(value: object) -> Entry:
    """What one JSON value records, if it is no page. Raises `Malformed`, `UnknownShape`."""
    if not isinstance(value, dict):
        raise UnknownShape(f"{fields.kind(value)}, not an object")
    if value.get("log") == "moelocal":
        return _ours(value, value.get("completion"))
    if "custom_id" in value and "request" not in value:
        return _batch(value)
    response = value.get("response")
    if isinstance(response, dict):
        request = value.get("request", value)
        return _pair({} if request is None else fields.as_object(request, "request"), response, value)
    if _is_response(value):
        asked = "messages" in value or "input" in value
        return _pair(value if asked else {}, value, value)
    usage = value.get("usage")
    if "timing" in value and isinstance(usage, dict) and "completion" in usage:
        return _ours({}, value)
    if isinstance(value.get("error"), dict):
        return Entry(
            "failed call",
            "failed",
            fields.model_of(value, value),
            fields.time_of(value),
            reason=fields.error_of(value["error"]),
        )
    if "model" in value and ("messages" in value or "input" in value):
        return _request(value, value) if value.get("usage") is None else _with_usage(value)
    keys = ", ".join(sorted(clean(key) for key in value)[:6])
    raise UnknownShape(f"an object with {keys}" if keys else "an empty object")


def _batch(value: Mapping[str, Any]) -> Entry:
    """A line of a batch file of either provider."""
    name = value["custom_id"]
    if not isinstance(name, str):
        raise Malformed(f"custom_id: expected a string, got {fields.kind(name)}")
    if "params" in value:
        return replace(
            _request(fields.as_object(value["params"], "params"), value), custom_id=name, tier="batch"
        )
    if "body" in value:
        return replace(_request(fields.as_object(value["body"], "body"), value), custom_id=name, tier="batch")
    if "result" in value:
        result = fields.as_object(value["result"], "result")
        if result.get("type") == "succeeded":
            message = fields.as_object(result.get("message"), "result.message")
            return replace(_pair({}, message, value), custom_id=name, tier="batch")
        reason = clean(str(result.get("type")))
        if isinstance(result.get("error"), dict):
            reason += f": {fields.error_of(result['error'])}"
        return Entry(
            "Anthropic batch result", "failed", when=fields.time_of(value), custom_id=name, reason=reason
        )
    if "response" in value or "error" in value:
        response = value.get("response")
        if isinstance(response, dict):
            return replace(_pair({}, response, value), custom_id=name, tier="batch")
        error = value.get("error")
        reason = fields.error_of(error) if isinstance(error, dict) else "no response"
        return Entry(
            "OpenAI batch output", "failed", when=fields.time_of(value), custom_id=name, reason=reason
        )
    raise UnknownShape("an object with custom_id, but neither body, params, response nor result")


def _pair(request: Mapping[str, Any], response: Mapping[str, Any], outer: Mapping[str, Any]) -> Entry:
    """A response, with its request where there is one. `outer`: the line, for its date."""
    status = response.get("status_code")
    body = response.get("body")
    if isinstance(body, dict):
        response = body
    model = fields.model_of(response, request)
    when = fields.time_of(response) or fields.time_of(outer) or fields.time_of(request)
    if (isinstance(status, int) and status >= 400) or isinstance(response.get("error"), dict):
        error = response.get("error")
        reason = fields.error_of(error) if isinstance(error, dict) else f"status {status}"
        return Entry("failed call", "failed", model, when, reason=reason)
    asks = any(key in request for key in ("messages", "input", "prompt"))
    tier = fields.tier_of(response)
    common: dict[str, Any] = {
        "model": model,
        "when": when,
        "prompt": fields.prompt_of(request) if asks else None,
        "tier": tier,
        "seconds": fields.seconds_of(outer),
    }
    if response.get("object") == "response":
        return _responses(response, common)
    if response.get("type") == "message":
        return _anthropic(response, common)
    if _is_embeddings(response):
        tokens = fields.openai_tokens(response.get("usage"))
        return Entry("OpenAI embeddings", "call", tokens=tokens, embedding=True, **common)
    if isinstance(response.get("choices"), list):
        return _chat(response, common)
    raise UnknownShape("a response that is no completion, response or message")


def _chat(response: Mapping[str, Any], common: dict[str, Any]) -> Entry:
    texts, calls = [], False
    for index, choice in enumerate(response["choices"]):
        choice = fields.as_object(choice, f"choices[{index}]")
        if isinstance(choice.get("text"), str):  # text completions
            texts.append(choice["text"])
            continue
        if "delta" in choice:
            raise UnknownShape("a chunk of a stream; log the whole completion")
        message = fields.as_object(choice.get("message"), f"choices[{index}].message")
        texts.append(fields.text_of(message.get("content"))[0])
        calls = calls or bool(message.get("tool_calls") or message.get("function_call"))
    shape = (
        "OpenAI text completion" if response.get("object") == "text_completion" else "OpenAI chat completion"
    )
    tokens = fields.openai_tokens(response.get("usage"))
    identity = _identity(response, common, tokens)
    answer = "\n".join(filter(None, texts))
    return Entry(shape, "call", tokens=tokens, answer=answer, tool_calls=calls, identity=identity, **common)


def _responses(response: Mapping[str, Any], common: dict[str, Any]) -> Entry:
    status = response.get("status", "completed")
    tokens = fields.openai_tokens(response.get("usage"))
    if status not in ("completed", "incomplete") and tokens is None:
        reason = clean(str(status))
        return Entry("OpenAI response", "failed", common["model"], common["when"], reason=reason)
    output = response.get("output", [])
    if not isinstance(output, list):
        raise Malformed(f"output: expected a list, got {fields.kind(output)}")
    texts, calls = [], False
    for index, item in enumerate(output):
        item = fields.as_object(item, f"output[{index}]")
        if item.get("type") == "message":
            texts.append(fields.text_of(item.get("content"))[0])
        calls = calls or str(item.get("type", "")).endswith("_call")
    identity = _identity(response, common, tokens)
    answer = "\n".join(filter(None, texts))
    return Entry(
        "OpenAI response", "call", tokens=tokens, answer=answer, tool_calls=calls, identity=identity, **common
    )


def _anthropic(message: Mapping[str, Any], common: dict[str, Any]) -> Entry:
    content = message.get("content", [])
    if not isinstance(content, list):
        raise Malformed(f"content: expected a list, got {fields.kind(content)}")
    blocks = [fields.as_object(block, f"content[{index}]") for index, block in enumerate(content)]
    calls = any(str(block.get("type", "")).endswith("tool_use") for block in blocks)
    tokens = fields.anthropic_tokens(message.get("usage"))
    identity = _identity(message, common, tokens)
    answer = fields.text_of([block for block in blocks if block.get("type") == "text"])[0]
    return Entry(
        "Anthropic message",
        "call",
        tokens=tokens,
        answer=answer,
        tool_calls=calls,
        identity=identity,
        **common,
    )


def _ours(outer: Mapping[str, Any], value: object) -> Entry:
    """A line of our own log, or what `moelocal generate --json` prints."""
    completion = fields.as_object(value, "completion")
    usage = fields.as_object(completion.get("usage"), "usage")
    timing = fields.as_object(completion.get("timing", {}), "timing")
    prompt, cached = fields.count_of(usage, "prompt"), fields.count_of(usage, "cached")
    if cached > prompt:
        raise Malformed(f"usage.cached: {cached} tokens of a prompt of {prompt}")
    tokens = Tokens(prompt - cached, cached, output=fields.count_of(usage, "completion"))
    seconds = timing.get("total_seconds")
    return Entry(
        "moelocal log" if outer else "moelocal completion",
        "call",
        fields.model_of(outer, completion),
        fields.time_of(outer),
        tokens,
        fields.prompt_of(outer) if "messages" in outer else None,
        fields.text_of(completion.get("text"))[0],
        bool(completion.get("tool_calls")),
        local=True,
        seconds=float(seconds) if isinstance(seconds, (int, float)) and 0 <= seconds < 1e9 else None,
    )


def _request(request: Mapping[str, Any], outer: Mapping[str, Any]) -> Entry:
    """A request whose answer is not on this line."""
    if not any(key in request for key in ("messages", "input", "prompt")):
        raise UnknownShape("a request without messages, input or prompt")
    when = fields.time_of(request) or fields.time_of(outer)
    return Entry(
        "request", "request", fields.model_of(request, outer), when, prompt=fields.prompt_of(request)
    )


def _with_usage(value: Mapping[str, Any]) -> Entry:
    """A request with recorded usage beside it: a call, though its answer has no form of the APIs."""
    usage = fields.as_object(value["usage"], "usage")
    # beside its input, not as part of it, only Anthropic counts what a cache read or wrote
    beside = "prompt_tokens" not in usage and any(key.startswith("cache_") for key in usage)
    tokens = fields.anthropic_tokens(usage) if beside else fields.openai_tokens(usage)
    if tokens is None:
        raise UnknownShape("a request with usage, but neither input_tokens nor prompt_tokens in it")
    entry, answer = _request(value, value), value.get("output")
    return replace(
        entry,
        shape="request with its usage",
        outcome="call",
        tokens=tokens,
        answer=answer if isinstance(answer, str) else None,
        tier=fields.tier_of(value),
        seconds=fields.seconds_of(value),
        identity=_identity(value, {"model": entry.model}, tokens),
    )


def _identity(
    response: Mapping[str, Any], common: Mapping[str, Any], tokens: Tokens | None
) -> tuple[str, ...] | None:
    """The id alone is not enough: some servers number their answers from 0."""
    name = response.get("id")
    if not isinstance(name, str) or not name:
        return None
    return (name, common["model"], str(response.get("created", response.get("created_at"))), str(tokens))


def _is_response(value: Mapping[str, Any]) -> bool:
    named = value.get("object") in ("chat.completion", "text_completion", "response") or (
        value.get("type") == "message" and value.get("role") == "assistant"
    )
    return named or isinstance(value.get("choices"), list) or _is_embeddings(value)


def _is_embeddings(value: Mapping[str, Any]) -> bool:
    data = value.get("data")
    if value.get("object") != "list" or not isinstance(data, list) or not data:
        return False
    return isinstance(data[0], dict) and data[0].get("object") == "embedding"
