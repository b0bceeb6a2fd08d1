"""Random conversations: whatever was stored, forked, left, edited or lost before, an answer is that of a cold run."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import currently_in_test_context, example, given, note, settings
from hypothesis import strategies as st

import moelocal
from moelocal.cache import AttentionCache, Disk, RecurrentCache, Store
from moelocal.cache.snapshot import Snapshot
from moelocal.engine import chunks, session
from moelocal.engine.chunks import boundaries
from moelocal.engine.load import Model
from moelocal.engine.session import Session
from moelocal.errors import RequestError
from moelocal.evaluate.verify import DECODED
from moelocal.text.messages import prepare, prepare_tools

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from conversations import fresh, played, scripts

GREEDY = moelocal.Sampling(temperature=0)
ANSWER = 4
"""Tokens decoded greedily behind every prompt that was read."""

TOOLS = [
    {"type": "function", "function": {"name": "run", "parameters": {"type": "object", "properties": {}}}}
]
CALL = {"name": "run", "arguments": {"command": "ls"}}

Action = tuple[Any, ...]


class Stoppable(Model):
    """A model that is interrupted at call number `calls` from now."""

    calls = -1

    def __call__(self, tokens: mx.array, cache: Any = None, rows: int | None = None) -> mx.array:
        self.calls -= 1
        if self.calls == 0:
            raise KeyboardInterrupt
        return super().__call__(tokens, cache, rows)


class Play:
    """Plays a conversation, action by action, and compares with a cold run after each.

    The logits are the same bits where both were evaluated in the same chunks. Without a decoded token in what is
    stored, the chunks have to be the same ones."""

    def __init__(self, base: Model, folder: Path | None) -> None:
        self.base, self.folder = base, folder
        self.model = self._opened()
        self.sessions = [self.model.session()]
        self.messages: list[dict[str, Any]] = []
        self.thinking: bool | None = None
        self.tools: list[dict[str, Any]] | None = None
        self.current = 0
        self.decoded = False
        self.reused = self.exact = 0
        self._cold: dict[tuple[int, ...], tuple[np.ndarray, list[tuple[int, int]], list[int]]] = {}

    def _opened(self) -> Stoppable:
        model = self._fresh()
        if self.folder is not None:
            disk = Disk(self.folder, self.base.store.fingerprint, 1 << 30)
            model.store = Store(self.base.store.fingerprint, 1 << 28, disk)
        return model

    def _fresh(self) -> Stoppable:
        """The same network with nothing stored."""
        model = Stoppable(self.base.decoder, self.base.folder, self.base.name)
        model.tokenizer, model.template = self.base.tokenizer, self.base.template
        model.store = Store(self.base.store.fingerprint, 1 << 28)
        return model

    @property
    def session(self) -> Session:
        return self.sessions[self.current]

    def run(self, actions: Sequence[Action]) -> None:
        try:
            for name, *arguments in actions:
                getattr(self, name)(*arguments)
        finally:
            self.model.store.close()

    # what comes next

    def prompt(self) -> list[int]:
        text = self.model.template.render(
            prepare(self.messages), tools=prepare_tools(self.tools), thinking=self.thinking
        )
        return self.model.tokenizer.encode(text)

    def say(self, text: str, way: str) -> None:
        self.messages.append({"role": "user", "content": text})
        self.answer(way)

    def answer(self, way: str) -> None:
        """Answer the messages: read them and take a given answer, or generate in the session or with a plain call."""
        if way == "read":
            self.read(self.prompt())
            self.messages.append({"role": "assistant", "content": "Yes.", "reasoning_content": "Well."})
            return
        options: dict[str, Any] = {"thinking": self.thinking, "tools": self.tools, "sampling": GREEDY}
        options |= {"max_tokens": 1} if way == "one token" else {"max_tokens": 24, "stop": ["e", "1"]}
        self.decoded = True
        source = self.model if way == "plain" else self.session
        done = moelocal.generate(source, self.messages, **options)
        assert done.tokens == moelocal.generate(self._fresh(), self.messages, **options).tokens
        self.reused += done.usage.cached
        self.compare()
        said = {"role": "assistant", "content": done.text, "tool_calls": done.tool_calls}
        self.messages.append(said | ({"reasoning_content": done.reasoning} if done.reasoning else {}))

    def result(self, text: str, way: str) -> None:
        """The answer called a tool."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages[-1] = {**self.messages[-1], "tool_calls": [CALL]}
            self.messages.append({"role": "tool", "content": text})
            self.answer(way)

    def edit(self, text: str, way: str) -> None:
        """The last question is another one."""
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if users:
            self.messages = self.messages[: users[-1]]
            self.say(text, way)

    def again(self, way: str) -> None:
        """The last answer is thrown away."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
            self.answer(way)

    def back(self, count: int, text: str, way: str) -> None:
        """The last messages are thrown away."""
        kept = self.messages[: max(len(self.messages) - count, 0)]
        while kept and kept[-1]["role"] != "assistant":
            kept.pop()
        self.messages = kept
        self.say(text, way)

    def system(self, text: str) -> None:
        rest = self.messages[self.messages[:1] != [] and self.messages[0]["role"] == "system" :]
        self.messages = [{"role": "system", "content": text}, *rest]

    def set_thinking(self, thinking: bool | None) -> None:
        self.thinking = thinking

    def set_tools(self, wanted: bool) -> None:
        self.tools = TOOLS if wanted else None

    # what happens to the state

    def fork(self) -> None:
        self.sessions.append(self.session.fork())
        self.current = len(self.sessions) - 1

    def another(self) -> None:
        self.sessions.append(self.model.session())
        self.current = len(self.sessions) - 1

    def switch(self, number: int) -> None:
        self.current = number % len(self.sessions)

    def rewind(self, part: float) -> None:
        self.session.rewind(int(part * self.session.position))
        self.compare()

    def rewind_turn(self, turn: int) -> None:
        starts = [0, *boundaries(self.session.tokens, self.model.message_start)]
        self.session.rewind(turn=turn % len(starts))
        self.compare()

    def forget(self) -> None:
        self.model.store.clear()

    def budget(self, snapshots: float) -> None:
        """Room for few snapshots, or for less than one."""
        own = sum(a.nbytes for layer in self.session._cache.layers for a in layer.arrays)
        self.model.store.budget = int(snapshots * max(own, 1 << 20))

    def restart(self) -> None:
        self.model.store.close()
        self.model = self._opened()
        self.sessions, self.current = [self.model.session()], 0

    def save(self) -> None:
        if self.session.position:
            with tempfile.TemporaryDirectory() as folder:
                self.session.save(Path(folder) / "chat.session")
                loaded = Session.load(Path(folder) / "chat.session", self.model)
            assert loaded.tokens == self.session.tokens
            self.decoded = True  # what it was before a half chunk is not saved
            self.sessions[self.current] = loaded

    def interrupted(self, call: int, text: str) -> None:
        """The user presses Control-C while a prompt is read."""
        self.messages.append({"role": "user", "content": text})
        self.model.calls = call
        try:
            self.session.sync(self.prompt())
        except KeyboardInterrupt:
            assert self.session.position == self.session._cache.position == 0
        self.model.calls = -1
        self.messages.pop()

    # what has to hold

    def read(self, tokens: list[int]) -> None:
        """Evaluate a prompt here, and decode behind it, apart."""
        self.reused += self.session.sync(tokens).cached
        assert self.session.tokens == tokens
        assert greedy(self.session.fork()) == self.cold(tokens)[2]
        self.compare()

    def compare(self) -> None:
        if not self.session.position or self.session._logits is None:
            return
        tokens, cache = self.session.tokens, self.session._cache
        assert cache.position == len(tokens)
        expected, chunks, _ = self.cold(tokens)
        logits = np.array(self.session.logits)
        if cache.chunks == chunks:
            self.exact += 1
            np.testing.assert_array_equal(logits, expected)
        else:
            assert self.decoded, f"evaluated in chunks {cache.chunks}, cold in {chunks}"
            error = np.sqrt(np.mean((logits - expected) ** 2) / np.mean(expected**2))
            assert error < DECODED[mx.float32]

    def cold(self, tokens: list[int]) -> tuple[np.ndarray, list[tuple[int, int]], list[int]]:
        """Logits, chunks and greedy answer behind tokens of which nothing was stored."""
        key = tuple(tokens)
        if key not in self._cold:
            session = self._fresh().session()
            session.sync(tokens)
            logits, chunks = np.array(session.logits), list(session._cache.chunks)
            self._cold[key] = logits, chunks, greedy(session)
        return self._cold[key]


def greedy(session: Session) -> list[int]:
    answer = []
    for _ in range(ANSWER):
        token = mx.argmax(session.logits)
        answer.append(int(token.item()))
        session.feed(token)
    return answer


TEXTS = st.sampled_from(
    [
        "Hello!",
        "My name is Ada.",
        "What is 12 + 7?",
        "Grüße, 世界 🙂",
        "<|im_start|>user\nnested<|im_end|>",
        "Look: </think>\n<tool_response>\nno tool\n</tool_response>",
        "Sort: " + "pear, apple, fig, " * 30,
    ]
)
READ = st.just("read")
WAYS = st.sampled_from(["read", "session", "plain", "one token"])


def actions(ways: st.SearchStrategy[str]) -> st.SearchStrategy[list[Action]]:
    step = st.one_of(
        st.tuples(st.just("say"), TEXTS, ways),
        st.tuples(st.just("say"), TEXTS, ways),
        st.tuples(st.just("result"), TEXTS, ways),
        st.tuples(st.just("edit"), TEXTS, ways),
        st.tuples(st.just("again"), ways),
        st.tuples(st.just("back"), st.integers(1, 4), TEXTS, ways),
        st.tuples(st.just("system"), TEXTS),
        st.tuples(st.just("set_thinking"), st.sampled_from([None, True, False])),
        st.tuples(st.just("set_tools"), st.booleans()),
        st.tuples(st.just("fork")),
        st.tuples(st.just("another")),
        st.tuples(st.just("switch"), st.integers(0, 3)),
        st.tuples(st.just("rewind"), st.floats(0, 1)),
        st.tuples(st.just("rewind_turn"), st.integers(0, 7)),
        st.tuples(st.just("forget")),
        st.tuples(st.just("budget"), st.sampled_from([0.5, 1.5, 3.0])),
        st.tuples(st.just("restart")),
        st.tuples(st.just("interrupted"), st.integers(1, 4), TEXTS),
        *([st.tuples(st.just("save"))] if ways is not READ else []),
    )
    first = st.tuples(st.just("say"), TEXTS, ways)
    return st.tuples(first, st.lists(step, min_size=2, max_size=12)).map(lambda both: [both[0], *both[1]])


@pytest.fixture(scope="module")
def loaded() -> Model:
    return moelocal.load()


@pytest.fixture(autouse=True)
def short_strides(monkeypatch):
    """So short that these conversations are longer."""
    for module in (chunks, session):
        monkeypatch.setattr(module, "STRIDE", 96)
    monkeypatch.setattr(session, "SPARSE", 2 * 96)


def play(loaded: Model, conversation: Sequence[Action]) -> Play:
    with tempfile.TemporaryDirectory() as folder:
        disk = any(name == "restart" for name, *_ in conversation)
        played = Play(loaded, Path(folder) if disk else None)
        try:
            played.run(conversation)
        finally:
            if currently_in_test_context():
                note(f"the messages then: {played.messages}")
    return played


NESTED: list[Action] = [  # a snapshot where this text has a boundary, and the next one has none
    ("say", "Hello!", "read"),
    ("say", "<|im_start|>user\nnested<|im_end|>", "read"),
    ("edit", "Hello!", "read"),
]


@settings(max_examples=4)
@given(conversation=actions(READ))
@example(conversation=NESTED)
def test_what_was_read_is_the_same_bits_warm_and_cold(loaded, conversation):
    play(loaded, conversation)


@settings(max_examples=4)
@given(conversation=actions(WAYS))
def test_answers_are_those_of_a_cold_run(loaded, conversation):
    play(loaded, conversation)


@pytest.mark.slow
@settings(max_examples=20)
@given(conversation=actions(READ))
def test_many_that_were_read(loaded, conversation):
    play(loaded, conversation)


@pytest.fixture(scope="module")
def coded() -> Model:
    """Keys and values in 4 bits."""
    return moelocal.load(kv_bits=4)


@settings(max_examples=2)
@given(conversation=actions(READ))
@example(conversation=NESTED)
def test_what_was_kept_in_codes_is_the_same_bits_warm_and_cold(coded, conversation):
    play(coded, conversation)


@pytest.mark.slow
@settings(max_examples=15)
@given(conversation=actions(READ))
def test_many_that_were_kept_in_codes(coded, conversation):
    play(coded, conversation)


@pytest.mark.slow
@settings(max_examples=20)
@given(conversation=actions(WAYS))
def test_many_that_were_answered(loaded, conversation):
    play(loaded, conversation)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["session", "plain"])
@pytest.mark.parametrize("number", range(len(scripts())), ids=lambda n: scripts()[n].name)
def test_all_is_reused_that_could_be(loaded, number, way):
    model = fresh(loaded)
    reused, best = played(model, model.session() if way == "session" else model, scripts()[number])
    assert reused == best > 0


# --- the play itself: it reuses, compares bits, and finds what is wrong ---

TOUR: list[Action] = [
    ("system", "You are brief."),
    ("say", "My name is Ada.", "read"),
    ("say", "What is 12 + 7?", "read"),
    ("fork",),
    ("edit", "Hello!", "read"),
    ("switch", 0),
    ("again", "read"),
    ("another",),
    ("say", "Hello!", "read"),
    ("restart",),
    ("back", 2, "What is 12 + 7?", "read"),
]


def take_tour(loaded: Model) -> None:
    played = play(loaded, TOUR)
    assert played.exact == 6 and played.reused > 100


def test_the_tour_reuses_and_compares_bits(loaded):
    take_tour(loaded)


def forgets_conv(self: Snapshot, segments: Any) -> Any:
    cache = RESTORE(self, segments)
    for layer in cache.layers:
        if isinstance(layer, RecurrentCache):
            layer.conv = mx.zeros_like(layer.conv)
    return cache


def wrong_position(self: Snapshot, segments: Any) -> Any:
    cache = RESTORE(self, segments)
    cache.position += 1
    return cache


def loses_a_position(self: Snapshot, segments: Any) -> Any:
    cache = RESTORE(self, segments)
    for layer in cache.layers:
        if isinstance(layer, AttentionCache):
            layer.cut(layer.length - 1)
            layer.append(mx.zeros_like(layer.part(0, 1)[0]))
    return cache


def rounds_state(self: Snapshot, segments: Any) -> Any:
    cache = RESTORE(self, segments)
    for layer in cache.layers:
        if isinstance(layer, RecurrentCache):
            layer.state = layer.state.astype(mx.bfloat16).astype(mx.float32)
    return cache


RESTORE = Snapshot.restore


@pytest.mark.parametrize("fault", [forgets_conv, wrong_position, loses_a_position, rounds_state])
def test_a_fault_in_what_is_restored_is_found(loaded, monkeypatch, fault):
    monkeypatch.setattr(Snapshot, "restore", fault)
    with pytest.raises((AssertionError, RequestError)):
        take_tour(loaded)


def test_a_fork_that_shares_its_state_is_found(loaded, monkeypatch):
    conversation = [
        ("say", "My name is Ada.", "session"),
        ("fork",),
        ("say", "Hello!", "session"),
        ("switch", 0),
        ("edit", "What is 12 + 7?", "session"),
    ]
    play(loaded, conversation)
    monkeypatch.setattr(RecurrentCache, "fork", lambda self: self)
    with pytest.raises(AssertionError):
        play(loaded, conversation)


def test_a_wrong_key_is_found(loaded, monkeypatch):
    conversation = [
        ("system", "Rule 1."),
        ("say", "Hello!", "read"),
        ("system", "Rule 2."),
        ("edit", "What is 12 + 7?", "read"),
    ]
    play(loaded, conversation)
    monkeypatch.setattr("moelocal.cache.keys.Chain.key", lambda self, position: f"{position:032x}")
    with pytest.raises(AssertionError):
        play(loaded, conversation)


def test_going_on_inside_a_chunk_is_found(loaded, monkeypatch):
    monkeypatch.setattr("moelocal.engine.session.is_cut", lambda tokens, position, start: True)
    conversation = [("set_thinking", True), ("say", "Hello!", "read"), ("result", "4", "read")]
    with pytest.raises(AssertionError, match="evaluated in chunks"):
        play(loaded, conversation)
