"""`moelocal evaluate`: its flags, its table, its progress."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from moelocal import flags
from moelocal.engine.load import DTYPES
from moelocal.errors import RequestError
from moelocal.evaluate.quality import EDGES, LENGTH, TOKENS, Progress, Quality, Weights, evaluate
from moelocal.evaluate.statistics import Estimate
from moelocal.units import size

_BAR: Final = 40


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `evaluate`."""
    parser.add_argument("model", metavar="MODEL", help="a folder or a Hugging Face name")
    parser.add_argument(
        "--reference",
        metavar="ORIGINAL",
        help="the original weights: a folder or a name; needed but with --kv-bits, where the model itself stands in",
    )
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=(8, 4),
        help="keep the model's keys and values, not the reference's, in so many bits",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help='plain text, or .jsonl with "text" or "messages"; else built in',
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help="of text (default %(default)s)"
    )
    parser.add_argument(
        "--sequence-length", type=int, default=LENGTH, metavar="N", help="in tokens (default %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of both computations; float32 unless named: rounding to 16 bits would show in the figures",
    )
    flags.add(parser, "--offline")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it as .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(parsed: argparse.Namespace) -> None:
    """Say how far a quantized model is from its original: divergence, agreement, perplexity, router overlap. Reads one
    layer at a time, so that 72 GB of weights fit into a 16 GB machine."""
    if parsed.plot is not None:
        flags.require_plot(parsed.plot)
    reference = parsed.reference
    if reference is None:
        if parsed.kv_bits is None:
            raise RequestError("--reference: expected the original weights, got none")
        reference = parsed.model
    with _bars() as progress:
        quality = evaluate(
            parsed.model,
            reference,
            parsed.text,
            tokens=parsed.tokens,
            length=parsed.sequence_length,
            kv_bits=parsed.kv_bits,
            dtype=DTYPES.get(parsed.dtype),
            offline=parsed.offline,
            progress=progress,
            note=lambda line: print(line, file=sys.stderr),
        )
    print("\n".join(table(quality)))
    if parsed.json:
        print(json.dumps(dataclasses.asdict(quality)))
    if parsed.plot is not None:  # last: if its disk is full, the figures are there
        from moelocal.evaluate.plot import plot

        plot(quality, parsed.plot)


def table(quality: Quality) -> Iterator[str]:
    """The result as lines of text."""
    for kind, weights in (("model", quality.model), ("reference", quality.reference)):
        yield f"{kind:<11}{weights.name}: {_size(weights)}"
    sequences = "1 sequence" if quality.sequences == 1 else f"{quality.sequences} sequences"
    yield f"text       {quality.corpus}: {quality.tokens} tokens to predict in {sequences}"
    yield f"           sha256 {quality.corpus_digest}"
    yield f"computed   in {quality.dtype} on the {quality.device}"
    if quality.kv_bits is not None:
        yield f"cache      the model's keys and values in {quality.kv_bits} bits, the reference's as they are"
    yield ""
    yield f"{'':<24}{'value':>10}   95 % interval over sequences"
    too_low = f"nats per token; at most {quality.kl_slack:.0e} too low"
    too_high = f"at most {quality.acceptance_slack:.0e} too high"
    yield _row("KL divergence, mean", quality.kl_mean, _number, too_low)
    yield _row("  median", quality.kl_median, _number)
    yield _row("  95th percentile", quality.kl_p95, _number)
    yield _row("  99th percentile", quality.kl_p99, _number)
    yield _row("  99.9th percentile", quality.kl_p999, _number)
    yield _row("  maximum", Estimate(quality.kl_max, None, None), _number)
    yield _row("top-1 agreement", quality.top1, _percent)
    yield _row("expected acceptance", quality.acceptance, _percent, too_high)
    yield _row("perplexity", quality.perplexity, _number)
    yield _row("  of the reference", quality.reference_perplexity, _number)
    yield _row("  ratio", quality.perplexity_ratio, "{:.5f}".format)
    if quality.router_overlap_mean is not None:
        yield _row("router overlap", quality.router_overlap_mean, _percent)
    if len(quality.parts) > 1:
        yield ""
        yield f"{'by kind of text':<24}{'tokens':>10}{'KL mean':>11}{'top-1':>10}{'perplexity':>12}{'reference':>11}"
        for kind, part in quality.parts.items():
            yield (
                f"  {kind:<22}{part.tokens:>10}{_number(part.kl_mean.value):>11}{_percent(part.top1.value):>10}"
                f"{_number(part.perplexity.value):>12}{_number(part.reference_perplexity.value):>11}"
            )
    if quality.router_overlap:
        yield ""
        yield "router overlap by layer, %"
        layers = list(quality.router_overlap.items())
        for start in range(0, len(layers), 10):
            row = layers[start : start + 10]
            yield f"{row[0][0]:>5}  " + "".join(f"{100 * each.value:>7.2f}" for _, each in row)
    yield ""
    yield "KL divergence of single positions"
    yield from _histogram(quality.kl_histogram)


def _row(label: str, estimate: Estimate, words: Callable[[float], str], remark: str = "") -> str:
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f"{words(estimate.low)} to {words(estimate.high)}"
    return f"{label:<24}{words(estimate.value):>10}   {interval:<24}{remark}".rstrip()


def _histogram(counts: tuple[int, ...]) -> Iterator[str]:
    """A bar per half decade, from the first to the last that holds a position. `counts`: as in `Quality`."""
    labels = [f"below {EDGES[0]:.0e}"] + [f"from {edge:.1e}" for edge in EDGES[::2]]
    bars = [counts[0]] + [sum(counts[i : i + 2]) for i in range(1, len(counts), 2)]
    filled = [i for i, count in enumerate(bars) if count]
    for i in range(filled[0], filled[-1] + 1):
        share = bars[i] / sum(bars)
        yield f"  {labels[i]:<13}{100 * share:>6.2f} % {'█' * round(_BAR * bars[i] / max(bars))}".rstrip()


def _size(weights: Weights) -> str:
    formats = ", ".join(f"{count} {name}" for name, count in weights.formats)
    return (
        f"{size(weights.nbytes)}, {weights.bits_per_weight:.2f} bits per weight, "
        f"{size(weights.read_per_token)} read per token ({formats})"
    )


def _number(value: float) -> str:
    return f"{value:.4g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3f} %"


@contextmanager
def _bars() -> Iterator[Progress]:
    """Progress bars with the time that is left, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda which, done, total: None
        return
    # imported here: only a terminal needs it
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    tasks: dict[str, TaskID] = {}
    with Bars(console=Console(stderr=True), transient=True) as bars:

        def progress(which: str, done: int, total: int) -> None:
            if which not in tasks:
                tasks[which] = bars.add_task(f"running the {which}", total=total)
            bars.update(tasks[which], completed=done)

        yield progress
