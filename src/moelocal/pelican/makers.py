"""What makes answers: a model of ours, or a server of another program on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

import moelocal
from moelocal import machine
from moelocal.bench.header import Identity, commit
from moelocal.bench.server import Server
from moelocal.engine.load import Model
from moelocal.pelican.answers import Answer, key, now, one_line, plain

SERVER_TOKENS: Final = 16_384
"""Of an answer of a server, which has to be told a number."""

Report = Callable[[int], None]
"""Called with the number of tokens so far."""


class Maker:
    """Who answers. The arguments are as in `Answer`; `name`: of the model."""

    def __init__(
        self, name: str, source: str, origin: str, settings: dict[str, Any], quantization: str = ""
    ) -> None:
        self.name, self.source, self.origin = one_line(name), source, origin
        self.settings, self.quantization = settings, quantization

    def answer(self, prompt: str, seed: int, report: Report) -> Answer:
        """Ask. Raises errors of ours."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the memory back that it took to answer."""

    def key(self, prompt: str, seed: int) -> str:
        """The key of the answer that it would give."""
        # the name too: the same weights under two names are two models on the page
        return key(self.source, f"{self.name}: {self.origin}", prompt, seed, self.settings)

    def said(self, prompt: str, seed: int, **what: Any) -> Answer:
        """An answer of this model: with `what` it said and took."""
        return Answer(
            key=self.key(prompt, seed),
            model=self.name,
            source=self.source,
            origin=self.origin,
            prompt=prompt,
            seed=seed,
            quantization=self.quantization,
            settings=self.settings,
            date=now(),
            **what,
        )


class Ours(Maker):
    """A model that runs here. It is loaded when it first has to answer: where all answers are there, it is not."""

    def __init__(
        self, folder: Path, name: str, dtype: str | None, settings: dict[str, Any], progress: bool
    ) -> None:
        weights = Identity.of(folder, name)
        origin = f"weights {weights.hash}" + (f", {dtype}" if dtype else "")
        super().__init__(name, "moelocal", origin, settings, weights.quantization)
        self.folder, self.dtype, self.progress = folder, dtype, progress

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
        return self.said(
            prompt,
            seed,
            text=done.text,
            reasoning=done.reasoning,
            finish_reason=done.finish_reason,
            tokens=done.usage.completion,
            seconds=round(done.timing.total_seconds, 3),
            tokens_per_second=round(done.timing.decode_tokens_per_second, 2) or None,
            machine=f"{machine.chip() or 'unknown chip'}, {program}",
        )

    def close(self) -> None:
        """As `Maker`."""
        self.__dict__.pop("_model", None)
        mx.clear_cache()


class Theirs(Maker):
    """A model of a server on this machine, which does not say its quantization and keeps its memory."""

    def __init__(self, server: Server, model: str, settings: dict[str, Any]) -> None:
        settings = {**settings, "max_tokens": settings["max_tokens"] or SERVER_TOKENS}
        origin = f"server {server.address}, model {one_line(model)}"
        super().__init__(model, "server", origin, settings)
        self.server, self.model = server, model  # the name as the server knows it

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
        timed = reply.counted and reply.completion_tokens > 1 and writing > 0
        return self.said(
            prompt,
            seed,
            text=plain(reply.text),
            reasoning=plain(reply.reasoning),
            finish_reason=one_line(reply.finish_reason),
            tokens=reply.completion_tokens if reply.counted else None,
            seconds=round(reply.seconds, 3),
            tokens_per_second=round((reply.completion_tokens - 1) / writing, 2) if timed else None,
            machine=machine.chip(),
        )
