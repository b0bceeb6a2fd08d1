"""Logits of the last rows alone are those that all rows have, and leave the same behind."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from close import relative_error
from moelocal.model import Decoder
from parity.checkpoints import Recipe, tokens, write

# one query goes through MLX's attention, many through NumPy's: other orders of adding; measured 2e-6
LIMIT = 2e-5


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_moe"])
@pytest.mark.parametrize("padding", [None, [0, 7]])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_last_rows(tmp_path, family, padding, rows):
    decoder = Decoder.open(write(tmp_path / "model", Recipe(family)))
    sequence = mx.array(np.stack([tokens(60, 320, row) for row in range(len(padding or [0]))]))
    whole, part = decoder.new_cache(padding), decoder.new_cache(padding)
    for first, last in ((0, 50), (50, 60)):
        every = decoder(sequence[:, first:last], whole)
        asked = decoder(sequence[:, first:last], part, rows=rows)
        assert asked.shape[1] == min(rows, last - first)
        assert relative_error(asked, every[:, -rows:]) < LIMIT
    for ours, theirs in zip(part.arrays, whole.arrays, strict=True):
        assert np.array_equal(np.array(ours), np.array(theirs))
