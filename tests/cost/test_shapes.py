"""Every recorded form of a call becomes the same entry; what is none of them says why."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.cost.fields import Malformed, Tokens, UnknownShape
from moelocal.cost.record import append
from moelocal.cost.shapes import Entry, page_of, parse
from moelocal.engine.completion import Completion, Timing, Usage

WHEN = datetime(2024, 8, 28, 15, 14, 49, tzinfo=UTC)
CREATED = 1724858089
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}]
CHAT = {
    "id": "chatcmpl-A1",
    "object": "chat.completion",
    "created": CREATED,
    "model": "gpt-4o-mini-2024-07-18",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}],
    "usage": {
        "prompt_tokens": 24,
        "completion_tokens": 8,
        "total_tokens": 32,
        "prompt_tokens_details": {"cached_tokens": 10},
    },
}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": CREATED,
    "status": "completed",
    "error": None,
    "model": "gpt-4.1-2025-04-14",
    "output": [
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "4"}]},
    ],
    "usage": {"input_tokens": 24, "input_tokens_details": {"cached_tokens": 10}, "output_tokens": 8},
}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4-5-20250929",
    "content": [{"type": "text", "text": "4"}],
    "stop_reason": "end_turn",
    "usage": {
        "input_tokens": 14,
        "cache_read_input_tokens": 10,
        "cache_creation_input_tokens": 30,
        "cache_creation": {"ephemeral_5m_input_tokens": 20, "ephemeral_1h_input_tokens": 10},
        "output_tokens": 8,
    },
}
OPENAI = Tokens(fresh=14, cached=10, output=8)
ANTHROPIC = Tokens(fresh=14, cached=10, written=20, written_hour=10, output=8)


def one(value: object) -> Entry:
    """The only entry of a line, as JSON brings it."""
    return parse(json.loads(json.dumps(value)))


def test_a_chat_completion_with_its_request():
    entry = one({"request": {"model": "gpt-4o-mini", "messages": ASKED}, "response": CHAT})
    assert (entry.shape, entry.outcome, entry.tier) == ("OpenAI chat completion", "call", "standard")
    assert (entry.model, entry.when, entry.tokens, entry.answer) == (CHAT["model"], WHEN, OPENAI, "4")
    assert entry.prompt is not None and entry.prompt.plain
    assert entry.prompt.messages == (("system", "Be brief."), ("user", "What is 2+2?"))


@pytest.mark.parametrize(
    "line",
    [
        CHAT | {"messages": ASKED},  # a stored completion beside its messages
        {"model": "gpt-4o-mini", "messages": ASKED, "response": CHAT},
        {"request": {"messages": ASKED}, "response": {"status_code": 200, "body": CHAT}},
        {"custom_id": "mine", "request": {"messages": ASKED}, "response": CHAT},
    ],
)
def test_other_ways_to_log_a_request_beside_its_answer(line):
    entry = one(line)
    assert (entry.model, entry.when, entry.tokens, entry.answer) == (CHAT["model"], WHEN, OPENAI, "4")
    assert entry.prompt is not None and entry.prompt.messages[1] == ("user", "What is 2+2?")


def test_a_chat_completion_alone_has_no_prompt():
    entry = one(CHAT)
    assert entry.prompt is None and entry.tokens == OPENAI and entry.when == WHEN


def test_a_page_of_stored_completions_holds_several():
    assert page_of({"object": "list", "data": [CHAT, RESPONSE], "has_more": False}) == [CHAT, RESPONSE]
    data = [{"object": "embedding", "index": 0, "embedding": [0.1]}]
    assert page_of({"object": "list", "data": data}) is None  # one call
    assert page_of(CHAT) is page_of([CHAT]) is page_of({"object": "list", "data": 1}) is None


def test_a_response_with_its_request():
    request = {"model": "gpt-4.1", "instructions": "Be brief.", "input": "What is 2+2?"}
    entry = one({"request": request, "response": RESPONSE})
    assert (entry.shape, entry.tokens, entry.when, entry.answer) == ("OpenAI response", OPENAI, WHEN, "4")
    assert entry.prompt is not None
    assert entry.prompt.messages == (("system", "Be brief."), ("user", "What is 2+2?"))


def test_a_response_that_goes_on_an_earlier_one_is_not_to_be_asked_again():
    request = {"model": "gpt-4.1", "input": "And 3?", "previous_response_id": "resp_0"}
    prompt = one({"request": request, "response": RESPONSE}).prompt
    assert prompt is not None and not prompt.plain


def test_cache_writes_of_openai_are_part_of_its_prompt():
    details = {"cached_tokens": 10, "cache_write_tokens": 4}
    usage = {"input_tokens": 24, "input_tokens_details": details, "output_tokens": 8}
    assert one(RESPONSE | {"usage": usage}).tokens == Tokens(10, 10, 4, 0, 8)


def test_the_files_of_an_openai_batch():
    line = {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions"}
    asked = one(line | {"body": {"model": "gpt-4o-mini", "messages": ASKED}})
    assert (asked.outcome, asked.custom_id, asked.tier) == ("request", "request-1", "batch")
    answer = {"status_code": 200, "request_id": "req", "body": CHAT}
    done = one({"id": "batch_req_1", "custom_id": "request-1", "error": None, "response": answer})
    assert (done.outcome, done.custom_id, done.tier) == ("call", "request-1", "batch")
    assert (done.tokens, done.when, done.prompt) == (OPENAI, WHEN, None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"id": "b", "response": None, "error": {"code": "batch_expired", "message": "late"}}, "batch_expired"),
        ({"response": {"status_code": 400, "body": {"error": {"type": "invalid_request_error"}}}},
         "invalid_request_error"),
        ({"response": {"status_code": 500, "body": None}, "error": None}, "status 500"),
        ({"result": {"type": "errored", "error": {"type": "error", "error": {"type": "overloaded_error"}}}},
         "errored: overloaded_error"),
        ({"result": {"type": "expired"}}, "expired"),
    ],
)  # fmt: skip
def test_a_batch_line_that_failed(line, reason):
    entry = one({"custom_id": "request-1"} | line)
    assert (entry.outcome, entry.custom_id, entry.reason) == ("failed", "request-1", reason)


def test_a_call_that_failed_outside_of_a_batch():
    line = {
        "request": {"model": "gpt-4.1", "messages": ASKED},
        "response": {"error": {"type": "rate_limit_error"}},
    }
    entry = one(line)
    assert (entry.outcome, entry.model, entry.reason) == ("failed", "gpt-4.1", "rate_limit_error")


def test_a_message_of_anthropic_counts_its_cache_beside_its_input():
    request = {"model": "claude-sonnet-4-5", "max_tokens": 99, "system": "Be brief.", "messages": ASKED[1:]}
    entry = one({"timestamp": "2024-08-28T15:14:49Z", "request": request, "response": MESSAGE})
    assert (entry.shape, entry.tokens, entry.when, entry.answer) == (
        "Anthropic message",
        ANTHROPIC,
        WHEN,
        "4",
    )
    assert ANTHROPIC.prompt == 14 + 10 + 30
    assert entry.prompt is not None
    assert entry.prompt.messages == (("system", "Be brief."), ("user", "What is 2+2?"))


@pytest.mark.parametrize(
    ("split", "written", "hour"),
    [
        ({"ephemeral_5m_input_tokens": 300}, 300, 0),
        ({"ephemeral_5m_input_tokens": 300, "ephemeral_1h_input_tokens": 40}, 300, 40),
        ({"ephemeral_1h_input_tokens": 40}, 0, 40),
        (None, 0, 0),
    ],
)
@pytest.mark.parametrize("total", [{}, {"cache_creation_input_tokens": None}])
def test_cache_writes_of_anthropic_without_their_sum(split, written, hour, total):
    usage = {"input_tokens": 14, "output_tokens": 8, "cache_creation": split} | total
    assert one(MESSAGE | {"usage": usage}).tokens == Tokens(14, 0, written, hour, 8)


def test_more_cache_writes_for_an_hour_than_in_all_are_damage():
    usage = MESSAGE["usage"] | {"cache_creation_input_tokens": 9}
    with pytest.raises(Malformed) as caught:
        parse(MESSAGE | {"usage": usage})
    assert str(caught.value) == "usage: 10 tokens written for an hour of 9 written"


def test_the_files_of_an_anthropic_batch():
    asked = one(
        {"custom_id": "a", "params": {"model": "claude-haiku-4-5", "max_tokens": 9, "messages": ASKED[1:]}}
    )
    assert (asked.outcome, asked.custom_id, asked.model) == ("request", "a", "claude-haiku-4-5")
    done = one({"custom_id": "a", "result": {"type": "succeeded", "message": MESSAGE}})
    assert (done.outcome, done.custom_id, done.tier, done.tokens) == ("call", "a", "batch", ANTHROPIC)


def test_tools_of_anthropic_become_functions_and_their_use_is_seen():
    tool = {"name": "weather", "description": "Of a city", "input_schema": {"type": "object"}}
    content = [{"type": "tool_use", "id": "t", "name": "weather", "input": {}}]
    request = {"model": "claude-haiku-4-5", "messages": ASKED[1:], "tools": [tool]}
    entry = one({"request": request, "response": MESSAGE | {"content": content}})
    assert entry.tool_calls and entry.prompt is not None
    function = {"name": "weather", "description": "Of a city", "parameters": {"type": "object"}}
    assert entry.prompt.tools == ({"type": "function", "function": function},)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "data:"}}],
        [{"type": "tool_result", "tool_use_id": "t", "content": "rain"}],
    ],
)
def test_what_is_more_than_text_is_not_to_be_asked_again(content):
    request = {"model": "m", "messages": [{"role": "user", "content": content}]}
    prompt = one({"request": request, "response": CHAT}).prompt
    assert prompt is not None and not prompt.plain


def test_embeddings_and_text_completions():
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    data = [{"object": "embedding", "index": 0, "embedding": [0.1]}]
    embeddings = {"object": "list", "data": data, "model": "text-embedding-3-small", "usage": usage}
    entry = one({"request": {"model": "text-embedding-3-small", "input": ["a", "b"]}, "response": embeddings})
    assert entry.embedding and entry.tokens == Tokens(fresh=5)
    text = {
        "object": "text_completion",
        "model": "m",
        "choices": [{"text": " four", "index": 0}],
        "usage": usage,
    }
    assert one(text).answer == " four"


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (CHAT["usage"], OPENAI),
        (RESPONSE["usage"], OPENAI),
        (MESSAGE["usage"], ANTHROPIC),
        # as gateways name both
        (CHAT["usage"] | {"cache_read_input_tokens": 10}, OPENAI),
    ],
)
def test_a_request_with_recorded_usage_is_a_call(usage, tokens):
    line = {
        "model": "gpt-4.1",
        "messages": ASKED,
        "output": "4",
        "usage": usage,
        "created": CREATED,
        "id": "1",
    }
    entry = one(line)
    assert (entry.shape, entry.outcome, entry.model) == ("request with its usage", "call", "gpt-4.1")
    assert (entry.tokens, entry.answer, entry.when) == (tokens, "4", WHEN)
    assert entry.prompt is not None and entry.prompt.messages[1] == ("user", "What is 2+2?")
    assert entry.identity == one(line).identity != one(line | {"id": "2"}).identity
    assert one(line | {"output": [{"type": "message"}]}).answer is None
    assert one(line | {"usage": None}).outcome == "request"


def test_a_call_without_usage_has_no_tokens():
    assert one({key: value for key, value in CHAT.items() if key != "usage"}).tokens is None
    assert one(CHAT | {"usage": None}).tokens is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"usage": {"prompt_tokens": "many"}}, 'usage.prompt_tokens: expected a number of tokens, got "many"'),
        ({"usage": {"prompt_tokens": -1}}, "usage.prompt_tokens: expected a number of tokens, got -1"),
        ({"usage": {"prompt_tokens": 1.5}}, "usage.prompt_tokens: expected a number of tokens, got 1.5"),
        ({"usage": {"prompt_tokens": True}}, "usage.prompt_tokens: expected a number of tokens, got true"),
        ({"usage": [1]}, "usage: expected an object, got a list"),
        ({"usage": {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}},
         "usage: 4 tokens cached or written of a prompt of 3"),
        ({"model": 4}, "model: expected a name, got a number"),
        ({"choices": ["x"]}, "choices[0]: expected an object, got a string"),
        ({"choices": [{"message": None}]}, "choices[0].message: expected an object, got null"),
    ],
)  # fmt: skip
def test_what_is_damaged_says_where(change, message):
    with pytest.raises(Malformed) as caught:
        parse(CHAT | change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "a list, not an object"),
        (None, "null, not an object"),
        ({}, "an empty object"),
        ({"level": "info", "msg": "hi"}, "an object with level, msg"),
        ({"messages": ASKED}, "an object with messages"),
        (
            {"model": "m", "messages": ASKED, "usage": {"total_tokens": 9}},
            "a request with usage, but neither input_tokens nor prompt_tokens in it",
        ),
        ({"custom_id": "a"}, "an object with custom_id, but neither body, params, response nor result"),
        ({"request": {}, "response": {"ok": True}}, "a response that is no completion, response or message"),
        (CHAT | {"choices": [{"delta": {"content": "4"}}]}, "a chunk of a stream; log the whole completion"),
    ],
)
def test_what_is_no_call_says_what_it_looks_like(value, message):
    with pytest.raises(UnknownShape) as caught:
        parse(value)
    assert str(caught.value) == message


def test_names_from_a_log_cannot_move_the_cursor():
    assert one(CHAT | {"model": "gpt\x1b[2J\ud800"}).model == "gpt?[2J?"


def test_two_records_of_one_call_are_equal_and_two_calls_of_one_id_are_not():
    again = {"request": {"messages": ASKED}, "response": CHAT}
    other = CHAT | {"created": CREATED + 1}  # some servers number their answers from 0
    assert one(CHAT).identity == one(again).identity != one(other).identity
    assert one({key: value for key, value in CHAT.items() if key != "id"}).identity is None


COMPLETION = Completion(
    "71", "", (), (5, 6), "stop", Usage(prompt=30, completion=2, cached=10), Timing(0.1, 0.5, 300.0, 20.0, 1)
)


def test_our_own_log_is_read_as_it_is_written(tmp_path):
    file = tmp_path / "log.jsonl"
    append(file, "embedded", "What is 23 + 48?", COMPLETION)
    append(file, "embedded", ASKED, COMPLETION, tools=[{"type": "function", "function": {"name": "f"}}])
    first, second = (one(json.loads(line)) for line in file.read_text().splitlines())
    assert (first.shape, first.model, first.local, first.answer) == ("moelocal log", "embedded", True, "71")
    assert (first.tokens, first.seconds) == (Tokens(fresh=20, cached=10, output=2), 0.5)
    assert first.when is not None and first.prompt is not None and second.prompt is not None
    assert first.prompt.messages == (("user", "What is 23 + 48?"),)
    assert second.prompt.messages == (("system", "Be brief."), ("user", "What is 2+2?"))
    assert len(second.prompt.tools) == 1
    assert file.stat().st_mode & 0o777 == 0o600


def test_what_generate_prints_is_read_too():
    line = {
        "text": "71",
        "tool_calls": [],
        "usage": {"prompt": 30, "completion": 2, "cached": 10},
        "timing": {},
    }
    entry = one(line)
    assert (entry.shape, entry.local, entry.tokens) == ("moelocal completion", True, Tokens(20, 10, output=2))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(base=st.sampled_from([CHAT, RESPONSE, MESSAGE]), data=st.data())
def test_any_damage_to_a_field_is_read_or_named(base, data):
    """Whatever stands in a field, anywhere: an entry, or one of the two errors; never another exception."""
    line = json.loads(
        json.dumps({"request": {"model": "m", "messages": ASKED}, "response": base, "timestamp": 1})
    )
    holder = line
    while True:
        key = data.draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        inner = holder[key]
        if not (isinstance(inner, (dict, list)) and inner) or data.draw(st.booleans()):
            break
        holder = inner
    holder[key] = data.draw(JSON)
    try:
        entry = parse(line)
    except (Malformed, UnknownShape) as error:
        assert str(error)
    else:
        assert entry.tokens is None or entry.tokens.prompt >= 0


@given(JSON)
def test_any_json_is_read_or_named(value):
    try:
        parse(value)
    except (Malformed, UnknownShape) as error:
        assert str(error)
