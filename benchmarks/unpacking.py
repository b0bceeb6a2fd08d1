"""Why reading a prompt takes longer with more experts: one layer in the host form, and how much of it is unpacking.

    python benchmarks/unpacking.py [--tokens N] [--rounds N] [--json]        # some seconds

The expert block of one layer in the shape `small` (hidden size 512, experts of width 128), 4 bits, 8 experts per token,
random choices, on this machine's CPU through NumPy (`moelocal.ops.experts.host`). Multiply-adds are the same with any
number of experts. Measured as it is, with the next experts unpacked on other cores while NumPy multiplies, and with one
after the other on one core, which shows how much of it unpacking is. Both, and the numbers of experts, take turns; a
figure is the median of the rounds.

Rows are added to benchmarks/results/<machine>.tsv, but not with other --tokens or --rounds: they would be the table of
docs/benchmarks.md. --results names another folder, for any run, --no-results none. With --json the last line is one
object: by number of experts `seconds`, `seconds_in_turn` (one after the other) and its `unpacking`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import mlx.core as mx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moelocal.bench import results
from moelocal.bench.header import Header, command_line
from moelocal.bench.results import Row
from moelocal.bench.speed import Figure
from moelocal.chat.command import exit_code
from moelocal.flags import integer
from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.ops import experts
from moelocal.ops.host import one_thread

EXPERTS: Final = (16, 32, 64, 128, 256, 512)
PER_TOKEN, HIDDEN, WIDTH = 8, 512, 128
TOKENS, ROUNDS = 512, 9
FIGURES: Final = ("seconds", "seconds_in_turn", "unpacking")

Found = dict[int, dict[str, list[float]]]
"""By number of experts and figure: one value per round."""


def packed(*shape: int) -> QuantizedArray:
    """Random codes of 4 bits in groups of 64."""
    *lead, cols = shape
    words = mx.random.randint(0, 1 << 31, (*lead, cols // 8)).astype(mx.uint32)
    scales = mx.full((*lead, cols // 64), 0.01)
    found = QuantizedArray(words, scales, scales * -7.5, QuantSpec(4, 64))
    mx.eval(found.arrays)
    return found


def layer_of(count: int, tokens: int) -> Callable[[], dict[str, float]]:
    """A layer of `count` experts with its input; each call is one measurement."""
    layer = experts.SwiGLU((packed(count, 2 * WIDTH, HIDDEN),), packed(count, HIDDEN, WIDTH))
    x = mx.random.normal((1, tokens, HIDDEN))
    chosen = mx.argsort(mx.random.normal((1, tokens, count)), axis=-1)[..., :PER_TOKEN].astype(mx.uint32)
    weights = mx.full((1, tokens, PER_TOKEN), 1 / PER_TOKEN)
    mx.eval(x, chosen, weights)

    def seconds() -> float:
        begin = time.perf_counter()
        mx.eval(experts.host(x, layer, chosen, weights, None, None, None))
        return time.perf_counter() - begin

    def measured() -> dict[str, float]:
        spent = 0.0

        def in_turn(make: Callable[[Any], mx.array], items: Iterable[Any]) -> Iterator[mx.array]:
            nonlocal spent
            for item in items:
                begin = time.perf_counter()
                found = make(item)
                mx.eval(found)
                spent += time.perf_counter() - begin
                yield found

        with one_thread():
            found = seconds()
            with patch.object(experts, "ahead", in_turn):
                return {"seconds": found, "seconds_in_turn": seconds(), "unpacking": spent}

    return measured


def measure(tokens: int, rounds: int) -> Found:
    """All numbers of experts in turns, behind a round that counts for nothing."""
    layers = {count: layer_of(count, tokens) for count in EXPERTS}
    found: Found = {count: {name: [] for name in FIGURES} for count in EXPERTS}
    console = Console(stderr=True)
    steps = track(
        range(rounds + 1), "unpacking", console=console, transient=True, disable=not console.is_terminal
    )
    for turn in steps:
        for count, layer in layers.items():
            for name, value in layer().items():
                if turn:
                    found[count][name].append(value)
    return found


def rows_of(found: Found, header: Header, tokens: int) -> Iterator[Row]:
    """Every figure."""
    for count, each in found.items():
        where = f"experts={count} tokens={tokens} hidden={HIDDEN} width={WIDTH} per_token={PER_TOKEN}"
        for name, values in each.items():
            figure = Figure.of(values)
            assert figure is not None
            yield Row(
                header, None, "unpacking", "moelocal", where, name, "s", figure.value, figure.low,
                figure.high, figure.count,
            )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 after an error of ours, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=integer(1), default=TOKENS, metavar="N", help="of the prompt; default %(default)s"
    )
    parser.add_argument("--rounds", type=integer(1), default=ROUNDS, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="default benchmarks/results, with other --tokens or --rounds none",
    )
    parser.add_argument("--no-results", action="store_true", help="write no file of results")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return exit_code(run, parser.parse_args(arguments))


def run(parsed: argparse.Namespace) -> None:
    """Measure, note, tell."""
    of_table = (parsed.tokens, parsed.rounds) == (TOKENS, ROUNDS)
    own = Path(__file__).parent / "results" if of_table else None
    folder = None if parsed.no_results else parsed.results or own
    if folder is not None:
        results.require_writable(folder)
    header = Header.now(command_line())
    rows = list(rows_of(measure(parsed.tokens, parsed.rounds), header, parsed.tokens))
    if folder is not None:
        results.append(folder, rows)
    medians: dict[str, dict[str, float]] = {}
    for row in rows:
        medians.setdefault(row.settings["experts"], {})[row.figure] = row.value
    table = Table("experts", "ms", "in turn, ms", "of it unpacking")
    for count, each in medians.items():
        share = each["unpacking"] / each["seconds_in_turn"]
        times = (f"{1e3 * each[name]:.1f}" for name in FIGURES[:2])
        table.add_row(count, *times, f"{share:.0%}")
    Console().print(table)
    if parsed.json:
        print(json.dumps(medians))


if __name__ == "__main__":
    sys.exit(main())
