"""moelocal beside mlx-lm: one machine, one checkpoint, one run, greedy.

    python benchmarks/compare_mlx_lm.py [--json] [--model FOLDER] [--rounds N]

Needs the extra `compare`. What is measured:

- tokens: the same prompts (rendered by the checkpoint's template) give the same token ids.
- decode: tokens after the first over their time, through the public loops: `moelocal.stream`, which also
  makes text, reasoning and tool calls of the tokens, and `mlx_lm.generate.generate_step`, which gives ids
  alone.
- prefill: prompt tokens over the time to the first token through the same loops; ours includes tokenizing.
- load: the call of `moelocal.load` and `mlx_lm.load` with weights evaluated and tokenizer and template
  read, in fresh interpreters, imports excluded; for mlx-lm the conversion below included.
- memory: the highest number of bytes that MLX held while loading, reading 2,048 tokens and decoding 64, in
  a fresh interpreter; the resident set of that interpreter is printed, too.

The two take turns in every round, and a figure is the median over the rounds. On a busy machine the seconds
are noise. The ratios suffer less, with one exception: on Linux our prompt reading multiplies matrices in
NumPy, whose threads wait for each other; where other programs hold the cores, set OPENBLAS_NUM_THREADS=1.

Both compute in float32 on the CPU device: MLX's product of experts knows no other dtype there, so mlx-lm's
model is converted after loading, as its user would have to.

With --json the last line is one JSON object. Ratios are ours over theirs in speed (above 1: we are faster),
for load their seconds over ours; `peak_memory_ratio` is our bytes over theirs (below 1: we hold less), of
MLX. `import_seconds` is ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from imports import import_seconds
from rich.console import Console
from rich.table import Table
from sides import require_mlx_lm

from moelocal.flags import integer
from moelocal.hub import resolve
from moelocal.machine import most_resident

PREFILLS = (512, 2048)
PREFILL_ROUNDS = 3
DECODED = 128
QUESTIONS = (
    "Draw a pelican riding a bicycle as SVG.",
    "What is 347 + 285?",
    "Sort these words: pear, apple, fig, plum, date.",
    "Good morning! My name is Ada.",
)
FILLER = "The quick brown fox jumps over the lazy dog, counts 1 to 9, and goes home again. "

Tokens = list[int]


class Ours:
    """moelocal through its public functions."""

    name = "moelocal"

    def __init__(self, folder: str) -> None:
        import moelocal

        self._stream, self._greedy = moelocal.stream, moelocal.Sampling(temperature=0)
        self.model = moelocal.load(folder, progress=False)
        # Read when first needed otherwise; mlx-lm reads them while it loads.
        assert self.model.tokenizer and self.model.template

    def tokens(self, prompt: str, count: int) -> Iterator[int]:
        for event in self._stream(self.model, prompt, raw=True, max_tokens=count, sampling=self._greedy):
            yield from event.tokens


class Theirs:
    """mlx-lm through its public functions."""

    name = "mlx-lm"

    def __init__(self, folder: str) -> None:
        import mlx.core as mx
        import mlx_lm
        from mlx_lm.generate import generate_step

        self._array, self._step = mx.array, generate_step
        self.model = mlx_lm.load(folder)[0]
        if mx.default_device() == mx.Device(mx.cpu):
            self.model.set_dtype(mx.float32)
            mx.eval(self.model.parameters())

    def tokens(self, prompt: Tokens, count: int) -> Iterator[int]:
        for token, _ in self._step(self._array(prompt), self.model, max_tokens=count):
            yield int(token)


SIDES: dict[str, Callable[[str], Any]] = {Ours.name: Ours, Theirs.name: Theirs}


def timed(tokens: Iterator[int]) -> tuple[Tokens, float, float]:
    """The tokens, the seconds to the first one, and the seconds of the rest."""
    begin = time.perf_counter()
    found = [next(tokens)]
    first = last = time.perf_counter()
    for token in tokens:
        found.append(token)
        last = time.perf_counter()
    return found, first - begin, last - first


def text_of_length(encode: Callable[[str], Sequence[int]], length: int) -> str:
    """Filler text of exactly `length` tokens."""
    text = FILLER * (length // 8)
    while len(encode(text)) > length:
        text = text[: -max(1, (len(encode(text)) - length) // 2)]
    while len(encode(text)) < length:
        text += " a"
    assert len(encode(text)) == length
    return text


def measure(folder: str, rounds: int) -> dict[str, Any]:
    """Decode and prefill of both, in turns, in this process."""
    ours, theirs = Ours(folder), Theirs(folder)
    encode = ours.model.tokenizer.encode
    prompts = [ours.model.template.render([{"role": "user", "content": each}]) for each in QUESTIONS]
    decode: dict[str, list[float]] = {side: [] for side in SIDES}
    same: list[bool] = []
    compared = 0
    for turn in range(rounds + 1):
        seconds, counts = dict.fromkeys(SIDES, 0.0), dict.fromkeys(SIDES, 0)
        for prompt in prompts:
            mine, _, took = timed(ours.tokens(prompt, DECODED))
            seconds[ours.name] += took
            # Ours stops at the end of the answer, their loop never does: it is given the number to come.
            other, _, took = timed(theirs.tokens(list(encode(prompt)), len(mine)))
            seconds[theirs.name] += took
            same.append(mine == other)
            compared += len(mine)
            for side in SIDES:
                counts[side] += len(mine) - 1
        if turn > 0:  # the first round compiles
            for side in SIDES:
                decode[side].append(counts[side] / seconds[side])
    prefill: dict[int, dict[str, list[float]]] = {}
    for length in PREFILLS:
        text = text_of_length(encode, length)
        ids = list(encode(text))
        prefill[length] = {side: [] for side in SIDES}
        for turn in range(PREFILL_ROUNDS + 1):
            mine, our_seconds, _ = timed(ours.tokens(text, 1))
            other, their_seconds, _ = timed(theirs.tokens(ids, 1))
            same.append(mine == other)
            if turn > 0:
                prefill[length][ours.name].append(length / our_seconds)
                prefill[length][theirs.name].append(length / their_seconds)
    return {
        "equal": all(same),
        "same": f"{sum(same)} of {len(same)} runs, {compared:,} tokens in the answers",
        "decode": medians(decode),
        "prefill": {length: medians(found) for length, found in prefill.items()},
    }


def medians(values: dict[str, list[float]]) -> dict[str, float]:
    return {side: statistics.median(each) for side, each in values.items()}


def fresh(side: str, folder: str) -> dict[str, float]:
    """Load seconds and memory of one side in an interpreter of its own."""
    command = [sys.executable, __file__, "--model", folder, "--fresh", side]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_fresh(side: str, folder: str) -> dict[str, float]:
    """The inside of `fresh`."""
    importlib.import_module(side.replace("-", "_"))
    import mlx.core as mx
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))

    def encode(text: str) -> Tokens:
        ids: Tokens = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    text = text_of_length(encode, PREFILLS[-1])
    begin = time.perf_counter()
    loaded = SIDES[side](folder)
    load_seconds = time.perf_counter() - begin
    for _ in loaded.tokens(text if side == Ours.name else encode(text), 64):
        pass
    return {
        "load_seconds": load_seconds,
        "mlx_nbytes": mx.get_peak_memory(),
        "resident_nbytes": most_resident(),
    }


def main() -> int:
    """0, or 1 after an error of ours, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object at the end")
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint; default: the embedded one")
    parser.add_argument("--rounds", type=integer(1), default=5, help="of the decoding; default: 5")
    parser.add_argument("--fresh", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.fresh:
        print(json.dumps(run_fresh(parsed.fresh, parsed.model)))
        return 0
    # here: what it imports would be in the memory of a fresh interpreter, mlx-lm's too
    from moelocal.chat.command import exit_code

    return exit_code(run, parsed)


def run(parsed: argparse.Namespace) -> None:
    """Measure and tell. Raises what a user can cause as one of our errors."""
    require_mlx_lm()
    folder = str(resolve(parsed.model, offline=True))
    imports = import_seconds(("moelocal", "mlx_lm"), rounds=5)
    starts: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(3):
        for side in SIDES:
            starts[side].append(fresh(side, folder))
    start = {
        side: {name: statistics.median(each[name] for each in found) for name in found[0]}
        for side, found in starts.items()
    }
    loops = measure(folder, parsed.rounds)
    show(folder, imports, start, loops)
    if parsed.json:
        ours, theirs = start[Ours.name], start[Theirs.name]
        figures = {
            "tokens_equal": loops["equal"],
            "decode_ratio": ratio(loops["decode"]),
            "prefill_ratio_512": ratio(loops["prefill"][512]),
            "prefill_ratio_2048": ratio(loops["prefill"][2048]),
            "load_ratio": theirs["load_seconds"] / ours["load_seconds"],
            "import_seconds": imports["moelocal"],
            "peak_memory_ratio": ours["mlx_nbytes"] / theirs["mlx_nbytes"],
        }
        print(json.dumps({name: v if isinstance(v, bool) else round(v, 3) for name, v in figures.items()}))


def ratio(rates: dict[str, float]) -> float:
    """Ours over theirs."""
    return rates[Ours.name] / rates[Theirs.name]


def show(
    folder: str, imports: dict[str, float], start: dict[str, dict[str, float]], loops: dict[str, Any]
) -> None:
    """The table for people."""
    import mlx.core as mx

    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    computed = "both in float32" if on_cpu else "each in the checkpoint's dtype"
    table = Table(
        title=f"{Path(folder).name} on {mx.default_device()}, {computed}, greedy",
        caption="ratio: how many times as fast as mlx-lm; for bytes, ours over theirs",
    )
    for column in ("", "moelocal", f"mlx-lm {version('mlx-lm')}", "ratio"):
        table.add_column(column, justify="right" if column else "left")

    def row(label: str, ours: float, theirs: float, form: str, factor: float) -> None:
        table.add_row(label, form.format(ours), form.format(theirs), f"{factor:.2f}")

    rates = {"decode, tokens/s": loops["decode"]}
    rates |= {f"prefill {length:,}, tokens/s": found for length, found in loops["prefill"].items()}
    for label, found in rates.items():
        row(label, found[Ours.name], found[Theirs.name], "{:,.0f}", ratio(found))
    ours, theirs = start[Ours.name], start[Theirs.name]
    row(
        "load, s",
        ours["load_seconds"],
        theirs["load_seconds"],
        "{:.3f}",
        theirs["load_seconds"] / ours["load_seconds"],
    )
    row(
        "import, s", imports["moelocal"], imports["mlx_lm"], "{:.3f}", imports["mlx_lm"] / imports["moelocal"]
    )
    for label, name in (("MLX's peak memory, MB", "mlx_nbytes"), ("resident memory, MB", "resident_nbytes")):
        row(label, ours[name] / 1e6, theirs[name] / 1e6, "{:,.0f}", ours[name] / theirs[name])
    console = Console()
    console.print(table)
    verdict = "equal" if loops["equal"] else "NOT equal"
    console.print(f"Greedy tokens: {verdict} ({loops['same']}).")


if __name__ == "__main__":
    sys.exit(main())
