"""What makes answers: a model of ours, or a server of another program on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

import mlx.core as mx

import moelocal
from moelocal import machine
from moelocal.bench.header import Identity, commit
from moelocal.bench.server import Server
from moelocal.engine.load import Model
from moelocal.errors import RequestError
from moelocal.pelican.answers import Answer, key, now, one_line, plain

SERVER_TOKENS: Final = 16_384
"""Of an answer of a server, which has to be told a number."""

Report = Callable[[int], None]
"""Called with the number of tokens so far."""


class Maker(Protocol):
    """`name`: of the model; `source`, `origin`, `quantization`, `settings`: as in `Answer`."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def origin(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def settings(self) -> dict[str, Any]: ...

    def answer(self, prompt: str, seed: int, report: Report) -> Answer:
        """Ask. Raises errors of ours."""

    def close(self) -> None:
        """Give the memory back that it took to answer."""


def key_of(maker: Maker, prompt: str, seed: int) -> str:
    """The key of the answer that it would give."""
    return key(maker.source, maker.origin, prompt, seed, maker.settings)


@dataclass
class Ours:
    """A model that runs here. It is loaded when it first has to answer: where all answers are there, it is not."""

    folder: Path
    name: str
    dtype: str | None
    settings: dict[str, Any]
    progress: bool
    source: str = field(default="moelocal", init=False)

    @cached_property
    def _identity(self) -> Identity:
        return Identity.of(self.folder, self.name)

    @property
    def quantization(self) -> str:
        """Bits per weight and the format of most."""
        return self._identity.quantization

    @property
    def origin(self) -> str:
        """The weights, and the dtype if one was asked for."""
        return f"weights {self._identity.hash}" + (f", {self.dtype}" if self.dtype else "")

    @cached_property
    def _model(self) -> Model:
        return moelocal.load(self.folder, quantization="none", dtype=self.dtype, progress=self.progress)

    def answer(self, prompt: str, seed: int, report: Report) -> Answer:
        """As `Maker`."""
        model, sampling = self._model, self._model.defaults
        if (temperature := self.settings["temperature"]) is not None:
            sampling = replace(sampling, temperature=temperature)
        done, tokens = None, 0
        for event in moelocal.stream(
            model,
            prompt,
            max_tokens=self.settings["max_tokens"],
            sampling=sampling,
            seed=seed,
            thinking=self.settings["thinking"],
        ):
            tokens += len(event.tokens)
            report(tokens)
            done = event.completion
        assert done is not None  # the last event of a stream has it
        package = Path(moelocal.__file__).parent
        program = f"moelocal {commit(package) or moelocal.__version__} on {mx.default_device().type.name}"
        return Answer(
            key=key_of(self, prompt, seed),
            model=self.name,
            source=self.source,
            origin=self.origin,
            quantization=self.quantization,
            prompt=prompt,
            seed=seed,
            settings=self.settings,
            text=done.text,
            reasoning=done.reasoning,
            finish_reason=done.finish_reason,
            tokens=done.usage.completion,
            seconds=round(done.timing.total_seconds, 3),
            tokens_per_second=round(done.timing.decode_tokens_per_second, 2) or None,
            machine=f"{machine.chip() or 'unknown chip'}, {program}",
            date=now(),
        )

    def close(self) -> None:
        """As `Maker`."""
        self.__dict__.pop("_model", None)
        mx.clear_cache()


@dataclass(frozen=True)
class Theirs:
    """A model of a server on this machine."""

    server: Server
    model: str
    settings: dict[str, Any]
    source: str = field(default="server", init=False)

    @classmethod
    def at(cls, named: str, settings: dict[str, Any]) -> Theirs:
        """ "ADDRESS" or "ADDRESS=MODEL". Raises `RequestError`."""
        address, _, model = named.partition("=")
        server = Server.at(address)
        served = server.models()
        if not model:
            model = server.only_model()
        elif model not in served:
            names = ", ".join(map(one_line, served)) or "none"
            raise RequestError(f"server {address}: serves no model {model}; it has {names}")
        settings = {**settings, "max_tokens": settings["max_tokens"] or SERVER_TOKENS}
        return cls(server, model, settings)

    @property
    def name(self) -> str:
        """As the server calls it."""
        return one_line(self.model)

    @property
    def origin(self) -> str:
        """The address and the model there."""
        return f"server {self.server.address}, model {one_line(self.model)}"

    @property
    def quantization(self) -> str:
        """A server does not say."""
        return ""

    def answer(self, prompt: str, seed: int, report: Report) -> Answer:
        """As `Maker`."""
        reply = self.server.chat(
            [{"role": "user", "content": prompt}],
            model=self.model,
            max_tokens=self.settings["max_tokens"],
            temperature=self.settings["temperature"],
            seed=seed,
            thinking=self.settings["thinking"],
        )
        writing = reply.last_token_seconds - reply.first_token_seconds
        counted = reply.counted and reply.completion_tokens > 1 and writing > 0
        return Answer(
            key=key_of(self, prompt, seed),
            model=self.name,
            source=self.source,
            origin=self.origin,
            quantization="",
            prompt=prompt,
            seed=seed,
            settings=self.settings,
            text=plain(reply.text),
            reasoning=plain(reply.reasoning),
            finish_reason=one_line(reply.finish_reason),
            tokens=reply.completion_tokens if reply.counted else None,
            seconds=round(reply.seconds, 3),
            tokens_per_second=round((reply.completion_tokens - 1) / writing, 2) if counted else None,
            machine=machine.chip(),
            date=now(),
        )

    def close(self) -> None:
        """As `Maker`: the server keeps its own."""
