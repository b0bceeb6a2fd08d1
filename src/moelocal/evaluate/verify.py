"""The proof at the user's hand: a conversation replayed in every way that the engine has, and the logits compared."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from moelocal import metal
from moelocal.cache import Cache, Disk, Store
from moelocal.cache.ragged import Rows
from moelocal.engine.batch import MOST_ROWS, generate_batch
from moelocal.engine.chunks import boundaries
from moelocal.engine.generate import Request, generate
from moelocal.engine.load import Model
from moelocal.engine.sampling import Sampling
from moelocal.engine.session import Reuse, Session
from moelocal.errors import ContextOverflow, RequestError
from moelocal.ops.op import force
from moelocal.text.messages import prepare, prepare_tools

DECODED: Final = {mx.float32: 1e-4, mx.float16: 2**-6, mx.bfloat16: 2**-4}
"""How far logits may be off where tokens were decoded on one side and read as a prompt on the other, or computed by
another form of the operations: root mean square of the difference over that of the logits. One rounding in the dtype
of activations is 2^-11 and 2^-8 of a value; layers add and amplify them. For float32 the order of sums."""

ANSWER: Final = 32
"""Tokens that are decoded behind every prompt, greedily."""

CONVERSATION: Final = (
    {"role": "system", "content": "You answer briefly."},
    {"role": "user", "content": "Hello! My name is Ada."},
    {"role": "assistant", "content": "Hello, Ada!"},
    {"role": "user", "content": "What is 12 + 7?"},
    {"role": "assistant", "content": "19"},
    {"role": "user", "content": "What is my name?"},
)
"""Where the user gives none."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to come to the end of every prompt of a conversation.

    `reused`: tokens that were not evaluated again, of `tokens`; `error`: of the prompt that is worst, root mean square
    of the difference from a cold run over that of the logits; `allowed`: 0 where the same bits are promised; `equal`:
    whether the greedy answers have the same tokens.
    """

    name: str
    prompts: int
    tokens: int
    reused: int
    error: float
    allowed: float
    equal: bool

    @property
    def right(self) -> bool:
        return self.equal and self.error <= self.allowed


@dataclass(frozen=True, slots=True)
class _Result:
    """Behind one prompt: logits float32 [V], tokens of the greedy answer, logits that its last token was chosen by,
    tokens reused."""

    logits: mx.array
    answer: tuple[int, ...]
    ended: mx.array
    reused: int


def prompts(model: Model, messages: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The prompts of a conversation: what was sent at each turn. Raises `RequestError` if there is none."""
    messages = list(messages)
    ends = [i for i, m in enumerate(messages) if m.get("role") in ("user", "tool")]
    last = [i for i in ends if i + 1 not in ends]
    found = [messages[: i + 1] for i in last if any(m.get("role") == "user" for m in messages[: i + 1])]
    if not found:
        raise RequestError("conversation: expected at least one message of the user, got none")
    return found


class _Watched(Session):
    """A session that notes the logits behind every prompt."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.synced: list[tuple[Reuse, mx.array]] = []

    def sync(self, tokens: Sequence[int]) -> Reuse:
        reuse = super().sync(tokens)
        self.synced.append((reuse, self.logits))
        return reuse


def verify(
    model: Model,
    messages: Sequence[dict[str, Any]] = CONVERSATION,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    thinking: bool | None = None,
) -> Iterator[Way]:
    """Replay a conversation in every way, and compare each with a cold run. `tools` and `thinking` as `generate` takes
    them. Raises `RequestError`, `TemplateError`,
    `ContextOverflow`."""
    turns = prompts(model, messages)
    schemas = prepare_tools(tools)

    def rendered(turn: Sequence[dict[str, Any]]) -> list[int]:
        text = model.template.render(prepare(turn), tools=schemas, thinking=thinking)
        return model.tokenizer.encode(text)

    tokens = [rendered(turn) for turn in turns]
    longest = max(map(len, tokens))
    if longest + ANSWER > model.config.context:
        raise ContextOverflow(
            f"conversation: its longest prompt has {longest} tokens, and {ANSWER} more are decoded; the context has "
            f"{model.config.context}"
        )
    budget = model.store.budget
    # a sum in another order may move a number to the next code
    decoded = max(DECODED[model.dtype], 0.0 if model.kv_bits is None else 2.0**-model.kv_bits)

    def fresh(disk: Disk | None = None) -> Model:
        other = Model(model.decoder, model.folder, model.name)
        other.store = Store(model.store.fingerprint, budget, disk)
        return other

    cold = [_behind(fresh().session(), prompt) for prompt in tokens]

    def way(name: str, allowed: float, results: Sequence[_Result]) -> Way:
        pairs = list(zip(results, cold, strict=True))
        return Way(
            name,
            len(tokens),
            sum(map(len, tokens)),
            sum(result.reused for result in results),
            max(_error(result.logits, expected.logits) for result, expected in pairs),
            allowed,
            all(result.answer == expected.answer for result, expected in pairs),
        )

    yield way("cold, again", 0.0, [_behind(fresh().session(), prompt) for prompt in tokens])

    warm = fresh()
    yield way("warm: one call after the other", 0.0, [_behind(warm.session(), prompt) for prompt in tokens])

    session = fresh().session()
    yield way("one session", 0.0, [_behind(session, prompt) for prompt in tokens])

    yield way("forked", 0.0, list(_each(fresh(), tokens, lambda s: s.fork())))

    def rewound(session: Session) -> Session:
        here = list(session.tokens)
        starts = boundaries(here, session.model.message_start)
        session.sync([*here, *here[-1:] * 5])
        session.rewind(starts[-1] if starts else len(here) // 2)
        return session

    yield way("rewound", 0.0, list(_each(fresh(), tokens, rewound)))

    with tempfile.TemporaryDirectory() as folder:

        def restored() -> Iterator[_Result]:
            for prompt in tokens:
                other = fresh(Disk(Path(folder), model.store.fingerprint, budget))
                yield _behind(other.session(), prompt)
                other.store.close()

        yield way("from disk, a process for each", 0.0, list(restored()))

    def ends(name: str, found: Sequence[mx.array], equal: bool) -> Way:
        """Of logits at the ends of the answers of a cold run."""
        error = max(_error(got, result.ended) for got, result in zip(found, cold, strict=True))
        count = sum(len(p) + len(r.answer) - 1 for p, r in zip(tokens, cold, strict=True))
        return Way(name, len(tokens), count, 0, error, decoded, equal)

    read = []
    for prompt, result in zip(tokens, cold, strict=True):
        session = fresh().session()
        session.sync([*prompt, *result.answer[:-1]])
        read.append(session.logits)
    chosen = [_likeliest(model, logits) for logits in read]
    yield ends("decoded against read", read, chosen == [result.answer[-1] for result in cold])

    greedy = Sampling(temperature=0)
    watched, answered, ahead, known = _Watched(fresh()), list[_Result](), list[mx.array](), list[mx.array]()
    going_on = reused = 0
    for turn, prompt in zip(turns, tokens, strict=True):
        watched.synced.clear()
        done = generate(watched, turn, max_tokens=ANSWER, sampling=greedy, tools=tools, thinking=thinking)
        reuse, logits = watched.synced[0]
        answered.append(_Result(logits, done.tokens, logits, reuse.cached))
        # where an answer ends by itself it is read again; one that is cut off stays as it was decoded
        cut = watched.fork()
        shorter = max(len(done.tokens) - 1, 1)
        generate(cut, turn, max_tokens=shorter, sampling=greedy, tools=tools, thinking=thinking)
        starts = [0, *boundaries(prompt, model.message_start)]
        for session in (watched.fork(), cut):
            # behind the tokens that the session says it stands behind
            following = [*session.tokens, *prompt[starts[-2:][0] :]]
            if len(following) <= model.config.context:
                going_on, reused = going_on + len(following), reused + session.sync(following).cached
                ahead.append(session.logits)
                session = fresh().session()
                session.sync(following)
                known.append(session.logits)
    yield way("answered in a session", decoded, answered)
    yield Way(
        "gone on behind those answers",
        len(ahead),
        going_on,
        reused,
        max(map(_error, ahead, known), default=0.0),
        decoded,
        [_likeliest(model, each) for each in ahead] == [_likeliest(model, each) for each in known],
    )

    requests = [
        Request(turn, max_tokens=ANSWER, sampling=greedy, tools=tools, thinking=thinking) for turn in turns
    ]
    together = generate_batch(fresh(), requests)
    equal = [done.tokens == result.answer for done, result in zip(together, cold, strict=True)]
    yield ends("batched with others", _in_batches(fresh(), tokens, cold), all(equal))

    for form in ("reference", "portable", *(["metal"] if metal.available() else [])):
        with force(form):
            results = [_behind(fresh().session(), prompt) for prompt in tokens]
        yield way(f"all operations {form}", decoded, results)


def _each(
    model: Model, tokens: Sequence[list[int]], change: Callable[[Session], Session]
) -> Iterator[_Result]:
    """One session that `change` is done to before every prompt but the first."""
    session = model.session()
    for index, prompt in enumerate(tokens):
        if index:
            session = change(session)
        yield _behind(session, prompt)


def _behind(session: Session, prompt: list[int]) -> _Result:
    """Sync to a prompt, and decode an answer on a fork, so that the timeline stays at the prompt."""
    reuse = session.sync(prompt)
    logits = session.logits
    fork, answer = session.fork(), [_likeliest(session.model, logits)]
    while len(answer) < ANSWER and answer[-1] not in session.model.stop_tokens:
        answer.append(_likeliest(session.model, fork.feed(mx.array(answer[-1]))))
    return _Result(logits, tuple(answer), fork.logits, reuse.cached)


def _likeliest(model: Model, logits: mx.array) -> int:
    """Of the ids that stand for a token: rows of the head beyond those are never sampled."""
    allowed = mx.array(model.tokenizer.token_mask(model.config.vocab))
    token = mx.argmax(mx.where(allowed, logits, -mx.inf)).item()
    assert isinstance(token, int)
    return token


def _in_batches(model: Model, prompts: Sequence[list[int]], cold: Sequence[_Result]) -> list[mx.array]:
    """The logits at the end of each answer, its tokens fed to `MOST_ROWS` timelines together."""
    ended: list[mx.array] = []
    for start in range(0, len(prompts), MOST_ROWS):
        rows, feeding = Rows(), dict[Cache, deque[int]]()
        found: dict[Cache, mx.array] = {}
        for prompt, result in zip(prompts[start : start + MOST_ROWS], cold[start:], strict=False):
            session = model.session()
            session.sync(prompt)
            feeding[session.cache], found[session.cache] = deque(result.answer[:-1]), session.logits
            rows.join(session.cache)
        while True:
            for cache in [cache for cache in rows.caches if not feeding[cache]]:
                rows.leave(cache)
            if not rows.caches:
                break
            tokens = [[feeding[cache].popleft()] for cache in rows.caches]
            logits = model.decoder.step_rows(mx.array(tokens), rows)
            found |= dict(zip(rows.caches, logits[:, 0], strict=True))
        mx.eval(list(found.values()))
        ended += found.values()
    return ended


def _error(got: mx.array, expected: mx.array) -> float:
    size = mx.sqrt(mx.mean(mx.square(expected)))
    return float(mx.sqrt(mx.mean(mx.square(got - expected))) / mx.maximum(size, 1e-30))
