"""`Session`: one timeline of a model, which evaluates again only what it must."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeGuard

import mlx.core as mx

from moelocal.cache import Cache, Mark, saved
from moelocal.cache.cache import Chunks
from moelocal.cache.layers import STEP
from moelocal.cache.snapshot import check
from moelocal.engine.chunks import STRIDE, boundaries, cuts, is_cut
from moelocal.engine.reuse import Miss, explain, foreign
from moelocal.errors import RequestError

if TYPE_CHECKING:
    from moelocal.engine.load import Model

LAST_BOUNDARIES: Final = 4
"""Snapshots are taken where the first message ends, where the user's last one does, and at this many of the last
boundaries: behind them a conversation goes on, is edited, or is answered again."""

SPARSE: Final = 8 * STRIDE
"""Snapshots are also taken at multiples of this, for a conversation that changes far from both ends."""

Source = Literal["live", "memory", "disk", "nothing"]


@dataclass(frozen=True, slots=True)
class Reuse:
    """What `sync` did: `cached` of `tokens` were not evaluated again, thanks to `source`; `miss` says why not more."""

    tokens: int
    cached: int
    source: Source
    miss: Miss | None


class Session:
    """One timeline: the tokens that were evaluated, and the state behind them.

    `tokens`: what was evaluated. What else was ever evaluated is looked for in the snapshots of the model, which all
    its sessions share. Not safe for threads: one call at a time for all sessions of a model, and while an answer is
    streamed, none for its session.

    An interruption (Ctrl-C) may come anywhere. Whatever it leaves is told by the cache, which knows whether its layers
    stand together and where; a timeline that does not fit its tokens is given up, and read again from snapshots.

    A prompt that ends inside a chunk of a longer one was evaluated in another chunk than the longer one is. To give
    that one the same bits as a cold run, it goes on from a mark where the chunk began. Behind a decoded token the bits
    are others in any case, and it goes on from the last one.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tokens: list[int] = []
        self._cache = model.new_cache()
        self._logits: mx.array | None = None
        self._mark: Mark | None = None  # where the last chunk began; None behind a decoded token
        self._fed: list[mx.array] = []
        self._answering = False

    @property
    def position(self) -> int:
        """Tokens evaluated."""
        return len(self.tokens)

    def sync(self, tokens: Sequence[int]) -> Reuse:
        """Make `tokens` the timeline: go on from the longest stored beginning, evaluate the rest in chunks. Snapshots
        give way where memory needs it.

        Raises `RequestError` for what are no tokens of the model, `ContextOverflow` or `MemoryOverflow` for too many of
        them. An interruption leaves an empty timeline; what was stored stays.
        """
        self._settled()
        tokens = _checked(tokens, self.model.config.vocab)
        self.model.make_room(self, len(tokens))
        model, before = self.model, self.tokens or self.model.recent(tokens)
        with self._whole():
            cached, source = self._begin(tokens)

        def evicted(shared: int) -> bool:
            kept = self._kept(tokens) | {len(before)}
            return any(model.store.fate(tokens[:p]) == "evicted" for p in kept if cached < p <= shared)

        if before:
            miss = explain(before, tokens, cached, evicted, model.texts, model.message_start)
        else:  # the first of its conversation in this process
            elsewhere = model.store.elsewhere(tokens[:-1])
            miss = foreign(tokens, cached, model.texts) if elsewhere > cached else None
        with self._whole():
            self._evaluate(tokens)
        model.remember(self.tokens)
        return Reuse(len(tokens), cached, source, miss)

    def _begin(self, tokens: list[int]) -> tuple[int, Source]:
        """Go back to the longest beginning that leaves something to evaluate, or to know the logits by."""
        live, store = self._live(tokens), self.model.store

        def fits(chunks: Chunks) -> bool:
            return self._fits(tokens, chunks)

        found = store.find(tokens[:-1], fits)
        while found is not None and found.position > live:
            self._reset()  # first: the old timeline and the new one need not be in memory together
            live = 0
            restored = store.restore(found)
            if restored is not None:
                check(tokens[: found.position], restored)
                self._cache, self.tokens = restored, tokens[: found.position]
                return found.position, found.where
            found = store.find(tokens[: found.position - 1], fits)
        if not live:
            self._reset()
            return 0, "nothing"
        if live < len(self.tokens):
            assert self._mark is not None
            self._cache.rewind(self._mark)
            self.tokens, self._logits = tokens[:live], None
        return live, "live"

    def _live(self, tokens: list[int]) -> int:
        """How much of the timeline to go on from: all of it, or what is before its last chunk, or nothing."""
        position = len(self.tokens)
        if self.tokens == tokens[:position]:
            if position == len(tokens) and self._logits is not None:
                return position
            whole = self._mark is None or is_cut(tokens, position, self.model.message_start)
            if position < len(tokens) and whole:
                return position
        begin, start = 0 if self._mark is None else self._mark.position, self.model.message_start
        if begin >= len(tokens) or self.tokens[:begin] != tokens[:begin]:
            return 0
        # where a chunk of the one ended, one of the other has to; or that place is behind a decoded token
        return begin if is_cut(tokens, begin, start) or not is_cut(self.tokens, begin, start) else 0

    def _fits(self, tokens: Sequence[int], chunks: Chunks) -> bool:
        """Whether a chunk of `tokens` ends where `chunks` do, or that is behind a decoded token."""
        position, start = sum(number * size for number, size in chunks), self.model.message_start
        decoded = chunks[-1][1] == 1 and not is_cut(tokens, position - 1, start)
        return decoded or is_cut(tokens, position, start)

    def _evaluate(self, tokens: list[int]) -> None:
        start = self.model.message_start
        kept = self._kept(tokens)
        for stop in cuts(tokens, start):
            if stop <= len(self.tokens):
                continue
            self._mark = self._cache.mark()
            part = mx.array([tokens[len(self.tokens) : stop]])
            self._logits = self.model(part, self._cache, rows=1)[0, -1]
            # evaluated chunk by chunk: the working memory of one chunk is enough for any prompt
            mx.eval(self._cache.arrays)
            self.tokens = tokens[:stop]
            if stop in kept:
                self.keep()

    def _kept(self, tokens: Sequence[int]) -> set[int]:
        """Where snapshots are taken of a prompt."""
        ends = boundaries(tokens, self.model.message_start)
        kept = {*ends[:1], *ends[-LAST_BOUNDARIES:], *range(SPARSE, len(tokens), SPARSE)}
        question = self.model.behind_question(tokens)
        if question is not None:  # behind many steps with tools it is none of the last
            kept.add(question)
        last = (len(tokens) - 1) // STRIDE * STRIDE
        if last > max(ends, default=0):  # a text without messages, or a long one at the end
            kept.add(last)
        return kept

    @property
    def cache(self) -> Cache:
        """The state behind the tokens."""
        return self._cache

    @property
    def logits(self) -> mx.array:
        """float32 [V] behind the last token. Raises `RequestError` before the first."""
        if self._logits is None:
            raise RequestError("logits: nothing was evaluated yet; call sync first")
        return self._logits

    def feed(self, token: mx.array) -> mx.array:
        """Queue one sampled token, int [] -> logits float32 [V] behind it. What was fed is noted by `settle`."""
        if self._cache.position % STEP == 0:  # keys and values are about to take more memory
            self.model.make_room(self, self._cache.position + STEP, refuse=False)
        self._logits = None  # until there are those behind the token
        self._fed.append(token)
        self._logits = self.model(token.reshape(1, 1), self._cache, rows=1)[0, -1]
        return self._logits

    def settle(self) -> None:
        """Note the tokens that were fed since the last `sync`, and keep what they led to."""
        pending, self._fed = self._fed, []
        # of an interrupted step the token may be there and its evaluation not
        count = self._cache.position - len(self.tokens)
        self.fed([index(token.item()) for token in pending[: max(count, 0)]])  # type: ignore[arg-type]  # int32

    def fed(self, tokens: Sequence[int]) -> None:
        """Note tokens that were evaluated in the cache of this session, and keep what they led to."""
        cache = self._cache
        if cache.torn or cache.position != len(self.tokens) + len(tokens) or min(tokens, default=0) < 0:
            self._reset()  # interrupted, or behind logits that were NaN: no state to keep
        elif tokens:
            with self._whole():
                self.tokens = [*self.tokens, *tokens]
                self._mark = None
                self.keep()
            self.model.remember(self.tokens)

    @contextmanager
    def answering(self) -> Generator[None, None, None]:
        """While an answer is decoded, which `settle` ends."""
        self._answering = True
        try:
            yield
        finally:
            self._answering = False
            self.settle()

    def _settled(self) -> None:
        """Raises `RequestError` while an answer is streamed; gives up what does not fit together."""
        if self._answering:
            raise RequestError(
                "session: an answer is still being streamed; read it to its end, close() the stream, or fork() before"
            )
        self.settle()

    def keep(self) -> None:
        """Store a snapshot of the timeline, which ends where a message does, or in a decoded token."""
        self.model.store.put(self.tokens, self._cache)

    def fork(self) -> Session:
        """Another session with the same timeline; each goes on alone. Arrays are shared until one of them writes.

        Raises `RequestError` while an answer is streamed.
        """
        self._settled()
        other = self.model.session()
        other.tokens, other._cache, other._logits = list(self.tokens), self._cache.fork(), self._logits
        other._mark = self._mark
        return other

    def rewind(self, position: int | None = None, *, turn: int | None = None) -> Reuse:
        """Go back to `position` tokens, or to where message number `turn` begins: 0 is the first (often the system
        message), -1 the last. What lies between a snapshot and there is evaluated again.

        Raises `RequestError` for a position or turn that the timeline does not have, and while an answer is streamed.
        """
        self._settled()
        if (position is None) == (turn is None):
            raise RequestError("rewind: expected a position or a turn")
        if turn is not None:
            starts = [0, *boundaries(self.tokens, self.model.message_start)]
            if not _is_integer(turn) or not -len(starts) <= turn < len(starts):
                raise RequestError(f"rewind: turn: expected one of {len(starts)} messages, got {turn!r}")
            position = starts[turn]
        if not _is_integer(position) or not 0 <= position <= len(self.tokens):
            raise RequestError(f"rewind: position: expected 0 to {len(self.tokens)}, got {position!r}")
        if position == 0:
            self._reset()
            return Reuse(0, 0, "nothing", None)
        return self.sync(self.tokens[:position])

    def save(self, path: str | Path) -> None:
        """Write the timeline and its state into one file, whole or not at all.

        What is loaded goes on from its end, also inside a chunk: last bits may then differ from those of a cold run.

        Raises `RequestError` if there is nothing to save, the file cannot be written, or an answer is being streamed;
        `CheckpointError` if the weights changed since they were loaded.
        """
        self._settled()
        saved.save(Path(path), self.model.fingerprint, self.tokens, self._cache, self.logits)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> Session:
        """The session that `save` wrote.

        Raises `RequestError` if the file cannot be read, is damaged, or is of another model or setting;
        `CheckpointError` if the weights changed since they were loaded.
        """
        session = model.session()
        session.tokens, session._cache, session._logits = saved.load(Path(path), model.fingerprint)
        return session

    @contextmanager
    def _whole(self) -> Generator[None, None, None]:
        """An interruption may leave layers at different positions: the timeline is then given up."""
        try:
            yield
        except BaseException:
            self._reset()
            raise

    def _reset(self) -> None:
        self._cache, self._logits, self._mark = self.model.new_cache(), None, None
        self.tokens, self._fed = [], []


def _is_integer(number: object) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool)


def _checked(tokens: Sequence[int], vocab: int) -> list[int]:
    """Tokens as a list. Raises `RequestError` unless they are at least one row of the vocabulary."""
    try:
        found = list(map(index, tokens))
    except TypeError:
        raise RequestError(f"tokens: expected integers, got {tokens!r:.60}") from None
    if not found:
        raise RequestError("tokens: expected at least one, got none")
    if not 0 <= min(found) <= max(found) < vocab:
        wrong = next(token for token in found if not 0 <= token < vocab)
        raise RequestError(f"tokens: expected 0 to {vocab - 1}, got {wrong}")
    return found
