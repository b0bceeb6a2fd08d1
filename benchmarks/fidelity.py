"""What quantization costs in fidelity, and what our search and calibration win back.

    python benchmarks/fidelity.py [--json] [--samples N] [--chats N] [--calibration-tokens N]

Needs the extra `compare`. Two parts:

- search: squared error of `ops.group_search` against `mx.quantize` on a heavy-tailed random matrix (Student's t with
  6.5 degrees of freedom, 256 x 2048, weights and scales in bfloat16), for every format; and the time it takes.
- recipes: the embedded model, converted in each way, beside its original weights. Two texts: chats of `tools/embedded`
  from the held-out side, whose tasks neither training nor calibration saw, though chats have phrases and tool
  definitions in common; and Python's documentation from the evaluation side, which has no run of 100 tokens in common
  with the calibration text, and which this model knows nothing about. KL(original || converted) is the mean over all
  positions, in nats, both computed in float32; top-1 is the share of positions with the same likeliest token. Accuracy:
  `tools/embedded/evaluate.py`, greedy, held-out tasks.

`mlx_lm_4bit` is written by mlx-lm. `4bit` (min/max), `search_4bit` and `calibrated` have its formats in every matrix,
so its size; `calibrated` was fitted to the built-in calibration text. `fast`, `balanced` and `quality` are the recipes
of those names, searched; `calibrated_balanced` is `balanced`, fitted.

With --json the last line is one object: `search_error_reduction` (format to 1 − ours / theirs), `search_ns_per_weight`
(4 bits, groups of 64), `recipes` (name to `bytes`, `kl_mean` with the ends `kl_low`, `kl_high` of its 95 % interval
over chats, `kl_documentation`, `top1`, `accuracy`, `seconds` of the conversion), `original` (`bytes`, `accuracy`),
`kl_ratio` (calibrated over mlx_lm_4bit), `device`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table
from sides import require_mlx_lm

import moelocal
from moelocal.chat.command import exit_code
from moelocal.evaluate import evaluate
from moelocal.flags import integer
from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.hub import resolve
from moelocal.ops.group_search import group_search
from moelocal.quantize.calibrate import Calibration
from moelocal.quantize.convert import convert
from moelocal.quantize.corpus import Corpus
from moelocal.quantize.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "tools/embedded"))
import data

from evaluate import SEED, right

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
ROWS, COLS, FREEDOM = 256, 2048, 6.5
ROUNDS = 3
"""The time is the least of so many: other programs only ever add to it."""
LENGTH = 512
"""Tokens of a calibration sequence; the model was trained on documents of up to 640."""

DOCUMENTATION: Final = 16_384
"""Tokens of the built-in evaluation text, of which about half are documentation."""

Make = Callable[[Path], object]


def squared_error(weights: mx.array, packed: QuantizedArray) -> float:
    """Of what the stored scales and biases give."""
    difference = weights.astype(mx.float32) - packed.dequantize(mx.float32)
    return float(mx.sum(difference * difference))


def search_part() -> tuple[dict[str, float], dict[str, float]]:
    """By format the error that the search takes away from min/max, and its nanoseconds per weight."""
    drawn = 0.02 * np.random.default_rng(7).standard_t(FREEDOM, (ROWS, COLS))
    weights = mx.array(drawn.astype(np.float32)).astype(mx.bfloat16)
    reduction, cost = {}, {}
    for bits in BITS:
        for group in GROUPS:
            spec, name = QuantSpec(bits, group), f"{bits} bits, group {group}"
            theirs = QuantizedArray(*mx.quantize(weights, group_size=group, bits=bits), spec)
            seconds = []
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                ours = group_search(weights, spec, None, mx.bfloat16)
                mx.eval(*ours.arrays)
                seconds.append(time.perf_counter() - begin)
            cost[name] = min(seconds) / weights.size * 1e9
            reduction[name] = 1 - squared_error(weights, ours) / squared_error(weights, theirs)
    return reduction, cost


def held_out_chats(folder: Path, count: int) -> Corpus:
    """Whole chats, prompt and answer, by turns of every skill."""
    model = moelocal.load(folder, progress=False)
    sequences = []
    for number in range(count):
        rng = random.Random(f"{SEED}/chat/{number}")
        task = data.sample(data.SKILLS[number % len(data.SKILLS)], rng, 1.0, "held-out")
        sequences.append(tuple(data.encode(task, model.tokenizer, model.template)[0]))
    return Corpus("held-out chats", tuple(sequences), ("chats",) * count)


def accuracy(folder: Path, samples: int) -> float:
    """Of greedy answers, over all skills."""
    model = moelocal.load(folder, progress=False)
    tasks = []
    for skill in data.SKILLS:
        rng = random.Random(f"{SEED}/{skill}")
        tasks += [data.sample(skill, rng, 1.0, "held-out") for _ in range(samples)]
    return sum(right(model, task) for task in tasks) / len(tasks)


def by_mlx_lm(source: Path, to: Path) -> None:
    """Their 4 bits in groups of 64."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from mlx_lm import convert as convert_there

    with contextlib.redirect_stdout(io.StringIO()):
        convert_there(str(source), mlx_path=str(to), quantize=True, q_bits=4, q_group_size=64)


def makers(source: Path, calibration: Corpus) -> dict[str, Make]:
    """By recipe what writes it into a folder."""

    def ours(recipe: str, **options: Any) -> Make:
        return lambda to: convert(source, to, Recipe.open(recipe), **options)

    def fitted(recipe: str) -> Make:
        return lambda to: convert(source, to, Recipe.open(recipe), calibrator=Calibration(calibration))

    return {
        "mlx_lm_4bit": lambda to: by_mlx_lm(source, to),
        "4bit": ours("4bit", method="minmax"),
        "search_4bit": ours("4bit"),
        "calibrated": fitted("4bit"),
        "fast": ours("fast"),
        "balanced": ours("balanced"),
        "quality": ours("quality"),
        "calibrated_balanced": fitted("balanced"),
    }


def recipes_part(samples: int, chats: int, tokens: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The original, and every recipe."""
    source = resolve(None)
    text = held_out_chats(source, chats)
    calibration = Corpus.built_in(source, "calibration", tokens, LENGTH)
    documentation = Corpus.built_in(source, "evaluation", DOCUMENTATION, LENGTH)
    found: dict[str, dict[str, Any]] = {}
    for name, make in makers(source, calibration).items():
        print(f"{name} …", file=sys.stderr)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / name
            begin = time.perf_counter()
            make(folder)
            seconds = time.perf_counter() - begin
            quality = evaluate(folder, source, text)
            other = evaluate(folder, source, documentation).parts["documentation"]
            found[name] = {
                "bytes": quality.model.nbytes,
                "kl_mean": quality.kl_mean.value,
                "kl_low": quality.kl_mean.low,
                "kl_high": quality.kl_mean.high,
                "kl_documentation": other.kl_mean.value,
                "top1": quality.top1.value,
                "accuracy": accuracy(folder, samples),
                "seconds": seconds,
            }
    return {"bytes": quality.reference.nbytes, "accuracy": accuracy(source, samples)}, found


def main() -> int:
    """0, or 1 after an error of ours, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=integer(1), default=8, help="held-out tasks per skill (default 8)")
    parser.add_argument(
        "--chats", type=integer(1), default=64, help="held-out chats for the divergence (default 64)"
    )
    parser.add_argument(
        "--calibration-tokens", type=integer(1), default=32_768, metavar="N", help="default 32768"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return exit_code(run, parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure and tell. Raises what a user can cause as one of our errors."""
    require_mlx_lm()
    console = Console(width=110)
    reduction, cost = search_part()
    table = Table("format", "error against min/max", "ns per weight", title="search, heavy-tailed weights")
    for name, part in reduction.items():
        table.add_row(name, f"{-part:.1%}", f"{cost[name]:.0f}")
    console.print(table)
    with tempfile.TemporaryDirectory() as cache:  # of reference log-probabilities
        os.environ["MOELOCAL_CACHE"] = cache
        original, found = recipes_part(args.samples, args.chats, args.calibration_tokens)
    table = Table(
        "recipe",
        "MB",
        "KL, nats",
        "95 %",
        "KL, documentation",
        "top-1",
        "accuracy",
        "s",
        title="embedded model",
    )
    for name, row in found.items():
        table.add_row(
            name,
            f"{row['bytes'] / 1e6:.3f}",
            f"{row['kl_mean']:.4f}",
            f"{row['kl_low']:.3f}–{row['kl_high']:.3f}",
            f"{row['kl_documentation']:.4f}",
            f"{row['top1']:.1%}",
            f"{row['accuracy']:.1%}",
            f"{row['seconds']:.0f}",
        )
    table.add_row(
        "original", f"{original['bytes'] / 1e6:.3f}", "", "", "", "", f"{original['accuracy']:.1%}", ""
    )
    console.print(table)
    if args.json:
        result = {
            "search_error_reduction": reduction,
            "search_ns_per_weight": cost["4 bits, group 64"],
            "recipes": found,
            "original": original,
            "kl_ratio": found["calibrated"]["kl_mean"] / found["mlx_lm_4bit"]["kl_mean"],
            "device": str(mx.default_device()),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
