"""The sample: the same for the same seed, fair over the kinds, and what cannot be answered says why."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.cost.estimate import Tally
from moelocal.cost.logs import Lines, Logs, Place
from moelocal.cost.prices import Prices
from moelocal.cost.sample import Sampler, allot, run_again, texts
from moelocal.engine.completion import Completion, Timing, Usage
from moelocal.errors import ContextOverflow

COUNTS = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.integers(0, 50), max_size=8)


@given(COUNTS, st.integers(0, 60))
def test_shares_add_up_and_leave_no_kind_out(counts, size):
    shares = allot(counts, size)
    there = {kind for kind, count in counts.items() if count}
    assert sum(shares.values()) == min(size, sum(counts.values()))
    assert all(1 <= share <= counts[kind] for kind, share in shares.items())
    assert len(shares) == min(size, len(there))


def test_shares_are_in_proportion():
    assert allot({"a": 600, "b": 300, "c": 100}, 10) == {"a": 6, "b": 3, "c": 1}
    assert allot({"a": 990, "b": 9, "c": 1}, 10) == {"a": 8, "b": 1, "c": 1}


def drawn(size: int, seed: int, count: int = 500) -> list[int]:
    """Lines that are drawn of `count` calls of two kinds, one twice as frequent."""
    sampler = Sampler(size, seed)
    for line in range(count):
        sampler.offer(Place(0, line), None, "chat" if line % 3 else "code", "m")
    assert sampler.offered == count
    return [each.place.line for each in sampler.drawn()]


def test_the_seed_decides_what_is_drawn():
    assert drawn(9, 1) == drawn(9, 1)
    assert drawn(9, 1) != drawn(9, 2)
    kinds = Counter("chat" if line % 3 else "code" for line in drawn(9, 1))
    assert kinds == {"chat": 6, "code": 3}
    assert len(set(drawn(9, 1))) == 9
    assert sorted(drawn(50, 1, count=20)) == list(range(20))


def test_every_call_is_as_likely_as_another():
    seen = Counter(line for seed in range(600) for line in drawn(6, seed, count=30))
    # 30 calls, 6 of them each time: 120 in the mean, standard deviation sqrt(600 * 0.2 * 0.8) = 9.8; 5 of them
    assert all(abs(seen[line] - 120) < 49 for line in range(30))


MESSAGES = [{"role": "user", "content": "What is it?"}]
CHAT = {
    "object": "chat.completion",
    "model": "gpt-4.1",
    "choices": [{"message": {"content": "It."}}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2},
}


def test_prompts_are_found_again_also_those_of_batches(tmp_path):
    lines = [
        {"request": {"messages": MESSAGES}, "response": CHAT, "latency_ms": 1500},
        {"custom_id": "a", "response": {"status_code": 200, "body": CHAT}},
        {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "And of a batch?"}]}},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    logs, sampler = Logs.find([tmp_path]), Sampler(5, 0)
    tally = Tally(Prices.open(), len, sampler.offer)
    for place, entry in logs.read(Lines()):
        tally.add(place, entry)
    tally.finish()
    first, second = texts(logs, sampler.drawn())
    assert (first.where, first.answer, first.seconds) == ("log.jsonl, line 1", "It.", 1.5)
    assert (first.prompt_tokens, first.output_tokens) == (5, 2)
    assert second.where == "log.jsonl, line 2"
    assert second.prompt.messages == (("user", "And of a batch?"),)
    (tmp_path / "log.jsonl").write_text("")  # the log was emptied meanwhile
    assert texts(logs, sampler.drawn()) == []


def test_a_prompt_that_cannot_be_answered_does_not_stop_the_others(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        "\n".join(
            json.dumps({"request": {"messages": MESSAGES, "tools": []}, "response": CHAT}) for _ in range(2)
        )
    )
    logs, sampler = Logs.find([tmp_path]), Sampler(2, 0)
    for place, _ in logs.read(Lines()):
        sampler.offer(place, None, "chat", "gpt-4.1")
    done = Completion("Yes.", "", (), (1,), "stop", Usage(3, 1), Timing(0.1, 0.2, 1.0, 1.0, 1))
    asked = []

    def answer(messages, tools):
        asked.append((messages, tools))
        if len(asked) == 1:
            raise ContextOverflow("too long")
        return done

    first, second = run_again(texts(logs, sampler.drawn()), answer)
    assert (first.done, first.error) == (None, "too long")
    assert (second.done, second.error) == (done, "")
    assert asked == [(MESSAGES, None)] * 2


def test_an_error_that_is_not_ours_is_not_hidden(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"request": {"messages": MESSAGES}, "response": CHAT}))
    logs, sampler = Logs.find([tmp_path]), Sampler(1, 0)
    for place, _ in logs.read(Lines()):
        sampler.offer(place, None, "chat", "gpt-4.1")

    def answer(messages, tools):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(run_again(texts(logs, sampler.drawn()), answer))
