"""`load` and the `Model` that it gives: the network with the texts that belong to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Final
from weakref import WeakSet

import mlx.core as mx

from moelocal import machine
from moelocal.cache import Cache, Disk, Store
from moelocal.config import ModelConfig
from moelocal.engine.chunks import MESSAGE_START, boundaries, message_start
from moelocal.engine.fingerprint import Stamp, fingerprint, stamps
from moelocal.engine.plan import Plan, memory_limit, plan, weights_nbytes
from moelocal.engine.progress import late_bar
from moelocal.engine.reuse import common
from moelocal.engine.sampling import Sampling
from moelocal.engine.session import Session
from moelocal.errors import ContextOverflow, RequestError, TokenizerError
from moelocal.model import Decoder
from moelocal.text.generation_config import GenerationDefaults
from moelocal.text.template import ChatTemplate
from moelocal.text.tokenizer import Tokenizer
from moelocal.units import parse_size

DTYPES: Final = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
"""Of activations, by the names that people give."""

SHARE: Final = 10
"""Snapshots may take this part of the memory that a model may take, one in so many bytes, and at most half of what its
weights leave."""

RECENT: Final = 8
"""Timelines remembered, as tokens, to say where a prompt leaves them."""


class Model:
    """A loaded checkpoint. Calling it evaluates tokens; text files are read when a text call first needs them, so
    that a folder without a tokenizer works for tokens.

    `name`: what it was loaded as; `folder`: where its files are; `snapshots`: bytes that those of its timelines may
    take on disk.
    """

    def __init__(
        self,
        decoder: Decoder,
        folder: Path,
        name: str,
        snapshots: int = 0,
        files: Sequence[Stamp] | None = None,
    ) -> None:
        self.decoder, self.folder, self.name, self._on_disk = decoder, folder, name, snapshots
        self._files = files
        self._recent: deque[list[int]] = deque(maxlen=RECENT)
        self._sessions: WeakSet[Session] = WeakSet()

    @property
    def config(self) -> ModelConfig:
        """The model as its config.json describes it."""
        return self.decoder.config

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations."""
        return self.decoder.dtype

    @property
    def kv_bits(self) -> int | None:
        """Bits of the codes that keys and values are kept as; None if they are kept as they are."""
        return self.decoder.kv_bits

    def new_cache(self, padding: Sequence[int] | None = None) -> Cache:
        """An empty timeline; with `padding`, a batch whose rows start with that many padding tokens each."""
        return self.decoder.new_cache(padding)

    def __call__(self, tokens: mx.array, cache: Cache | None = None, rows: int | None = None) -> mx.array:
        """Evaluate tokens int [B, T] behind what `cache` holds -> logits float32 [B, T, V], or of the last `rows`.

        Raises `RequestError` for tokens of another shape or dtype.
        """
        return self.decoder(tokens, cache, rows)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises `TokenizerError` if the folder has none."""
        return Tokenizer.open(self.folder)

    @cached_property
    def template(self) -> ChatTemplate:
        """Raises `TemplateError` if the folder has none."""
        return ChatTemplate.open(self.folder)

    def session(self) -> Session:
        """A timeline that goes on from call to call, with `fork`, `rewind`, `save`."""
        session = Session(self)
        self._sessions.add(session)
        return session

    @cached_property
    def _weights(self) -> int:
        return weights_nbytes(self.decoder)

    def held(self, but: Session) -> int:
        """Bytes of all timelines of this model's sessions but one."""
        return sum(session.cache.nbytes for session in self._sessions if session is not but)

    def _plan(self, prompt_tokens: int, max_tokens: int, held: int) -> Plan:
        settings = (self.config, self._weights, self.dtype, prompt_tokens, max_tokens)
        return plan(*settings, kv_bits=self.kv_bits, held=held)

    def fit(self, prompt_tokens: int, max_tokens: int, asked: bool = True, held: int = 0) -> int:
        """How many tokens an answer to a prompt may have, at most `max_tokens`. If it is less for want of memory, and
        somebody `asked` for that number, a warning says so. `held`: bytes that other timelines hold. Snapshots are not
        counted: they give way (`make_room`). Raises `MemoryOverflow` if the prompt does not fit."""
        most = self._plan(prompt_tokens, max_tokens, held).check().max_tokens
        if asked and most < min(max_tokens, self.config.context - prompt_tokens):
            import logging  # here: every import of moelocal would pay for it

            logging.getLogger("moelocal").warning(
                "moelocal: max_tokens: memory leaves %d tokens for the answer, %d were asked for",
                most,
                max_tokens,
            )
        return most

    def make_room(self, session: Session, count: int, *, refuse: bool = True) -> None:
        """See to it that the timeline of a session fits into memory with `count` tokens: snapshots give way.

        Raises `ContextOverflow` for more than the context, `MemoryOverflow` (with `refuse`) where it cannot fit.
        """
        context = self.config.context
        if count > context:
            raise ContextOverflow(f"{count} tokens, the context of {self.name} has {context}; shorten them")
        made = self._plan(min(count, context - 1), 1, self.held(session))
        if refuse:
            made.check()
        if made.limit is not None:
            self.store.give_way(made.limit - made.nbytes)

    @cached_property
    def fingerprint(self) -> str:
        """What states on disk depend on; the first time it may read all weight files. Raises `CheckpointError`."""
        return fingerprint(self.folder, self.dtype, self.config, self.kv_bits, self._files)

    @cached_property
    def store(self) -> Store:
        """The snapshots that all timelines of this model share."""
        # in memory there are only states of the weights that this process has loaded
        print_of = self.fingerprint if self._on_disk else "memory"
        disk = Disk(machine.cache_folder() / "snapshots", print_of, self._on_disk) if self._on_disk else None
        limit = memory_limit()
        budget = 1 << 30 if limit is None else min(limit // SHARE, (limit - self._weights) // 2)
        return Store(print_of, max(budget, 0), disk)

    @cached_property
    def message_start(self) -> int | None:
        """The token with which a message begins; None without a tokenizer, or where it has no such token."""
        return None if self.texts is None else message_start(self.texts)

    @cached_property
    def texts(self) -> Tokenizer | None:
        """The tokenizer; None if the folder has none that can be read."""
        try:
            return self.tokenizer
        except TokenizerError:
            return None

    def behind_question(self, tokens: Sequence[int]) -> int | None:
        """Where the last message of the user ends, results of tools apart; None where it cannot be told. What follows
        a template may render otherwise when the user has spoken again."""
        ends = boundaries(tokens, self.message_start)
        for first, last in reversed(list(pairwise([0, *ends]))):
            begin = (
                ""
                if self.texts is None
                else self.texts.decode(tokens[first : first + 12], skip_special=False)
            )
            question = f"{MESSAGE_START}user"
            if begin.startswith(question) and not begin[len(question) :].lstrip().startswith(
                "<tool_response>"
            ):
                return last
        return None

    def remember(self, tokens: Sequence[int]) -> None:
        """Note a timeline, to say later where another one left it."""
        self._recent.append(list(tokens))

    def recent(self, tokens: Sequence[int]) -> list[int]:
        """Of the last timelines the one that `tokens` go on from or change: of those with which they share a message
        besides the system's and the last, or all up to the last, the one with most in common. Empty if there is none:
        another conversation, which reuses what it can and misses nothing."""
        now = self._messages(tokens)
        related = [
            timeline
            for timeline in reversed(self._recent)
            if not set(now[:-1]).isdisjoint(self._messages(timeline))
            or common(timeline, tokens) >= min(len(timeline), len(tokens) - 1)
        ]
        return max(related, key=lambda timeline: common(timeline, tokens), default=[])

    def _messages(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """The tokens of each message but the system's."""
        ends = [0, *boundaries(tokens, self.message_start), len(tokens)]
        messages = [tuple(tokens[a:b]) for a, b in pairwise(ends)]
        system = () if self.texts is None else tuple(self.texts.encode(f"{MESSAGE_START}system"))
        return messages[1:] if system and messages[0][: len(system)] == system else messages

    @cached_property
    def _generation(self) -> GenerationDefaults:
        return GenerationDefaults.open(self.folder, self.config.eos)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The ids that end an answer, from generation_config.json and config.json. Raises `ConfigError`."""
        return self._generation.stop_tokens

    @property
    def defaults(self) -> Sampling:
        """The sampling that the checkpoint's generation_config.json asks for. Raises `ConfigError`."""
        return Sampling.from_defaults(self._generation.sampling)


def load(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    quantization: str = "auto",
    dtype: str | mx.Dtype | None = None,
    context: int | None = None,
    kv_bits: int | None = None,
    snapshots: str = "0",
    offline: bool = False,
    progress: bool = True,
) -> Model:
    """Load a model: a folder, a Hugging Face name, or (None) the small embedded demonstration model.

    `revision`: branch, tag or commit of a Hugging Face repository. `quantization`: "none" runs the weights as they are;
    a recipe (a name, or a file: docs/formats.md) quantizes original weights once and keeps the result in the cache of
    moelocal; "auto" does so with "balanced" or "small" for weights that do not fit this machine's memory. `dtype` of
    activations: "float32", "float16", "bfloat16" or an MLX dtype; None takes the checkpoint's own, or float32 on the
    CPU device. `context`: tokens that a conversation may have; more than the model was trained with, up to four times
    as many, by YaRN, which also makes answers to short prompts a little worse (docs/long-context.md). `kv_bits`: 8 or 4
    keeps keys and values in so many bits, which takes less memory and changes answers a little (`moelocal evaluate
    --kv-bits` says how much); None keeps them as they are. `snapshots`: a size like "20GB" that states of conversations
    may take on disk, so that they go on at once after a restart too (they hold what was said: docs/sessions.md); "0"
    keeps them in memory alone. `offline`: open no connection. `progress`: say on standard error what takes long, on a
    terminal with a bar.

    Raises `ModelNotFound`, `ConfigError`, `UnsupportedModel`, `CheckpointError`; `RequestError` for a bad `dtype`,
    `context` or `kv_bits`, and for weights that do not fit in any way.
    """
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and (not isinstance(wanted, mx.Dtype) or wanted not in DTYPES.values()):
        raise RequestError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    # imported here: every import of moelocal would pay for it
    from moelocal.quantize.once import prepared

    on_disk = 0 if snapshots == "0" else parse_size(snapshots, "snapshots")

    folder = prepared(model, quantization, revision=revision, offline=offline, progress=progress)
    layers = len(ModelConfig.read(folder).layers)  # its errors first
    files = stamps(folder)  # before the weights are read, to see later whether they are still those
    with late_bar("loading the weights", layers, progress) as advance:
        decoder = Decoder.open(folder, wanted, lambda *_: advance(1), context=context, kv_bits=kv_bits)
    return Model(decoder, folder, "embedded" if model is None else str(model), on_disk, files)
