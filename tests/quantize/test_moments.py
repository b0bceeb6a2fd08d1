"""Moments of inputs: sums over texts, and what experts with few tokens borrow."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from moelocal.errors import NumericsError
from moelocal.quantize.moments import SHRINKAGE, Sums, moments_of, shrunk

RNG = np.random.default_rng(1)
OURS, THEIRS = (RNG.standard_normal((70, 8)).astype(np.float32) for _ in range(2))
# float32 sums of 70 products
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def test_texts_add_up():
    sums = Sums("here")
    for part in (slice(0, 30), slice(30, 31), slice(31, 70)):
        sums.add(mx.array(THEIRS[None, part]), mx.array(OURS[None, part]))
    found = sums.moments()
    assert np.allclose(found.inputs[0], OURS.T @ OURS, **CLOSE) and found.outputs is None
    assert np.allclose(found.crossed[0], THEIRS.T @ OURS, **CLOSE)
    wanted = sums.moments(outputs=True)
    assert wanted.crossed is None and mx.array_equal(wanted.outputs, found.crossed)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_an_error(bad):
    with pytest.raises(NumericsError) as caught:
        Sums("/model: layer 3").add(mx.array(THEIRS), mx.array(OURS * bad).astype(mx.bfloat16))
    assert str(caught.value) == (
        "/model: layer 3: NaN or infinite activations while calibrating in bfloat16: its weights are damaged, or too "
        "large for that"
    )


@pytest.mark.parametrize("tokens", [1, 20, 70])
def test_few_tokens_borrow_from_all(tokens):
    own, everywhere = OURS[:tokens], moments_of(mx.array(THEIRS), mx.array(OURS))
    found = shrunk(moments_of(mx.array(THEIRS[:tokens]), mx.array(own)), tokens, everywhere)
    scale = np.trace(own.T @ own) / np.trace(OURS.T @ OURS)
    pairs = ((found.inputs, own, OURS), (found.crossed, THEIRS[:tokens], THEIRS))
    for got, left, all_left in pairs:
        expected = tokens * (left.T @ own) + SHRINKAGE * scale * (all_left.T @ OURS)
        assert np.allclose(got[0], expected / (tokens + SHRINKAGE), **CLOSE)


def test_without_all_they_borrow_white_inputs():
    found = shrunk(moments_of(mx.array(THEIRS), mx.array(OURS)), 70, None)
    white = np.eye(8) * np.trace(OURS.T @ OURS) / 8
    for got, left in ((found.inputs, OURS), (found.crossed, THEIRS)):
        expected = (70 * (left.T @ OURS) + SHRINKAGE * white) / (70 + SHRINKAGE)
        assert np.allclose(got[0], expected, **CLOSE)


def test_no_tokens_take_those_of_all():
    everywhere = moments_of(mx.array(THEIRS), mx.array(OURS))
    found = shrunk(moments_of(mx.zeros((0, 8)), mx.zeros((0, 8))), 0, everywhere)
    assert mx.array_equal(found.inputs, everywhere.inputs) and mx.array_equal(
        found.crossed, everywhere.crossed
    )
