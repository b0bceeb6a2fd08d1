"""One program on one checkpoint, in a process of its own, that measures what it is told to: moelocal or mlx-lm.

    python benchmarks/sides.py moelocal|mlx-lm FOLDER       # benchmarks/scale.py starts it; by hand, type such lines

The parent writes a line of JSON per run on standard input, `{"prompt": N, "decode": M, "seed": S}`, and reads a line of
JSON back. Both programs read the same N random tokens on an empty cache and then decode as their own loops do: the step
for the next token is queued before the last one is read, and the next token depends on the logits. Which token that is,
however, was drawn beforehand, the same for both: what a random model would say soon repeats itself, and a repetition
asks the same few experts over and over. The tokens that greedy decoding would have chosen are noted and compared.

On the CPU both compute in float32: MLX's product of experts knows no other dtype there, so mlx-lm's model is converted
after loading, as its user would have to. Prompts are evaluated in each program's own chunks of 2,048 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

PROGRAMS: Final = ("moelocal", "mlx-lm")
MLX_LM: Final = "mlx-lm==0.32.2"


@dataclass(frozen=True, slots=True)
class Run:
    """What one run took. `first_seconds`: until the first token was there; `decode_seconds`: of the others;
    `chosen`: the greedy choice behind the prompt and behind each decoded token but the last; `mlx_nbytes`: the most
    that MLX held; `resident_nbytes`: the most that the process had resident since it started."""

    prompt: int
    decode: int
    first_seconds: float
    decode_seconds: float
    chosen: tuple[int, ...]
    mlx_nbytes: int
    resident_nbytes: int

    @property
    def prefill_rate(self) -> float:
        """Tokens per second."""
        return self.prompt / self.first_seconds

    @property
    def decode_rate(self) -> float:
        """Tokens per second."""
        return (self.decode - 1) / self.decode_seconds


class Side:
    """A process that has loaded a checkpoint. Ended by `close`, or as a context."""

    def __init__(self, program: str, folder: Path) -> None:
        # here: this file is also the program of mlx-lm's process, which must not get what moelocal sets when imported
        from moelocal.bench.peers import environment

        self.program = program
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, __file__, program, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(program),
            start_new_session=True,  # Ctrl-C is for the parent, which ends this one
        )
        self.load_seconds = float(self._ask(None)["load_seconds"])

    def run(self, prompt: int, decode: int, seed: int) -> Run:
        """Read `prompt` random tokens and decode `decode` more. Raises `SideFailed` if the process ended."""
        found = self._ask({"prompt": prompt, "decode": decode, "seed": seed})
        return Run(prompt, decode, **(found | {"chosen": tuple(found["chosen"])}))

    def _ask(self, what: dict[str, int] | None) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            if what is not None:
                self._process.stdin.write(json.dumps(what) + "\n")
                self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        found: dict[str, Any] = json.loads(line)
        return found

    def _failed(self) -> Exception:
        from moelocal.bench.peers import SideFailed

        status = self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        self.close()
        if status == -9:
            return SideFailed(f"{self.program}: ended by the system, as happens where memory is short")
        return SideFailed(f"{self.program}: ended with status {status}" + (f": {said[-1]}" if said else ""))

    def close(self) -> None:
        """End the process, and wait for it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:  # in the middle of a run that nobody waits for
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_mlx_lm() -> None:
    """Raises `RequestError` with the one command that installs it, as the extra `compare` does."""
    from moelocal.errors import RequestError

    if find_spec("mlx_lm") is None:
        raise RequestError(f"mlx-lm is not installed here: {sys.executable} -m pip install '{MLX_LM}'")


# inside the process


class Ours:
    """moelocal: a session of its own for every run, with nothing stored from those before."""

    def __init__(self, folder: str) -> None:
        import moelocal

        self.model = moelocal.load(folder, progress=False)
        self.vocab = self.model.config.vocab

    def tokens(self, prompt: list[int], following: Sequence[Any], chosen: list[Any]) -> Iterator[int]:
        import mlx.core as mx

        from moelocal.cache import Store
        from moelocal.engine.session import Session

        self.model.store = Store(self.model.store.fingerprint, self.model.store.budget)
        session = Session(self.model)

        def choose(logits: mx.array) -> mx.array:
            best = mx.argmax(logits)
            chosen.append(best)
            token: mx.array = following[len(chosen) - 1] + 0 * best
            mx.async_eval(token)  # type: ignore[no-untyped-call]
            return token

        session.sync(prompt)
        token = choose(session.logits)
        yield token.item()  # type: ignore[misc]
        with session.answering():  # as every call does: what was decoded is kept for the next one
            token = choose(session.feed(token))
            for _ in range(len(following) - 2):
                after = choose(session.feed(token))
                yield token.item()  # type: ignore[misc]
                token = after
            yield token.item()  # type: ignore[misc]


class Theirs:
    """mlx-lm: `generate_step` with a sampler that takes the tokens that were drawn."""

    def __init__(self, folder: str) -> None:
        import mlx.core as mx
        from mlx_lm.utils import load_model

        self.model, config = load_model(Path(folder))
        if mx.default_device() == mx.Device(mx.cpu):
            self.model.set_dtype(mx.float32)
            mx.eval(self.model.parameters())
        self.vocab = config.get("text_config", config)["vocab_size"]

    def tokens(self, prompt: list[int], following: Sequence[Any], chosen: list[Any]) -> Iterator[int]:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        def sampler(logprobs: mx.array) -> mx.array:
            best = mx.argmax(logprobs, axis=-1)
            chosen.append(best)
            # it queues one token more than it gives
            token: mx.array = following[min(len(chosen), len(following)) - 1] + 0 * best
            return token

        count = len(following)
        for token, _ in generate_step(mx.array(prompt), self.model, max_tokens=count, sampler=sampler):
            yield int(token)


def measure(side: Ours | Theirs, prompt: int, decode: int, seed: int) -> dict[str, Any]:
    """One run, as `Run` has it."""
    import mlx.core as mx

    draw = random.Random(seed)
    read = [draw.randrange(side.vocab) for _ in range(prompt)]
    following = [mx.array(draw.randrange(side.vocab)) for _ in range(decode)]
    chosen: list[mx.array] = []
    mx.clear_cache()
    mx.reset_peak_memory()
    begin = time.perf_counter()
    tokens = side.tokens(read, following, chosen)
    next(tokens)
    first = last = time.perf_counter()
    for _ in tokens:
        last = time.perf_counter()
    return {
        "first_seconds": first - begin,
        "decode_seconds": last - first,
        "chosen": mx.stack([each.reshape(()) for each in chosen[:decode]]).tolist(),
        "mlx_nbytes": mx.get_peak_memory(),
        "resident_nbytes": most_resident(),
    }


def most_resident() -> int:
    """As `moelocal.machine.most_resident`, which the process of another program does not import."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main() -> None:
    """Load, say so, and answer every line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("folder", metavar="FOLDER", help="of the checkpoint")
    parsed = parser.parse_args()
    begin = time.perf_counter()
    side = Ours(parsed.folder) if parsed.program == PROGRAMS[0] else Theirs(parsed.folder)
    print(json.dumps({"load_seconds": time.perf_counter() - begin}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(side, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
