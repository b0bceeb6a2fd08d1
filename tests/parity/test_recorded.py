"""Our logits against those that transformers gave on the same weights (record.py). Needs neither torch nor
transformers."""

from __future__ import annotations

import numpy as np
import pytest

from parity.checkpoints import tokens
from parity.ours import Ours, assert_same
from parity.record import GOLDEN, LENGTH, RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_logits_equal_the_recorded_ones(name, raw):
    recipe = RECIPES[name]
    recorded = np.load(GOLDEN / f"{name}.npz")["logits"]
    ours, sequence = Ours(raw(recipe)), tokens(LENGTH, recipe.vocab)
    assert_same(ours.logits(sequence), recorded)
    assert_same(ours.chunked(sequence, [7, 1, 30]), recorded)


def test_a_missing_one_in_the_norms_would_show(raw, monkeypatch):
    # the control of this file: the same check on a deliberately wrong model fails by far
    import moelocal.checkpoint.names as names

    monkeypatch.setattr(names, "_NORMS", names._NORMS[1:])
    recipe = RECIPES["qwen3_5_moe"]
    recorded = np.load(GOLDEN / "qwen3_5_moe.npz")["logits"]
    wrong = Ours(raw(recipe)).logits(tokens(LENGTH, recipe.vocab))
    assert np.abs(wrong - recorded).max() > 0.1
