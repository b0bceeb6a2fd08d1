"""`stream` and `generate`: from a prompt to an answer.

The step for token n + 1 is queued before token n is read, so that the device never waits for Python; the sampled token
stays on the device in between.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict, Unpack, cast, overload

import mlx.core as mx

from moelocal.engine.chunks import boundaries
from moelocal.engine.completion import Completion, Event, FinishReason, Timing, TokenLogprob, Usage
from moelocal.engine.load import Model
from moelocal.engine.sampling import BAD_LOGITS, Sampler, Sampling, log_probabilities
from moelocal.engine.session import Reuse, Session
from moelocal.errors import ContextOverflow, MemoryOverflow, NumericsError, RequestError, TemplateError
from moelocal.text.answer import AnswerParser, Delta, ends_inside_thinking
from moelocal.text.detokenizer import Detokenizer
from moelocal.text.messages import prepare, prepare_tools
from moelocal.text.stop import StopStrings
from moelocal.text.tool_calls import ToolCall

MOST_TOKENS: Final = 32_768
"""Tokens of an answer when `max_tokens` is not given: what the model cards recommend."""

Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of several, with settings of its own. Fields as the arguments of `stream`."""

    prompt: Prompt
    max_tokens: int | None = None
    sampling: Sampling | None = None
    stop: Sequence[str] = ()
    seed: int | None = None
    thinking: bool | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    logprobs: int | None = None
    raw: bool = False


Prompts = list[str] | list[Request] | list[Sequence[Mapping[str, Any]]]


class Options(TypedDict, total=False):
    """The settings of an answer, as `stream` describes them."""

    max_tokens: int | None
    sampling: Sampling | None
    stop: Sequence[str]
    seed: int | None
    thinking: bool | None
    tools: Sequence[Mapping[str, Any]] | None
    logprobs: int | None
    raw: bool


@overload
def generate(model: Model | Session, prompt: Prompt, **options: Unpack[Options]) -> Completion: ...
@overload
def generate(model: Model | Session, prompt: Prompts, **options: Unpack[Options]) -> list[Completion]: ...
def generate(
    model: Model | Session, prompt: Prompt | Prompts, **options: Unpack[Options]
) -> Completion | list[Completion]:
    """The whole answer to `prompt`; to a list of prompts the answers in their order, decoded together: each is what it
    is alone, by the rule that `engine/batch.py` states. A list of `Request`s has settings for each.

    Arguments and errors as of `stream`; of several prompts an error names which one, and what goes wrong with one of
    them while it is answered raises `BatchError` when the others are done, with their completions. A `Session` is one
    timeline, and takes one prompt.
    """
    if not isinstance(prompt, str) and prompt and not isinstance(prompt[0], Mapping):
        from moelocal.engine.batch import generate_batch  # here: it builds on this file

        if isinstance(model, Session):
            raise RequestError("prompt: a session takes one prompt, got a list of them; pass the model")
        if options and any(isinstance(each, Request) for each in prompt):
            raise RequestError(
                f"{next(iter(options))}: a Request has settings of its own; name it there, not beside a list of them"
            )
        each_of = cast(Sequence[Prompt | Request], prompt)
        return generate_batch(
            model, [p if isinstance(p, Request) else Request(p, **options) for p in each_of]
        )
    completion = None
    for event in stream(model, cast(Prompt, prompt), **options):
        completion = event.completion
    assert completion is not None  # the last event of a stream has it
    return completion


def stream(
    model: Model | Session,
    prompt: Prompt,
    *,
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    logprobs: int | None = None,
    raw: bool = False,
) -> Generator[Event, None, None]:
    """The answer to `prompt`, piece by piece; closing the iterator stops the generation.

    `model`: a model, whose snapshots of earlier calls are used; or a `Session` of it, whose timeline goes on. After the
    last event a session evaluates the answer as the next turn will render it, so that this turn need not wait for it.

    `prompt`: one user message as a string, or a list of messages ({"role": ..., "content": ...}); with `raw`, plain
    text to continue. `max_tokens`: None for 32,768, less where the context ends. `sampling`: None for the
    checkpoint's own. `stop`: strings that end the answer, themselves left out. `seed`: makes a sampled answer
    repeatable on one machine and version. `thinking`: True or False switches it where the template can; None leaves
    it to the template. `tools`: JSON schemas as in the OpenAI API. `logprobs`: number of alternatives to report per
    token, 0 for the sampled token alone, None for none.

    Everything is checked here, before the first event is asked for. Raises `RequestError`, `ContextOverflow`,
    `MemoryOverflow`, `TokenizerError`, `TemplateError`, `ConfigError`; while streaming, `NumericsError`.
    """
    started = time.perf_counter()
    lasting = isinstance(model, Session)
    session = model if isinstance(model, Session) else model.session()
    model = session.model
    answer, sampler, most, allowed = _prepared(
        *(model, prompt, started, max_tokens, sampling, stop, seed, thinking, tools, logprobs, raw),
        held=model.held(session),
    )

    def events() -> Generator[Event, None, None]:
        mx.reset_peak_memory()
        answer.reuse = session.sync(answer.prompt)
        done = None
        with session.answering(), closing(_steps(session, sampler, most, logprobs, allowed)) as steps:
            for event in answer.events(steps):
                done = event.completion
                yield event
        if lasting and not raw and done is not None and done.finish_reason != "length":
            following = _following(model, prompt, done, thinking, tools)
            if following:
                # the answer is there already: what is too long for the context or memory is read when it is needed
                with suppress(ContextOverflow, MemoryOverflow):
                    session.sync(following)
                    session.keep()

    return events()


def _prepared(
    model: Model,
    prompt: Prompt,
    started: float,
    max_tokens: int | None,
    sampling: Sampling | None,
    stop: Sequence[str],
    seed: int | None,
    thinking: bool | None,
    tools: Sequence[Mapping[str, Any]] | None,
    logprobs: int | None,
    raw: bool,
    held: int = 0,
) -> tuple[_Answer, Sampler, int, mx.array]:
    """A request, checked: what collects its answer, what draws it, its most tokens, and the tokens there are, bool [V].
    Arguments and errors as of `stream`; `held`: bytes of other timelines."""
    if logprobs is not None and (not isinstance(logprobs, int) or isinstance(logprobs, bool) or logprobs < 0):
        raise RequestError(f"logprobs: expected an integer from 0, or None, got {logprobs!r}")
    tokens, parser = _read(model, prompt, stop, thinking, tools, raw)
    room = model.config.context - len(tokens)
    if room < 1:
        raise ContextOverflow(
            f"the prompt has {len(tokens)} tokens, the context of {model.name} {model.config.context}; shorten it"
        )
    asked = max_tokens is not None
    if max_tokens is None:
        max_tokens = MOST_TOKENS
    elif not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
        raise RequestError(f"max_tokens: expected an integer from 1, got {max_tokens!r}")
    # rows of the vocabulary without a token are padding: never sampled
    mask = model.tokenizer.token_mask(model.config.vocab)
    sampler = Sampler(sampling or model.defaults, token_mask=mask, seed=seed, prompt=tokens)
    answer = _Answer(tokens, Detokenizer(model.tokenizer), parser, model.stop_tokens, started)
    most = model.fit(len(tokens), min(max_tokens, room), asked=asked, held=held)
    return answer, sampler, most, mx.array(mask)


def _following(
    model: Model,
    prompt: Prompt,
    done: Completion,
    thinking: bool | None,
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[int]:
    """The tokens up to where the next message will begin, as the template will render them then: it may drop the
    reasoning. Empty where that cannot be known."""
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    answer = {"role": "assistant", "content": done.text, "tool_calls": done.tool_calls}
    if done.reasoning:
        answer["reasoning_content"] = done.reasoning
    reply = {"role": "tool" if done.tool_calls else "user", "content": "?"}
    try:
        text = model.template.render(
            prepare([*before, answer, reply]),
            tools=prepare_tools(tools),
            thinking=thinking,
            add_generation_prompt=False,
        )
    except TemplateError:
        return []  # what this template wants there only the next turn will tell
    tokens = model.tokenizer.encode(text)
    ends = boundaries(tokens, model.message_start)
    return tokens[: ends[-1]] if ends else []


def _read(
    model: Model,
    prompt: Prompt,
    stop: Sequence[str],
    thinking: bool | None,
    tools: Sequence[Mapping[str, Any]] | None,
    raw: bool,
) -> tuple[list[int], AnswerParser | StopStrings]:
    """The tokens of the prompt, and the parser that fits the answer."""
    if isinstance(stop, str):
        raise RequestError(f"stop: expected a list of strings, got the string {stop!r}")
    parser: AnswerParser | StopStrings
    if raw:
        if not isinstance(prompt, str):
            raise RequestError(f"prompt: with raw=True, expected a string, got {type(prompt).__name__}")
        if thinking is not None or tools is not None:
            raise RequestError("raw=True continues plain text: thinking and tools need the chat template")
        text, parser = prompt, StopStrings(stop)
    else:
        tools = prepare_tools(tools)
        text = model.template.render(prepare(prompt), tools=tools, thinking=thinking)
        parser = AnswerParser(thinking_open=ends_inside_thinking(text), stops=stop, tools=tools)
    tokens = model.tokenizer.encode(text)
    if not tokens:
        raise RequestError("prompt: expected at least one token, got an empty text")
    vocab = model.config.vocab
    if max(tokens) >= vocab:
        outside = next(token for token in tokens if token >= vocab)
        raise RequestError(f"token {outside} is outside the model's {vocab} rows: foreign tokenizer?")
    return tokens, parser


@dataclass(frozen=True, slots=True)
class _Step:
    """A queued token: int32 [] on the device, and its log-probabilities if asked for."""

    token: mx.array
    logprobs: tuple[mx.array, mx.array, mx.array] | None

    @property
    def arrays(self) -> list[mx.array]:
        return [self.token, *(self.logprobs or ())]

    @property
    def number(self) -> int:
        """The token, waited for."""
        number = self.token.item()
        assert isinstance(number, int)
        return number


def _steps(
    session: Session, sampler: Sampler, most: int, logprobs: int | None, mask: mx.array
) -> Generator[_Step, None, None]:
    """Up to `most` tokens, each handed out when the step after it is already queued."""

    def choose(logits: mx.array) -> _Step:
        token = sampler(logits)
        extra = None if logprobs is None else log_probabilities(logits, token, logprobs, token_mask=mask)
        step = _Step(token, extra)
        mx.async_eval(*step.arrays)  # type: ignore[no-untyped-call]  # MLX has no annotation for it
        return step

    step = choose(session.logits)
    yield step  # alone: when it comes is a matter of the prompt, and what is timed behind it are whole steps
    if most > 1:
        step = choose(session.feed(step.token))
        for _ in range(most - 2):
            following = choose(session.feed(step.token))
            yield step
            step = following
        yield step


@dataclass(slots=True)
class _Answer:
    """Collects what the steps give, as events and as their sum."""

    prompt: list[int]
    detokenizer: Detokenizer
    parser: AnswerParser | StopStrings
    stop_tokens: frozenset[int]
    started: float
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    reuse: Reuse | None = None

    def events(self, steps: Iterable[_Step]) -> Iterator[Event]:
        first = time.perf_counter()
        stopped = False
        for step in steps:
            token = self._take(step)
            if len(self.tokens) == 1:
                first = time.perf_counter()
            if token in self.stop_tokens:
                stopped = True
                yield Event(tokens=(token,))
                break
            delta = self._add(self.detokenizer.add(token))
            yield Event(delta.text, delta.reasoning, delta.tool_calls, (token,))
            if delta.stopped:
                stopped = True
                break
        delta = self._finish()
        yield Event(delta.text, delta.reasoning, delta.tool_calls, (), self._completion(stopped, first))

    def _take(self, step: _Step) -> int:
        token = step.number
        if token == BAD_LOGITS:
            raise NumericsError(
                f"the logits of token {len(self.tokens) + 1} are NaN or infinite: the weights are damaged, or overflow "
                'in this dtype; try dtype="float32"'
            )
        self.tokens.append(token)
        if step.logprobs is not None:
            chosen, ids, values = step.logprobs
            top = tuple(zip(_list(ids), _list(values), strict=True))
            self.logprobs = self.logprobs or []
            value = chosen.item()
            assert isinstance(value, float)
            self.logprobs.append(TokenLogprob(token, value, top))
        return token

    def _add(self, text: str) -> Delta:
        if isinstance(self.parser, StopStrings):
            plain, stopped = self.parser.add(text)
            return self._keep(Delta(plain, stopped=stopped))
        return self._keep(self.parser.add(text))

    def _finish(self) -> Delta:
        """What the detokenizer and the parser held back."""
        delta = self._add(self.detokenizer.finish())
        rest = Delta(self.parser.finish()) if isinstance(self.parser, StopStrings) else self.parser.finish()
        rest = self._keep(rest)
        return Delta(
            delta.text + rest.text,
            delta.reasoning + rest.reasoning,
            delta.tool_calls + rest.tool_calls,
            rest.stopped,
        )

    def _keep(self, delta: Delta) -> Delta:
        self.text.append(delta.text)
        self.reasoning.append(delta.reasoning)
        self.calls.extend(delta.tool_calls)
        return delta

    def _completion(self, stopped: bool, first: float) -> Completion:
        assert self.reuse is not None
        now = time.perf_counter()
        count = len(self.tokens)
        reason: FinishReason = "length"
        if stopped:
            reason = "tool_calls" if self.calls else "stop"
        return Completion(
            text="".join(self.text),
            reasoning="".join(self.reasoning),
            tool_calls=tuple(self.calls),
            tokens=tuple(self.tokens),
            finish_reason=reason,
            usage=Usage(len(self.prompt), count, self.reuse.cached, self.reuse.miss),
            timing=Timing(
                first_token_seconds=first - self.started,
                total_seconds=now - self.started,
                prefill_tokens_per_second=(len(self.prompt) - self.reuse.cached) / (first - self.started),
                decode_tokens_per_second=(count - 1) / (now - first) if count > 1 else 0.0,
                peak_memory_nbytes=mx.get_peak_memory(),
            ),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
        )


def _list(array: mx.array) -> list[Any]:
    values = array.tolist()
    assert isinstance(values, list)
    return values
