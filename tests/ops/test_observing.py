"""`observing`: who calls which op with what."""

from __future__ import annotations

import mlx.core as mx
import pytest

from moelocal.ops.op import Op, force, observing

double = Op("double", reference=lambda x: x + x, portable=lambda x: 2 * x)
twice = Op("twice", reference=lambda x: double(double(x)), portable=lambda x: double(double(x)))


def names(run, *, forms="auto") -> list[str]:
    seen: list[str] = []
    with force(forms), observing(lambda op, args: seen.append(op.name)):
        run()
    return seen


def test_every_call_is_seen_before_it_runs_with_its_arguments():
    seen = []
    with observing(lambda op, args: seen.append((op, args))):
        assert double(3) == 6
    assert seen == [(double, (3,))]
    double(4)
    assert len(seen) == 1  # outside the block nobody looks


@pytest.mark.parametrize("form", ["auto", "reference", "portable", "metal"])
def test_whatever_form_it_takes_and_whoever_calls(form):
    assert names(lambda: twice(1), forms=form) == ["twice", "double", "double"]


def test_what_the_observer_calls_is_not_observed():
    results = []
    with observing(lambda op, args: results.append(double(*args))):
        double(2)
        double(5)
    assert results == [4, 10]


def test_the_inner_block_counts_and_the_outer_one_comes_back():
    outer, inner = [], []
    with observing(lambda op, args: outer.append(args)):
        double(1)
        with observing(lambda op, args: inner.append(args)):
            double(2)
        double(3)
    assert (outer, inner) == ([(1,), (3,)], [(2,)])


def test_an_error_of_the_observer_passes_and_ends_the_observation():
    def refuse(op, args):
        raise ValueError("seen")

    with pytest.raises(ValueError, match="seen"), observing(refuse):
        double(1)
    assert double(mx.array(2)).item() == 4
