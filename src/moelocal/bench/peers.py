"""The programs that are measured: each in a process of its own, or a server that is there already."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import IO, Any, Final, Protocol

import moelocal
from moelocal import machine
from moelocal.bench.energy import Meter
from moelocal.bench.server import Server, printable
from moelocal.errors import RequestError

OURS: Final = "moelocal"
MLX_LM: Final = "mlx-lm"

_WORKER: Final = Path(__file__).parent / "worker.py"
_GOODBYE_SECONDS: Final = 10.0
_LEAST_READ: Final = 0.7
"""Of our count of a prompt's tokens; other tokenizers count differently, but not by so much."""


class SideFailed(RequestError):
    """A program that is measured ended, or could not do what it was asked for. The others go on."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What all sides read: `text` as the model sees it; `messages` of which the chat template makes that text, empty
    where no server takes part."""

    text: str
    messages: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A program that is ready. `load_seconds` and `peak_nbytes` (of MLX, while it loaded): None for a server. Of ours
    also `weights_nbytes` in memory, `read_per_token` of them, and the `dtype` of activations."""

    version: str
    load_seconds: float | None = None
    peak_nbytes: int | None = None
    weights_nbytes: int = 0
    read_per_token: int = 0
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run: a prompt read, then tokens decoded greedily.

    `tokens`: their ids; of a server those that our tokenizer cuts its text into. `decoded`: how many there were, and
    `counted` whether that (and `prompt_tokens`) was counted or estimated with our tokenizer. `first_seconds`: from the
    text to the first token; `rest_seconds`: from there to the last. `peak_nbytes`: of MLX in this run;
    `resident_nbytes`: the most that the process had since it began, while it has read no longer prompt; joules of the
    machine: None where nobody tells.
    `cached`: tokens of the prompt that were not read again. `ended`: a server ended the answer by itself.
    """

    prompt_tokens: int
    tokens: tuple[int, ...]
    decoded: int
    first_seconds: float
    rest_seconds: float
    peak_nbytes: int | None = None
    resident_nbytes: int | None = None
    prefill_joules: float | None = None
    decode_joules: float | None = None
    counted: bool = True
    cached: int = 0
    ended: bool = False

    @property
    def decode(self) -> float | None:
        """Tokens after the first per second; None if there was no second one."""
        return (self.decoded - 1) / self.rest_seconds if self.decoded > 1 and self.rest_seconds > 0 else None

    @property
    def prefill(self) -> float:
        """Tokens of the prompt that were read, per second until the first token."""
        return (self.prompt_tokens - self.cached) / self.first_seconds


class Side(Protocol):
    """A program that is measured."""

    name: str

    def start(self) -> Loaded:
        """Load the model. Raises `SideFailed`."""

    def run(self, prompt: Prompt, count: int) -> Sample:
        """Read a prompt and decode `count` tokens. Raises `SideFailed`."""

    def stop(self) -> None:
        """End it, loaded or not."""


class Process:
    """moelocal or mlx-lm with a checkpoint, in an interpreter of its own: its memory is its own, and what it leaves
    behind is gone with it. Ctrl-C reaches this process, not that one."""

    def __init__(self, name: str, folder: Path, dtype: str | None, meter: Meter) -> None:
        self.name, self._folder, self._dtype, self._meter = name, folder, dtype, meter
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def start(self) -> Loaded:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `stop`
        # by its path, and without the folder that it lies in among those of modules
        command = [sys.executable, "-P", str(_WORKER), self.name]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(self.name),
            start_new_session=True,
        )
        self._send(do="load", folder=str(self._folder), dtype=self._dtype)
        told = self._answer()
        return Loaded(
            version=told["version"],
            load_seconds=told["seconds"],
            peak_nbytes=told["peak"],
            weights_nbytes=told.get("weights", 0),
            read_per_token=told.get("read", 0),
            dtype=told.get("dtype", ""),
        )

    def run(self, prompt: Prompt, count: int) -> Sample:
        mark = self._meter.begin()
        self._send(do="run", text=prompt.text, count=count)
        self._answer()  # the first token
        prefill = self._meter.joules(mark)
        mark = self._meter.begin()
        told = self._answer()
        return Sample(
            prompt_tokens=told["prompt"],
            tokens=tuple(told["tokens"]),
            decoded=len(told["tokens"]),
            first_seconds=told["first"],
            rest_seconds=told["rest"],
            peak_nbytes=told["peak"],
            resident_nbytes=told["resident"],
            prefill_joules=prefill,
            decode_joules=self._meter.joules(mark),
            cached=told["cached"],
        )

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin and process.stdout
            with suppress(BrokenPipeError):
                process.stdin.close()  # it ends when it has nothing more to read
            try:
                process.wait(_GOODBYE_SECONDS if process.poll() is None else 0)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()
                process.wait()
            process.stdout.close()
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _send(self, **request: Any) -> None:
        assert self._process and self._process.stdin
        with suppress(BrokenPipeError):  # if it ended, its last words are read next
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process and self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SideFailed(f"{self.name}: its process {self._end()}")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise SideFailed(f"{self.name}: {told['error']}")
        return told

    def _end(self) -> str:
        """How it ended, and its last line of errors."""
        assert self._process and self._errors
        status = self._process.wait()
        if status == -9:
            return "was ended by the system, as happens where memory is short"
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return f"ended with status {status}" + (f": {said[-1][:300]}" if said else "")


def environment(name: str) -> dict[str, str]:
    """The environment of a process. mlx-lm gets MLX's own limits of command buffers, not those that moelocal set when
    it was imported here; and the moelocal that is measured is this one."""
    found = dict(os.environ)
    if name == OURS:
        place = str(Path(moelocal.__file__).parents[1])
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (place, found.get("PYTHONPATH"))))
        return found
    ours = machine.buffer_limits(machine.chip())
    return {key: value for key, value in found.items() if ours.get(key) != value}


class Served:
    """A model on a server of another program. It was loaded by that program, and stays loaded."""

    def __init__(
        self,
        server: Server,
        model: str,
        encode: Callable[[str], Sequence[int]],
        meter: Meter,
    ) -> None:
        self.name = printable(f"{model} at {server.address}")
        self._server, self._model, self._encode, self._meter = server, model, encode, meter

    def start(self) -> Loaded:
        return Loaded(version=self._model)

    def run(self, prompt: Prompt, count: int) -> Sample:
        mark = self._meter.begin()
        try:
            reply = self._server.chat(prompt.messages, model=self._model, max_tokens=count, temperature=0.0)
        except RequestError as error:
            raise SideFailed(str(error)) from None
        self._meter.joules(mark)  # of prompt and answer together: of no use
        if not (reply.reasoning or reply.text):
            raise SideFailed(f"{self.name}: it gave no text")
        tokens = tuple(self._encode(plain(reply.reasoning + reply.text)))
        ours = len(self._encode(prompt.text))
        prompt_tokens = reply.prompt_tokens or ours
        if prompt_tokens < _LEAST_READ * ours:
            raise SideFailed(
                f"{self.name}: it read {prompt_tokens:,} tokens of a prompt that has about {ours:,} and left out the "
                "rest; give it a larger context there"
            )
        return Sample(
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            decoded=reply.completion_tokens if reply.counted else len(tokens),
            first_seconds=reply.first_token_seconds,
            rest_seconds=reply.last_token_seconds - reply.first_token_seconds,
            counted=reply.counted and bool(reply.prompt_tokens),
            cached=min(reply.cached_tokens or 0, prompt_tokens - 1),
            ended=reply.finish_reason == "stop",
        )

    def stop(self) -> None:
        pass


def plain(text: str) -> str:
    """An answer without the marks of thinking, which servers take out, and without the white space around them."""
    return " ".join(re.sub(r"</?think>", " ", text).split())


def require_mlx_lm() -> None:
    """Raises `RequestError` with the one command that installs it."""
    if importlib.util.find_spec("mlx_lm") is None:
        raise RequestError(
            f"--against mlx-lm: it is not installed here: {sys.executable} -m pip install '{_pinned()}'"
        )


def _pinned() -> str:
    """mlx-lm as our extra `compare` pins it."""
    try:
        wanted = [line for line in requires("moelocal") or [] if line.startswith(MLX_LM)]
    except PackageNotFoundError:
        wanted = []
    return wanted[0].split(";")[0].strip() if wanted else MLX_LM
