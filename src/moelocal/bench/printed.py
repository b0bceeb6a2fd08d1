"""What was measured, for people."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Final

from moelocal.bench.peers import MLX_LM, OURS
from moelocal.bench.report import FIGURES, LEAST_PROMPT, LOADING, RATIOS, Result
from moelocal.bench.results import STOPPED
from moelocal.bench.speed import Figure
from moelocal.evaluate.statistics import Estimate
from moelocal.units import size

_COLUMNS: Final = (
    ("", "context"),
    ("decode,", "tokens/s"),
    ("of", "limit"),
    ("prefill,", "tokens/s"),
    ("first", "token, s"),
    ("MLX,", "most"),
    ("resident,", "most"),
    ("decode,", "J/token"),
)

_WHY_NOT: Final = {
    "decode": "an answer was of one token, or came in one piece",
    "prefill": f"a prompt of fewer than {LEAST_PROMPT} tokens says nothing",
}


def lines(result: Result) -> Iterator[str]:
    """Everything, as text."""
    found, header, model = result.measured, result.header, result.model
    yield from header.as_lines()
    yield f"model      {model.name}: {size(model.nbytes)}, {model.quantization}"
    yield f"           weights {model.hash}; computed in {result.dtype}"
    yield (
        f"limit      {size(result.moved(0))} moved per token at least: at most "
        f"{header.bandwidth / result.moved(0):,.0f} tokens/s at no context"
    )
    missing = f"; {sys.executable} -m pip install zeus-apple-silicon" if sys.platform == "darwin" else ""
    yield f"energy     {f'of the whole machine, from {result.energy}' if result.energy else f'not told here{missing}'}"
    yield ""
    rounds = 1 + max(number for _, number in found.runs)
    how = f"{rounds} round{'s' * (rounds > 1)} after a warm-up"
    if found.interrupted:
        how = f"{STOPPED}, in round {rounds}"
    yield f"{found.tokens} tokens decoded greedily; {how}: median (least to largest)"
    for side in (OURS, *result.peers):
        yield ""
        yield from _alone(result, side)
    for side in result.peers:
        yield ""
        yield from _beside(result, side)
    if found.notes or found.interrupted:
        yield ""
    yield from (f"note: {note}" for note in found.notes)
    if found.interrupted:
        yield f"note: {STOPPED}; the figures are of what was measured until then"


def _alone(result: Result, side: str) -> Iterator[str]:
    found = result.measured
    load, most = (result.loading(side, name) for name in LOADING)
    words = f"; loads in {_spread(load, '{:.2f}')} s" if load else ""
    yield result.title(side) + words + (f", with {size(round(most.value))} of MLX at most" if most else "")
    rows = []
    for context in found.contexts:
        figures = {name: found.figure(side, context, value) for name, (_, value) in FIGURES.items()}
        if (first := figures["first token"]) is None:
            continue
        share, energy = result.share(side, context), figures["decode energy"]
        memory = [figures[name] for name in ("MLX memory", "resident memory")]
        rows.append(
            (
                f"{context:,}",
                _spread(figures["decode"]),
                f"{share.value:.0%}" if share else "",
                _spread(figures["prefill"]),
                f"{first.value:.3f}",
                *(size(round(each.value)) if each else "" for each in memory),
                f"{energy.value:.3g}" if energy else "",
            )
        )
    yield from _table(_COLUMNS, rows)
    samples = [sample for context in found.contexts for sample in found.samples(side, context)]
    if not all(sample.counted for sample in samples):
        yield "  the server does not count its tokens: estimated by cutting its text with our tokenizer"
    if any(sample.cached for sample in samples):
        yield "  the server had parts of prompts from before; prefill counts only what it read"
    short = [sample.decoded for sample in samples if sample.decoded < found.tokens]
    if short:
        yield f"  {len(short)} of {len(samples)} answers ended by themselves, the shortest at {min(short)} tokens"


def _beside(result: Result, side: str) -> Iterator[str]:
    found = result.measured
    how = "in turns" if found.together else "each alone in memory, in turns by round"
    yield f"moelocal beside {result.title(side)}, {how}: times as fast (95 % interval)"
    rows, missing = [], dict[str, list[str]]()
    for context in found.contexts:
        ratios = {name: found.ratio(side, context, FIGURES[name][1]) for name in RATIOS}
        if told := [each for each in ratios.values() if each]:
            cells = (_interval(each[0] if each else None) for each in ratios.values())
            rows.append((f"{context:,}", *cells, str(max(pairs for _, pairs in told))))
        if found.pairs(side, context):
            for name in (name for name, each in ratios.items() if each is None):
                missing.setdefault(name, []).append(f"{context:,}")
    if load := result.load_ratio(side):
        rows.append(("loading", _interval(load), "", ""))
    yield from _table((("", "context"), ("", "decode"), ("", "prefill"), ("", "pairs")), rows)
    for name, contexts in missing.items():
        yield f"  no ratio of {name} at {', '.join(contexts)}: {_WHY_NOT[name]}"
    said = result.agreement(side)
    exact = "" if side == MLX_LM else " (its text, cut by our tokenizer)"
    if said.same:
        yield f"same tokens in all {said.pairs} pairs, {said.tokens:,} compared{exact}"
        return
    yield f"NOT the same tokens in {len(said.parted)} of {said.pairs} pairs{exact}:"
    for each in said.parted:
        why = f"; {side} chose a row of the output that is no token" if each.padding else ""
        yield f"  context {each.context:,}, round {each.round}: they part at token {each.token}{why}"


def _table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as what is in them, figures with a spread to the left; an empty column is left out."""
    columns = []
    for head, cells in zip(heads, zip(*rows, strict=True), strict=False):
        if any(cells):
            width = max(map(len, (*head, *cells)))
            left = any("(" in cell for cell in cells)
            columns.append([f"{cell:{'<' if left else '>'}{width}}" for cell in (*head, *cells)])
    for line in map("  ".join, zip(*columns, strict=True)):
        if line.strip():
            yield f"  {line}".rstrip()


def _spread(figure: Figure | None, form: str = "") -> str:
    """A median and its spread: "105 (95.6 to 116)"."""
    if figure is None:
        return ""
    value, low, high = (
        form.format(v) if form else _number(v) for v in (figure.value, figure.low, figure.high)
    )
    return f"{value} ({low} to {high})" if figure.count > 1 else value


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:#.3g}"


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return _number(estimate.value)
    return f"{_number(estimate.value)} ({_number(estimate.low)} to {_number(estimate.high)})"
