"""The picture of the break-even says what the report says."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from moelocal.cost.local import BreakEven
from moelocal.cost.plot import break_even


def drawn(most_calls: float | None, calls: float = 1000.0) -> dict[str, tuple[list[float], list[float]]]:
    """The lines by their names: 3600 dollars over 3 years are 100 a month; a call takes 0.2 there and 0.1 here."""
    axes = Figure().subplots()
    break_even(axes, BreakEven(3600.0, 3.0, 0.2, 0.1, calls, 1.0, most_calls, 500.0, 1.0))
    return {str(each.get_label()): (list(each.get_xdata()), list(each.get_ydata())) for each in axes.lines}


def test_the_line_of_the_machine_ends_where_it_can_take_no_more():
    lines = drawn(1500.0)
    assert lines["API"] == ([0.0, 2000.0], [0.0, pytest.approx(400.0)])
    assert lines["this machine, and energy"] == ([0.0, 1500.0], [100.0, pytest.approx(250.0)])
    assert lines["no more than 1,500 calls fit into a month"] == ([1500.0], [pytest.approx(250.0)])
    assert "break-even: 1,000 calls" in lines and "this log: 500 priced calls" in lines


def test_a_break_even_that_the_machine_cannot_reach_is_named_so():
    lines = drawn(800.0)
    assert lines["this machine, and energy"][0] == [0.0, 800.0]
    assert "break-even: 1,000 calls, out of this machine's reach" in lines


@pytest.mark.parametrize("most_calls", [None, 5000.0])
def test_a_machine_that_can_take_more_than_is_drawn_has_no_end(most_calls):
    lines = drawn(most_calls)
    assert lines["this machine, and energy"][0] == [0.0, 2000.0]
    assert len(lines) == 4
