"""A picture of the report: spend by month and model, and where a machine begins to pay."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moelocal.cost.estimate import Sum, Tally
from moelocal.cost.local import BreakEven
from moelocal.evaluate.picture import plain, save

_MODELS = 8
"""Models with a colour of their own; the cheaper ones share one."""


def plot(tally: Tally, even: BreakEven | None, file: Path) -> None:
    """Draw to `file`, whose name says the format. Raises `RequestError` if it cannot be written."""
    figure = Figure(figsize=(13 if even else 8, 4), layout="constrained")
    left, *right = figure.subplots(1, 2 if even else 1, squeeze=False)[0]
    months = sorted({month for month, _ in tally.months})
    models = [name for name, each in tally.by_model().items() if each.dollars]
    named, others = models[:_MODELS], models[_MODELS:]
    groups = [(name, [name]) for name in named] + ([("others", others)] if others else [])
    floor = [0.0] * len(months)
    for name, members in groups:
        heights = [
            sum(tally.months.get((month, each), Sum()).dollars for each in members) for month in months
        ]
        left.bar(months, heights, bottom=floor, label=plain(name))
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    left.set(ylabel="US dollars", title="API spend by month")
    left.set_ylim(0, 1.08 * max(floor, default=0.0) or 1.0)
    left.tick_params(axis="x", rotation=45)
    if groups:
        left.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in right:
        assert even is not None
        break_even(axes, even)
    save(figure, file)


def break_even(axes: Axes, even: BreakEven) -> None:
    """Dollars by calls per month, of the API and of the machine, whose line ends where it can take no more."""
    most = 2 * max(even.calls or 0.0, even.calls_per_month or 0.0, 1.0)
    fixed = even.machine_price / (12 * even.years)
    axes.plot([0.0, most], [0.0, even.api_per_call * most], label="API")
    ends = even.most_calls is not None and even.most_calls < most
    last = even.most_calls if ends and even.most_calls is not None else most
    end = fixed + even.local_per_call * last
    (line,) = axes.plot([0.0, last], [fixed, end], label="this machine, and energy")
    if ends:
        axes.plot(
            [last],
            [end],
            "X",
            color=line.get_color(),
            markersize=9,
            label=f"no more than {last:,.0f} calls fit into a month",
        )
    if even.calls is not None:
        reached = "" if last >= even.calls else ", out of this machine's reach"
        label = f"break-even: {even.calls:,.0f} calls{reached}"
        axes.axvline(even.calls, color="black", linestyle="--", label=label)
    if even.calls_per_month is not None:
        label = f"this log: {even.calls_per_month:,.0f} priced calls"
        axes.axvline(even.calls_per_month, color="gray", linestyle=":", label=label)
    axes.set(xlabel="calls per month", ylabel="US dollars per month", title="Break-even")
    axes.legend(fontsize=7)
