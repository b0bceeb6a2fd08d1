"""The inside of a process in which one program is measured: `python -P worker.py moelocal|mlx-lm`.

A line of JSON on standard input is a request, lines of JSON on standard output answer it:

    {"do": "load", "folder": …, "dtype": … or null}  ->  {"seconds": …, "peak": bytes, …}
    {"do": "run", "text": …, "count": N}             ->  {"first": true}, when the first token is there
                                                     ->  {"tokens": […], "prompt": N, "first": s, "rest": s, …}

or {"error": …}. The end of standard input ends the process. It imports moelocal only to measure it: moelocal changes
the environment that MLX reads (`machine.limit_buffers`), and mlx-lm is measured as its users have it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

Tokens = Iterator[int]


class Ours:
    """moelocal through its public functions."""

    def __init__(self) -> None:
        import moelocal

        self._moelocal = moelocal
        self.version = moelocal.__version__

    def load(self, folder: str, dtype: str | None) -> None:
        from moelocal.engine.load import Model
        from moelocal.errors import TemplateError

        class Endless(Model):
            """A model whose answers do not stop: what is decoded has the length that was asked for."""

            stop_tokens = frozenset[int]()

        loaded = self._moelocal.load(folder, quantization="none", dtype=dtype, offline=True, progress=False)
        assert loaded.tokenizer  # read when first needed otherwise; mlx-lm reads them while it loads
        with suppress(TemplateError):
            assert loaded.template
        # a model of its own for each run: what one left behind would spare the next its prompt
        self._fresh: Callable[[], Model] = lambda: Endless(loaded.decoder, loaded.folder, loaded.name)

    def figures(self) -> dict[str, Any]:
        """What is known of the loaded weights."""
        from moelocal.bench.bytes import read_per_token
        from moelocal.engine.plan import weights_nbytes

        decoder = self._fresh().decoder
        return {
            "weights": weights_nbytes(decoder),
            "read": read_per_token(decoder),
            "dtype": str(decoder.dtype).removeprefix("mlx.core."),
        }

    def tokens(self, text: str, count: int, prompt: Callable[[int, int], None]) -> Tokens:
        greedy = self._moelocal.Sampling(temperature=0)
        for event in self._moelocal.stream(self._fresh(), text, raw=True, max_tokens=count, sampling=greedy):
            yield from event.tokens
            if event.completion:
                prompt(event.completion.usage.prompt, event.completion.usage.cached)


class MlxLm:
    """mlx-lm through its public functions."""

    def __init__(self) -> None:
        # by name: it is no dependency of this package
        self._mlx_lm = import_module("mlx_lm")
        self.version = version("mlx-lm")

    def load(self, folder: str, dtype: str | None) -> None:
        import mlx.core as mx

        self._model, self._tokenizer = self._mlx_lm.load(folder)
        if dtype is None and mx.default_device() == mx.Device(mx.cpu):
            dtype = (
                "float32"  # MLX's product of experts knows no other there; its user would have to do the same
            )
        if dtype is not None:
            self._model.set_dtype(getattr(mx, dtype))
            mx.eval(self._model.parameters())
        self._tokenizer.eos_token_ids = []  # what is decoded has the length that was asked for

    def figures(self) -> dict[str, Any]:
        return {}

    def tokens(self, text: str, count: int, prompt: Callable[[int, int], None]) -> Tokens:
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        for response in self._mlx_lm.stream_generate(self._model, self._tokenizer, ids, max_tokens=count):
            yield int(response.token)
        prompt(len(ids), 0)


SIDES: dict[str, Callable[[], Any]] = {"moelocal": Ours, "mlx-lm": MlxLm}


def main() -> None:
    # what libraries print must not come between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**told: Any) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    try:
        side = SIDES[sys.argv[1]]()
        import mlx.core as mx
    except Exception as error:
        answer(error=_words(error))
        return
    requests: SimpleQueue[str] = SimpleQueue()
    Thread(target=_listen, args=(requests,), daemon=True).start()
    while True:
        request = json.loads(requests.get())
        try:
            if request["do"] == "load":
                begin = time.perf_counter()
                side.load(request["folder"], request["dtype"])
                seconds = time.perf_counter() - begin
                answer(seconds=seconds, peak=mx.get_peak_memory(), version=side.version, **side.figures())
            else:
                answer(**_run(side, request["text"], request["count"], lambda: answer(first=True)))
        except Exception as error:
            answer(error=_words(error))


def _listen(requests: SimpleQueue[str]) -> None:
    """Hand on what is asked for. Where nobody can ask any more, nobody wants an answer: it ends at once, also in the
    midst of a run, if only because the process that started this one was killed."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def _run(side: Any, text: str, count: int, at_first: Callable[[], None]) -> dict[str, Any]:
    import mlx.core as mx

    usage: list[int] = []
    mx.reset_peak_memory()
    begin = time.perf_counter()
    tokens = side.tokens(text, count, lambda prompt, cached: usage.extend((prompt, cached)))
    found = [next(tokens)]
    first = time.perf_counter()
    at_first()
    after = last = time.perf_counter()
    for token in tokens:
        found.append(token)
        last = time.perf_counter()
    return {
        "tokens": found,
        "prompt": usage[0],
        "cached": usage[1],
        "first": first - begin,
        "rest": last - after,
        "peak": mx.get_peak_memory(),
        "resident": _resident(),
    }


def _resident() -> int:
    """The most bytes that this process had resident. Linux hands getrusage's figure on from the process that started
    this one."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _words(error: Exception) -> str:
    """What went wrong, in one line; of our errors the message alone says it."""
    own = any(kind.__name__ == "MoelocalError" for kind in type(error).__mro__)
    text = " ".join(str(error).split())[:400]
    return text if own and text else f"{type(error).__name__}: {text}".rstrip(": ")


if __name__ == "__main__":
    main()
