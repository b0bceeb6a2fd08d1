"""Sessions: what is evaluated again, and that the answers are those of a cold run."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import moelocal
from moelocal.cache import Store
from moelocal.engine.chunks import STRIDE
from moelocal.engine.plan import weights_nbytes
from moelocal.engine.session import Session
from moelocal.errors import NumericsError, RequestError

GREEDY = moelocal.Sampling(temperature=0)
SYSTEM = {"role": "system", "content": "You are a helpful assistant that answers briefly."}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def loaded() -> moelocal.Model:
    return moelocal.load()


@pytest.fixture
def model(loaded) -> moelocal.Model:
    """The embedded model with nothing stored."""
    loaded.store.clear()
    loaded._recent.clear()
    return loaded


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ask(model: moelocal.Model | Session, messages, **options) -> moelocal.Completion:
    return moelocal.generate(model, messages, max_tokens=40, sampling=GREEDY, **options)


def cold(model: moelocal.Model, tokens: list[int]) -> np.ndarray:
    """The logits behind tokens that nothing was stored of."""
    fresh = moelocal.Model(model.decoder, model.folder, model.name)
    session = fresh.session()
    session.sync(tokens)
    return np.array(session.logits)


def chat(model: moelocal.Model, messages, **options) -> list[int]:
    text = model.template.render(messages, **options)
    return model.tokenizer.encode(text)


def said(done: moelocal.Completion) -> dict[str, str]:
    return {"role": "assistant", "content": done.text}


@pytest.mark.parametrize("thinking", [True, False])
def test_a_session_evaluates_only_what_is_new(model, thinking):
    messages, session = [SYSTEM], model.session()
    for turn, text in enumerate(["My name is Ada.", "What is my name?", "Sort: pear, apple, fig"]):
        messages.append(user(text))
        done = ask(session, messages, thinking=thinking)
        prompt = chat(model, messages, thinking=thinking)
        starts = [p for p, token in enumerate(prompt) if token == model.message_start]
        messages.append(said(done))
        # the last message and the beginning of the answer are new, or all of the first prompt
        assert done.usage.cached == (starts[-2] if turn else 0)
        assert done.usage.miss is None
        fresh = moelocal.Model(model.decoder, model.folder, model.name)
        assert ask(fresh, messages[:-1], thinking=thinking).tokens == done.tokens


def test_plain_calls_share_what_was_stored(model):
    messages = [SYSTEM, user("My name is Ada.")]
    first = ask(model, messages)
    assert first.usage.cached == 0 and first.usage.miss is None
    boundary = len(chat(model, messages, add_generation_prompt=False))
    messages += [said(first), user("What is my name?")]
    second = ask(model, messages)
    assert second.usage.cached == boundary  # the template drops the reasoning of the answer behind it
    assert second.usage.miss.cause == "reasoning dropped"
    fresh = moelocal.Model(model.decoder, model.folder, model.name)
    assert ask(fresh, messages).tokens == second.tokens
    assert ask(model, messages).usage.cached == len(chat(model, messages, add_generation_prompt=False))


def test_prompts_in_common_are_the_same_bits_warm_and_cold(model):
    question = [SYSTEM, user("What is 12 + 7?"), {"role": "assistant", "content": "19"}]
    first = chat(model, [*question, user("And 3 + 4?")])
    second = chat(model, [*question, user("Sort: pear, apple, fig")])
    model.session().sync(first)
    warm = model.session()
    reuse = warm.sync(second)
    boundary = max(p for p, token in enumerate(second[:-10]) if token == model.message_start)
    assert (reuse.source, reuse.cached) == ("memory", boundary)
    np.testing.assert_array_equal(np.array(warm.logits), cold(model, second))


def test_a_session_goes_on_where_it_is(model):
    session = model.session()
    tokens = chat(model, [user("Hello!")], add_generation_prompt=False)
    assert session.sync(tokens).source == "nothing"
    more = chat(model, [user("Hello!")])
    reuse = session.sync(more)
    assert (reuse.source, reuse.cached, reuse.miss) == ("live", len(tokens), None)
    assert session.tokens == more
    again = session.sync(more)  # nothing to evaluate: the logits are known
    assert (again.source, again.cached) == ("live", len(more))


def test_behind_half_a_chunk_the_whole_chunk_is_evaluated_again(model):
    session = model.session()
    tokens = chat(model, [user("Hello!")])
    session.sync(tokens)
    more = tokens + model.tokenizer.encode("I think so.")
    reuse = session.sync(more)  # from where the answer begins: a cold run has no cut behind <think>
    boundary = len(chat(model, [user("Hello!")], add_generation_prompt=False))
    assert (reuse.source, reuse.cached, reuse.miss) == ("live", boundary, None)
    np.testing.assert_array_equal(np.array(session.logits), cold(model, more))


def test_an_answer_of_one_token_leaves_no_state_inside_a_chunk(model):
    tokens = chat(model, [user("Hello!")])
    moelocal.generate(model, [user("Hello!")], max_tokens=1, sampling=GREEDY)
    other = model.session()
    other.sync(tokens + model.tokenizer.encode("I think so."))
    np.testing.assert_array_equal(np.array(other.logits), cold(model, other.tokens))


def test_a_text_without_messages_goes_on_from_a_multiple_of_the_stride(model):
    session = model.session()
    text = [5 + n % 90 for n in range(STRIDE + 300)]
    session.sync(text)
    other = model.session()
    reuse = other.sync([*text, 7, 8])
    assert (reuse.source, reuse.cached, reuse.miss) == ("memory", STRIDE, None)
    np.testing.assert_array_equal(np.array(other.logits), cold(model, other.tokens))


def test_what_generate_fed_belongs_to_the_timeline(model):
    session = model.session()
    text = model.template.render([user("What is 12 + 7?")], thinking=False)
    done = ask(session, text, raw=True)
    assert session.tokens == model.tokenizer.encode(text) + list(done.tokens)
    # the last token ended the answer, and was evaluated already
    assert done.finish_reason == "stop"
    np.testing.assert_allclose(
        np.array(session.logits),
        cold(model, session.tokens),
        atol=2e-3,  # decoded there, evaluated as a prompt here: float32 rounding of other products
    )


def test_a_stream_that_is_closed_leaves_a_timeline_to_go_on_from(model):
    session = model.session()
    events = moelocal.stream(session, [user("Count to ten.")], sampling=GREEDY, max_tokens=30)
    taken = [next(events) for _ in range(4)]
    events.close()
    prompt = chat(model, [user("Count to ten.")])
    sampled = [t for event in taken for t in event.tokens]
    assert session.tokens[: len(prompt)] == prompt
    assert session.tokens[len(prompt) :] == sampled
    assert session._cache.position == len(session.tokens)


def test_an_interrupted_prompt_leaves_nothing_half_done(model, monkeypatch):
    session = model.session()
    tokens = chat(model, [SYSTEM, user("Hello!")])

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.sync(tokens)
    assert session.tokens == [] and session._cache.position == 0
    session.sync(tokens)
    np.testing.assert_array_equal(np.array(session.logits), cold(model, tokens))


def test_nan_logits_leave_no_snapshot(model, monkeypatch):
    session = model.session()
    call = type(model).__call__
    count = 0

    def damaged(self, tokens, cache=None, rows=None):
        nonlocal count
        count += tokens.shape[1] == 1
        logits = call(self, tokens, cache, rows)
        return logits * float("nan") if count > 2 else logits

    monkeypatch.setattr(type(model), "__call__", damaged)
    stored = len(model.store)
    with pytest.raises(NumericsError):
        ask(session, [user("What is 12 + 7?")])
    assert session.tokens == []
    assert len(model.store) <= stored + 2  # of the prompt alone


def test_a_fork_goes_its_own_way(model):
    session = model.session()
    session.sync(chat(model, [user("Hello!")]))
    other = session.fork()
    a = [*session.tokens, *model.tokenizer.encode("One")]
    b = [*session.tokens, *model.tokenizer.encode("Two and more")]
    assert session.sync(a).source == other.sync(b).source == "live"
    for each, tokens in ((session, a), (other, b)):
        assert each.tokens == tokens
        alone = model.session()
        alone.sync(tokens[: len(a) - 1])
        each.sync([*tokens, 5])
        np.testing.assert_allclose(np.array(each.logits), cold(model, [*tokens, 5]), atol=2e-3)


@pytest.mark.parametrize("turn", [1, 2, -1])
def test_rewind_to_a_turn(model, turn):
    messages = [SYSTEM, user("Hello!"), {"role": "assistant", "content": "Hi!"}, user("What is 2 + 2?")]
    tokens = chat(model, messages)
    starts = [p for p, token in enumerate(tokens) if token == model.message_start]
    assert len(starts) == 5  # with that of the answer to come
    session = model.session()
    session.sync(tokens)
    session.rewind(turn=turn)
    assert session.tokens == tokens[: starts[turn]]
    np.testing.assert_array_equal(np.array(session.logits), cold(model, session.tokens))
    session.sync(tokens)
    np.testing.assert_array_equal(np.array(session.logits), cold(model, tokens))


def test_rewind_to_a_position_and_to_the_beginning(model):
    session = model.session()
    session.sync(tokens := chat(model, [user("Hello!")]))
    session.rewind(5)
    assert session.tokens == tokens[:5]
    assert session.rewind(0).tokens == 0 and session.position == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "rewind: expected a position or a turn"),
        ({"position": 1, "turn": 1}, "rewind: expected a position or a turn"),
        ({"position": 1000}, r"rewind: position: expected 0 to \d+, got 1000"),
        ({"position": -1}, r"rewind: position: expected 0 to \d+, got -1"),
        ({"turn": 7}, r"rewind: turn: expected one of \d messages, got 7"),
    ],
)
def test_rewind_to_nowhere(model, arguments, message):
    session = model.session()
    session.sync(chat(model, [user("Hello!")]))
    with pytest.raises(RequestError, match=message):
        session.rewind(**arguments)


def test_logits_and_sync_of_nothing(model):
    with pytest.raises(RequestError, match="logits: nothing was evaluated yet; call sync first"):
        _ = model.session().logits
    with pytest.raises(RequestError, match="tokens: expected at least one, got none"):
        model.session().sync([])


def test_a_saved_session_goes_on_in_another_process(model, tmp_path):
    session = model.session()
    ask(session, [SYSTEM, user("My name is Ada.")], thinking=False)
    session.save(tmp_path / "chat.session")
    fresh = moelocal.Model(model.decoder, model.folder, model.name)  # with a store of its own
    other = Session.load(tmp_path / "chat.session", fresh)
    assert other.tokens == session.tokens
    following = [*session.tokens, model.message_start]
    assert session.sync(following).cached == other.sync(following).cached == len(following) - 1
    np.testing.assert_array_equal(np.array(other.logits), np.array(session.logits))


def test_a_session_of_another_dtype_is_refused(model, tmp_path):
    session = model.session()
    session.sync([5, 6, 7])
    session.save(tmp_path / "chat.session")
    other = moelocal.load(dtype="bfloat16")
    with pytest.raises(RequestError, match="saved with other weights, settings"):
        Session.load(tmp_path / "chat.session", other)


# --- why not more ---


def miss(model, before, now, **options):
    ask(model, before, **options)
    found = ask(model, now, **options).usage.miss
    assert found is not None
    return found


def test_dropped_reasoning_is_named(model):
    messages = [user("What is 12 + 7?")]
    first = ask(model, messages)
    assert first.reasoning
    messages += [{"role": "assistant", "content": first.text}, user("And 3 + 4?")]
    found = ask(model, messages).usage.miss
    assert found.cause == "reasoning dropped"
    assert first.reasoning[:4] in found.before and first.reasoning[:4] not in found.now


def test_changed_tools_are_named(model):
    other = {"type": "function", "function": {**TOOL["function"], "name": "time"}}
    found = miss_tools(model, [TOOL], [TOOL, other])
    assert found.cause == "tools changed" and "</tools>" in found.before and "</tools>" not in found.now


def miss_tools(model, before, now):
    question = [user("Hello!")]
    ask(model, question, tools=before)
    found = ask(model, question, tools=now).usage.miss
    assert found is not None
    return found


def test_a_volatile_line_in_the_system_prompt_is_named(model):
    dated = [{"role": "system", "content": f"Today is {day}. Be brief."} for day in ("Monday", "Friday")]
    found = miss(model, [dated[0], user("Hello!")], [dated[1], user("Hello!")])
    assert found.cause == "volatile line in the system prompt"
    assert "Mon" in found.before and "Fri" in found.now


def test_unrelated_prompts_miss_nothing(model):
    ask(model, [SYSTEM, user("Sort: pear, fig")])
    assert ask(model, [SYSTEM, user("What is 12 + 7?")]).usage.miss is None
    assert ask(model, "Hello!").usage.miss is None


def test_an_edited_message_is_named(model):
    found = miss(model.session(), [SYSTEM, user("Sort: pear, fig")], [SYSTEM, user("Sort: pear, apple")])
    assert found.cause == "edited"
    tokens = chat(model, [SYSTEM, user("Sort: pear, apple")])
    assert 0 < found.position < len(tokens)


def test_evicted_and_never_stored_are_told_apart(model):
    question = [SYSTEM, user("What is 12 + 7?")]
    ask(model, question)
    model.store.budget = model.store.nbytes // 4  # what was stored has to go
    try:
        ask(model, [user("Hello there!")])
        found = ask(model, question).usage.miss
        assert found is not None and found.cause == "evicted"
    finally:
        model.store.budget = 1 << 30
    model.store = Store("other", 1 << 30)
    model._recent.clear()
    model.remember(chat(model, question))
    found = ask(model, question).usage.miss
    assert found is not None and found.cause == "never stored"


def test_a_prompt_that_only_goes_on_misses_nothing(model):
    session = model.session()
    session.sync([5, 6, 7])
    assert session.sync([5, 6, 7, 8]).miss is None


def test_tokens_alone_need_no_tokenizer(tmp_path, model):
    import shutil

    for name in ("config.json", "model.safetensors"):
        shutil.copy(model.folder / name, tmp_path / name)
    session = moelocal.load(tmp_path).session()
    session.sync([5, 6, 7, 8])
    found = session.sync([5, 6, 9, 8]).miss
    assert (found.position, found.before, found.now, found.cause) == (2, "", "", "edited")
    assert session.logits.dtype == mx.float32


@pytest.mark.parametrize(("memory", "budget"), [("1GB", 100_000_000), ("20MB", None), ("1MB", 0)])
def test_snapshots_take_no_memory_that_the_model_needs(model, monkeypatch, memory, budget):
    monkeypatch.setenv("MOELOCAL_MEMORY", memory)
    fresh = moelocal.Model(model.decoder, model.folder, model.name)
    if budget is None:  # half of what the weights leave
        budget = (20_000_000 - weights_nbytes(model.decoder)) // 2
        assert 0 < budget < 2_000_000
    assert fresh.store.budget == budget
