"""A picture of a measurement: speed, its ratio and memory against the context."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter

from moelocal.bench.peers import OURS
from moelocal.bench.report import FIGURES, RATIOS, Result
from moelocal.bench.results import STOPPED
from moelocal.evaluate.picture import plain, save

_PANELS = {
    "decode": "decode, tokens/s",
    "prefill": "prefill, tokens/s",
    "MLX memory": "peak memory of MLX, MB",
}


def plot(result: Result, file: Path) -> None:
    """Draw to `file`, a .png. Raises `RequestError` if it cannot be written."""
    rows = 2 if result.peers else 1
    picture = Picture(figsize=(13, 4 * rows + 0.5), layout="constrained")
    header = result.header
    picture.suptitle(
        f"{plain(Path(result.model.name).name)}, {result.model.quantization}, in {result.dtype}\n{header.words}, "
        f"{header.system}, MLX {header.mlx} on {header.device}, power {header.power}, {header.date[:10]}; "
        f"{result.measured.tokens} tokens, median and spread"
        + (f"; {STOPPED}" if result.measured.interrupted else ""),
        fontsize=9,
    )
    panels = picture.subplots(rows, 3, squeeze=False)
    for axes, (name, label) in zip(panels[0], _PANELS.items(), strict=True):
        _figures(axes, result, name, 1e6 if name == "MLX memory" else 1.0)
        axes.set(ylabel=label, ylim=(0, None))
    _limit(panels[0][0], result)
    if result.peers:
        for axes, name in zip(panels[1], RATIOS, strict=False):
            _ratios(axes, result, name)
            axes.set(ylabel=f"{name}: moelocal, times as fast")
        panels[1][2].set_axis_off()
    for axes in panels.flat:
        if axes.axison:
            _context_axis(axes, result.measured.contexts)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
    save(picture, file, dpi=130)


def _figures(axes: Axes, result: Result, name: str, unit: float) -> None:
    for side in (OURS, *result.peers):
        found = [
            (context, figure)
            for context in result.measured.contexts
            if (figure := result.measured.figure(side, context, FIGURES[name][1]))
        ]
        if found:
            values = [figure.value / unit for _, figure in found]
            spread = [
                [(figure.value - figure.low) / unit for _, figure in found],
                [(figure.high - figure.value) / unit for _, figure in found],
            ]
            places = [context for context, _ in found]
            axes.errorbar(
                places,
                values,
                yerr=spread,
                marker="o",
                markersize=4,
                capsize=3,
                label=plain(result.title(side)),
            )


def _limit(axes: Axes, result: Result) -> None:
    """The fastest that memory allows, where it does not flatten everything else."""
    contexts = result.measured.contexts
    limits = [result.header.bandwidth / result.moved(context) for context in contexts]
    if max(limits) < 4 * axes.get_ylim()[1]:
        axes.plot(contexts, limits, linestyle="--", color="gray", label="limit set by memory")


def _ratios(axes: Axes, result: Result, name: str) -> None:
    axes.axhline(1, color="gray", linewidth=1)
    for number, side in enumerate(result.peers):
        found = [
            (context, ratio[0])
            for context in result.measured.contexts
            if (ratio := result.measured.ratio(side, context, FIGURES[name][1]))
        ]
        if found:
            values = [each.value for _, each in found]
            ends = [
                (each.value if each.low is None else each.low, each.high or each.value) for _, each in found
            ]
            spread = [
                [max(value - low, 0.0) for value, (low, _) in zip(values, ends, strict=True)],
                [max(high - value, 0.0) for value, (_, high) in zip(values, ends, strict=True)],
            ]
            axes.errorbar(
                [context for context, _ in found],
                values,
                yerr=spread,
                marker="o",
                markersize=4,
                capsize=3,
                color=f"C{number + 1}",  # as the side has above
                label=f"beside {result.title(side)}, 95 % interval",
            )


def _context_axis(axes: Axes, contexts: tuple[int, ...]) -> None:
    """Doublings at equal distances, with a place for 0."""
    least = min((context for context in contexts if context), default=1)
    axes.set_xscale("symlog", base=2, linthresh=least, linscale=1)
    axes.set_xticks(contexts, minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.set(xlabel="tokens of context")


def _short(context: float, _: int) -> str:
    return f"{context / 1024:.0f}k" if context >= 1024 and context % 1024 == 0 else f"{context:.0f}"
