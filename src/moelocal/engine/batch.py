"""Several prompts at once: each is read alone, then all answers grow together, a token each per step.

Guaranteed on every device: a prompt is read in a cache of its own, in the chunks that it is read in alone; every row
attends over its own keys and values in the functions that run for it alone, samples from its own seed and counts, and
stops by its own rules. What rows share is the product with a weight, of as many rows as the batch has at that step.

So an answer equals the answer alone where a row of a product does not depend on how many there are. On MLX's CPU
device on Linux it does not, bit for bit, below 32 rows (from there on NumPy computes; this file never goes so far):
tests/engine/test_batch.py holds all families to it, and our kernels, which take up to 8 rows, in their simulator. Not
measured, for want of the hardware: MLX's CPU device on macOS, which multiplies with Accelerate, and MLX's own products
on Metal, which it chooses by the number of rows (for packed weights, on some chips, `qmv` for one and `qmv_wide` for
several; for dense ones `gemv` and others), as a record of `moelocal doctor --tune` does too. Sums may then round
differently, so that greedy answers may part where two tokens are equally likely up to rounding. `rows=1` answers the
prompts one after the other, each as if it were alone, on every device; `moelocal verify` shows what holds on a machine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields
from typing import Final

import mlx.core as mx

from moelocal.cache import Cache
from moelocal.cache.ragged import Rows
from moelocal.engine.completion import Completion, Event
from moelocal.engine.generate import Request, _Answer, _prepared, _Step
from moelocal.engine.load import Model
from moelocal.engine.plan import batch_nbytes, memory_limit
from moelocal.engine.sampling import Sampler, log_probabilities
from moelocal.engine.session import Session
from moelocal.errors import BatchError, MoelocalError, NumericsError, RequestError
from moelocal.ops.host import MANY_ROWS

MOST_ROWS: Final = 8
"""Answers that grow at once unless `rows` says otherwise: the most that our kernels take."""


def generate_batch(model: Model, requests: Sequence[Request], *, rows: int = MOST_ROWS) -> list[Completion]:
    """The whole answers, in the order of the requests. Arguments and errors as of `stream_batch`, but a `BatchError`
    carries the completions of the others."""
    completions: list[Completion | None] = [None] * len(requests)
    try:
        for index, event in stream_batch(model, requests, rows=rows):
            completions[index] = event.completion
    except BatchError as error:
        error.completions = completions
        raise
    return [completion for completion in completions if completion is not None]


def stream_batch(
    model: Model, requests: Sequence[Request], *, rows: int = MOST_ROWS
) -> Generator[tuple[int, Event], None, None]:
    """The answers piece by piece, each event with the number of its request, from 0; closing the iterator stops all.

    `rows`: answers that grow at once, fewer where memory does not hold so many (each is counted with the longest
    answer that it may have); the next prompt is read when one of them has ended. Every answer is what
    `stream` gives for its prompt and settings, with a seed the same draws (where that holds: above). Times count from
    this call, and peak memory is that of the batch.

    Everything is checked here, before the first event is asked for, and the error says which prompt it is about: those
    of `stream`, `MemoryOverflow`; `RequestError` for `rows` and an empty list. What goes wrong with one row later, as
    NaN logits do, ends that row, and `BatchError` is raised after all others are done.
    """
    started = time.perf_counter()
    if not isinstance(rows, int) or isinstance(rows, bool) or not 0 < rows < MANY_ROWS:
        raise RequestError(f"rows: expected an integer from 1 to {MANY_ROWS - 1}, got {rows!r}")
    if not requests:
        raise RequestError("requests: expected at least one prompt, got none")
    waiting = []
    for index, request in enumerate(requests):
        try:
            waiting.append(_row(model, index, request, started))
        except MoelocalError as error:
            raise type(error)(f"prompt {index}: {error}") from None
    return _events(model, waiting, rows)


def _row(model: Model, index: int, request: Request, started: float) -> _Row:
    """A request, checked."""
    settings = {each.name: getattr(request, each.name) for each in fields(request)}
    answer, sampler, most, mask = _prepared(model, started=started, **settings)
    return _Row(
        index=index,
        session=model.session(),
        answer=answer,
        sampler=sampler,
        most=most,
        logprobs=request.logprobs,
        mask=mask,
    )


@dataclass(slots=True, eq=False)
class _Row:
    """One answer that grows, of at most `most` tokens. `step` is queued and not read yet, number `queued` of its steps;
    `first` is when the first was read."""

    index: int
    session: Session
    answer: _Answer
    sampler: Sampler
    most: int
    logprobs: int | None
    mask: mx.array
    step: _Step = field(init=False)
    queued: int = 0
    first: float = 0.0

    def read(self) -> None:
        """The prompt, alone."""
        self.answer.reuse = self.session.sync(self.answer.prompt)
        self.choose(self.session.logits)
        mx.async_eval(*self.step.arrays)  # type: ignore[no-untyped-call]  # MLX has no annotation for it

    @property
    def cache(self) -> Cache:
        """Where its tokens were evaluated."""
        return self.session.cache

    def choose(self, logits: mx.array) -> None:
        """The next step from logits float32 [V], not evaluated."""
        token = self.sampler(logits)
        extra = None
        if self.logprobs is not None:
            extra = log_probabilities(logits, token, self.logprobs, token_mask=self.mask)
        self.step = _Step(token, extra)
        self.queued += 1

    def take(self, step: _Step) -> tuple[Event, bool]:
        """Wait for a step -> its event, and whether the answer stops with it. Raises `NumericsError`."""
        answer = self.answer
        token = answer._take(step)
        if len(answer.tokens) == 1:
            self.first = time.perf_counter()
        if token in answer.stop_tokens:
            return Event(tokens=(token,)), True
        delta = answer._add(answer.detokenizer.add(token))
        return Event(delta.text, delta.reasoning, delta.tool_calls, (token,)), delta.stopped

    def finish(self, stopped: bool) -> Event:
        """The last event. What was fed is kept, as after an answer alone."""
        self.session.fed(self.answer.tokens[: self.queued - 1])
        delta = self.answer._finish()
        completion = self.answer._completion(stopped, self.first)
        return Event(delta.text, delta.reasoning, delta.tool_calls, (), completion)


def _events(model: Model, rows: Sequence[_Row], most: int) -> Generator[tuple[int, Event], None, None]:
    mx.reset_peak_memory()
    errors: dict[int, MoelocalError] = {}
    waiting, active, batch = deque(rows), list[_Row](), Rows()
    full = most
    while waiting or active:
        while waiting and len(active) < full:
            if not _fits(model, [*active, waiting[0]]):
                full = len(active)  # until one of them has ended
                break
            row, full = waiting.popleft(), most
            try:
                row.read()
            except MoelocalError as error:
                errors[row.index] = error
                continue
            batch.join(row.cache)
            active.append(row)
        steps = [(row, row.step) for row in active]
        for row in [row for row in active if row.queued == row.most]:
            active.remove(row)
            batch.leave(row.cache)
        _queue(model, active, batch)
        for row, step in steps:
            try:
                event, stopped = row.take(step)
            except NumericsError as error:
                errors[row.index], stopped = error, True
            else:
                yield row.index, event
            if stopped and row in active:  # its next step is queued already, and thrown away
                active.remove(row)
                batch.leave(row.cache)
            if row.index not in errors and row not in active:
                yield row.index, row.finish(stopped)
    if errors:
        raise BatchError(len(rows), errors)


def _fits(model: Model, rows: Sequence[_Row]) -> bool:
    """Whether memory holds these rows at once; a single one was checked."""
    limit = memory_limit()
    if limit is None or len(rows) == 1:
        return True
    sizes = [(len(row.answer.prompt), len(row.answer.prompt) + row.most) for row in rows]
    return batch_nbytes(model.decoder, sizes) <= limit


def _queue(model: Model, rows: Sequence[_Row], batch: Rows) -> None:
    """The next step of all, together."""
    if rows:
        tokens = mx.stack([row.step.token for row in rows])
        logits = model.decoder.step_rows(tokens.reshape(-1, 1), batch)
        for index, row in enumerate(rows):
            row.choose(logits[index, 0])
        mx.async_eval(*(array for row in rows for array in row.step.arrays))  # type: ignore[no-untyped-call]
