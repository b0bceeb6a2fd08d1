"""Ctrl-C, or any other exception, at any moment of an answer: the next one is right, and nothing wrong is stored."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import mlx.core as mx
import pytest

import moelocal
from moelocal import Model, Sampling, Session
from moelocal.cache import Cache
from moelocal.engine import batch, generate, session
from moelocal.errors import ContextOverflow, MemoryOverflow, RequestError
from moelocal.layers.block import Block

GREEDY = Sampling(temperature=0)
QUESTION = [{"role": "user", "content": "Draw a pelican riding a bicycle as SVG."}]
TRACED = {module.__file__ for module in (session, generate, batch, sys.modules[Cache.__module__])}


@pytest.fixture(scope="module")
def loaded() -> Model:
    return moelocal.load()


def fresh(loaded: Model) -> Model:
    return Model(loaded.decoder, loaded.folder, loaded.name)


def answer(where: Model | Session, messages: Any = QUESTION, most: int = 12) -> tuple[int, ...]:
    return moelocal.generate(where, messages, max_tokens=most, sampling=GREEDY, thinking=False).tokens


@pytest.fixture(scope="module")
def right(loaded) -> tuple[int, ...]:
    return answer(fresh(loaded))


def check(model: Model, live: Session, right: tuple[int, ...]) -> None:
    """Whatever happened: this session, another one, and a plain call answer as a model that knows nothing."""
    assert answer(live) == right
    assert answer(model.session()) == right
    assert answer(model) == right


def states_are_those_of_their_tokens(model: Model, tokens: list[int]) -> None:
    """The longest stored beginning of `tokens` goes on as a cold run does, but for the rounding of decoded ones."""
    warm, cold = model.session(), fresh(model).session()
    warm.sync(tokens), cold.sync(tokens)
    off = mx.sqrt(mx.mean(mx.square(warm.logits - cold.logits)) / mx.mean(mx.square(cold.logits)))
    assert off.item() < 1e-4


@contextmanager
def interrupted_at(block: Block, call: int, method: str) -> Iterator[None]:
    """KeyboardInterrupt behind the given call of a method of one block."""
    original, calls = getattr(Block, method), 0

    def counted(self: Block, *arguments: Any) -> Any:
        nonlocal calls
        result = original(self, *arguments)
        calls += self is block
        if self is block and calls == call:
            raise KeyboardInterrupt
        return result

    setattr(Block, method, counted)
    try:
        yield
    finally:
        setattr(Block, method, original)


@pytest.mark.parametrize("layer", range(8))
@pytest.mark.parametrize("step", [1, 2, 5])
def test_inside_a_step_of_decoding(loaded, right, layer, step):
    if layer >= len(loaded.decoder.blocks):
        pytest.skip("the model has fewer layers")
    model = fresh(loaded)
    live = model.session()
    with interrupted_at(loaded.decoder.blocks[layer], step, "step"), pytest.raises(KeyboardInterrupt):
        answer(live)
    prompt = model.tokenizer.encode(model.template.render(QUESTION, thinking=False))
    states_are_those_of_their_tokens(model, [*prompt, *right[: step + 2], 40])
    check(model, live, right)


@pytest.mark.parametrize("layer", range(8))
def test_inside_a_chunk_of_a_prompt(loaded, right, layer):
    if layer >= len(loaded.decoder.blocks):
        pytest.skip("the model has fewer layers")
    model = fresh(loaded)
    live = model.session()
    with interrupted_at(loaded.decoder.blocks[layer], 2, "__call__"), pytest.raises(KeyboardInterrupt):
        answer(live)
    check(model, live, right)


class Tracer:
    """Raises KeyboardInterrupt before the `at`-th line that runs in the files of `TRACED`; counts them without."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.lines = at, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self

    def run(self, action: Callable[[], Any]) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            action()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)


def between_lines(loaded: Model, right: tuple[int, ...], moments: list[int]) -> None:
    for moment in moments:
        model = fresh(loaded)
        live = model.session()
        Tracer(moment).run(lambda live=live: answer(live, most=5))
        check(model, live, right)


def lines_of_an_answer(loaded: Model) -> int:
    counter = Tracer()
    counter.run(lambda: answer(fresh(loaded).session(), most=5))
    return counter.lines


def test_between_any_two_lines(loaded, right):
    lines = lines_of_an_answer(loaded)
    assert lines > 300
    between_lines(loaded, right, random.Random(1).sample(range(1, lines), 12))


@pytest.mark.slow
def test_between_many_two_lines(loaded, right):
    between_lines(loaded, right, list(range(1, lines_of_an_answer(loaded), 7)))


def test_a_step_that_is_not_noted_as_torn_is_found(loaded, right, monkeypatch):
    """The fault: a cache does not know that its layers stand apart."""
    monkeypatch.setattr(Cache, "begin", lambda self: None)
    with pytest.raises((AssertionError, RequestError)):
        test_inside_a_step_of_decoding(loaded, right, 0, 2)


def test_a_torn_cache_is_refused(loaded):
    cache = loaded.new_cache()
    loaded(mx.array([[1, 2, 3]]), cache)
    with interrupted_at(loaded.decoder.blocks[1], 1, "step"), pytest.raises(KeyboardInterrupt):
        loaded(mx.array([[4]]), cache)
    with pytest.raises(RequestError) as caught:
        loaded(mx.array([[4]]), cache)
    assert str(caught.value) == (
        "cache: the evaluation behind its 3 tokens was interrupted; begin with a new one"
    )
    with pytest.raises(RequestError, match="snapshot: an evaluation of this timeline was interrupted"):
        loaded.store.put([1, 2, 3], cache)


def test_a_second_answer_has_to_wait_for_the_first(loaded, right):
    model = fresh(loaded)
    live = model.session()
    first = moelocal.stream(live, QUESTION, max_tokens=12, sampling=GREEDY, thinking=False)
    begun = [next(first) for _ in range(4)]
    message = (
        "session: an answer is still being streamed; read it to its end, close() the stream, or fork() before"
    )
    for action in (
        lambda: answer(live), live.fork, lambda: live.rewind(0), lambda: live.sync([5]), lambda: live.save("x"),
    ):  # fmt: skip
        with pytest.raises(RequestError) as caught:
            action()
        assert str(caught.value) == message
    # and the first one is as if nothing had happened
    assert tuple(t for event in [*begun, *first] for t in event.tokens) == right
    check(model, live, right)


def test_a_stream_that_is_closed_lets_the_next_one_begin(loaded, right):
    model = fresh(loaded)
    live = model.session()
    for count in (1, 2, 5):
        stream = moelocal.stream(live, QUESTION, max_tokens=12, sampling=GREEDY, thinking=False)
        for _ in range(count):
            next(stream)
        stream.close()
        assert live.cache.position == live.position
        fork = live.fork()
        check(model, fork, right)
    check(model, live, right)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "tokens: expected at least one, got none"),
        ([-5], "tokens: expected 0 to {last}, got -5"),
        ([1, 2**40], "tokens: expected 0 to {last}, got 1099511627776"),
        ("abc", "tokens: expected integers, got 'abc'"),
        ([1.5], "tokens: expected integers, got [1.5]"),
    ],
)
def test_what_is_no_token_is_refused(loaded, tokens, message):
    live = loaded.session()
    with pytest.raises(RequestError) as caught:
        live.sync(tokens)
    assert str(caught.value) == message.format(last=loaded.config.vocab - 1)
    assert live.sync(mx.array([5, 6]).tolist()).tokens == 2


def test_what_is_too_long_is_refused_before_it_is_read(loaded, monkeypatch):
    live = fresh(loaded).session()
    with pytest.raises(ContextOverflow, match="4097 tokens, the context of embedded has 4096; shorten them"):
        live.sync([5] * 4097)
    monkeypatch.setenv("MOELOCAL_MEMORY", "1MB")
    with pytest.raises(MemoryOverflow, match="not even one token fits"):
        live.sync([5, 6])
    assert live.position == 0


def test_an_answer_that_memory_ends_is_not_read_again(loaded, monkeypatch):
    """What a session reads ahead is no part of the request, and is left out where it does not fit."""
    model = fresh(loaded)
    live = model.session()
    asked = [{"role": "user", "content": "What is 23 + 48?"}]
    prompt = len(model.tokenizer.encode(model.template.render(asked)))
    whole = moelocal.generate(live, asked, max_tokens=200, sampling=GREEDY)
    assert whole.finish_reason == "stop"
    calls: list[int] = []
    made = Model.make_room

    def refused(self: Model, session: Session, count: int, *, refuse: bool = True) -> None:
        calls.append(count)
        if refuse and count > prompt:
            raise MemoryOverflow("too much")
        made(self, session, count, refuse=refuse)

    monkeypatch.setattr(Model, "make_room", refused)
    model = fresh(loaded)
    again = moelocal.generate(model.session(), asked, max_tokens=200, sampling=GREEDY)
    assert again.tokens == whole.tokens and again.finish_reason == "stop" and max(calls) > prompt


def test_snapshots_give_way_to_a_request(loaded, monkeypatch):
    model = fresh(loaded)
    monkeypatch.setenv("MOELOCAL_MEMORY", "1000TB")
    model.store.budget = 1 << 30
    for number in range(4):
        model.session().sync([5 + number] * 2100)
    held = model.store.nbytes
    assert held > 4_000_000
    from moelocal.engine.plan import plan, weights_nbytes

    made = plan(model.config, weights_nbytes(model.decoder), model.dtype, 3000, 1)
    monkeypatch.setenv("MOELOCAL_MEMORY", str(made.nbytes + held // 2))
    model.session().sync([9] * 3000)
    assert 0 < model.store.nbytes <= held // 2
    assert model.store.counts["evicted"] > 0


def test_other_sessions_count(loaded, monkeypatch):
    model = fresh(loaded)
    one, other = model.session(), model.session()
    one.sync([5] * 3000)
    assert model.held(other) == one.cache.nbytes > 0 and model.held(one) == 0
    from moelocal.engine.plan import plan, weights_nbytes

    made = plan(model.config, weights_nbytes(model.decoder), model.dtype, 3000, 1)
    monkeypatch.setenv("MOELOCAL_MEMORY", str(made.nbytes + one.cache.nbytes - 1000))
    with pytest.raises(MemoryOverflow, match="held"):
        other.sync([6] * 3000)
    del one
    other.sync([6] * 3000)


def test_a_loaded_session_need_not_read_again(loaded, tmp_path):
    live = fresh(loaded).session()
    live.sync([5, 6, 7])
    live.save(tmp_path / "x")
    again = Session.load(tmp_path / "x", fresh(loaded))
    assert again.sync([5, 6, 7]).cached == 3
    assert mx.array_equal(again.logits, live.logits)


@pytest.mark.parametrize("arguments", [{"turn": "a"}, {"turn": True}, {"position": True}, {"position": 1.0}])
def test_rewinding_to_nowhere_is_one_line(loaded, arguments):
    live = loaded.session()
    live.sync([5, 6, 7])
    ((name, value),) = arguments.items()
    with pytest.raises(RequestError, match=rf"rewind: {name}: expected .*, got {value!r}"):
        live.rewind(**arguments)
