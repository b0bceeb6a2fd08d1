"""A picture of a comparison: how often which divergence, and in which layers the routers differ."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from moelocal.evaluate.picture import save
from moelocal.evaluate.quality import EDGES, Quality


def plot(quality: Quality, file: Path) -> None:
    """Draw to `file`, whose name says the format (.png, .svg, .pdf). Raises `RequestError` if it cannot be written."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    figure.suptitle(
        f"{Path(quality.model.name).name} against {Path(quality.reference.name).name}, {quality.tokens} tokens, "
        f"{quality.dtype}",
        fontsize=10,
    )
    left, *right = figure.subplots(1, 2 if quality.router_overlap else 1, squeeze=False)[0]
    # what is below the first border is drawn as one more bin before it
    width = EDGES[1] / EDGES[0]
    borders = [EDGES[0] / width, *EDGES, EDGES[-1] * width]
    left.stairs([count / quality.tokens for count in quality.kl_histogram], borders, fill=True, alpha=0.5)
    left.axvline(
        max(quality.kl_mean.value, borders[0]), color="black", label=f"mean {quality.kl_mean.value:.3g}"
    )
    left.axvline(
        max(quality.kl_p99.value, borders[0]),
        color="black",
        linestyle="--",
        label=f"p99 {quality.kl_p99.value:.3g}",
    )
    left.set(xscale="log", xlabel="KL divergence, nats", ylabel="share of positions")
    left.legend()
    for axes in right:
        layers = list(quality.router_overlap)
        found = list(quality.router_overlap.values())
        values = [each.value for each in found]
        ends = [(each.low, each.high) for each in found]
        errors = [
            [v - (v if low is None else low) for v, (low, _) in zip(values, ends, strict=True)],
            [(v if high is None else high) - v for v, (_, high) in zip(values, ends, strict=True)],
        ]
        axes.errorbar(layers, values, yerr=errors, marker="o", markersize=3, linewidth=1)
        axes.set(xlabel="layer", ylabel="router overlap")
    save(figure, file)
