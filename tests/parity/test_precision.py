"""The same network in every compute dtype and every form of its ops, against the recorded float32 logits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from moelocal.ops.op import force
from parity.checkpoints import tokens
from parity.ours import Ours, assert_same
from parity.record import GOLDEN, LENGTH, RECIPES

# compiling a step for the CPU costs seconds per recipe and dtype where MLX has not compiled it before
LIGHT = ("qwen3_5_moe-odd-sizes", "qwen3_moe")
NAMES = [pytest.param(name, marks=() if name in LIGHT else pytest.mark.slow) for name in RECIPES]


@pytest.mark.parametrize("form", ["reference", "portable", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_the_ops_gives_the_recorded_logits(name, form, raw):
    recorded = np.load(GOLDEN / f"{name}.npz")["logits"]
    ours, sequence = Ours(raw(RECIPES[name])), tokens(LENGTH, RECIPES[name].vocab)
    with force(form):
        assert_same(ours.logits(sequence), recorded)
        assert_same(ours.chunked(sequence, [40]), recorded)


# Mean |difference of logits| to float32, on logits of standard deviation 1.6. A random net amplifies rounding, so
# the likeliest token is no measure. Measured on the CPU: at most 0.049 and 0.0060; bfloat16 keeps 8 bits, float16 11.
MEAN = {mx.bfloat16: 0.1, mx.float16: 0.0125}


@pytest.mark.parametrize("dtype", MEAN, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits_stay_near(name, dtype, raw):
    recorded = np.load(GOLDEN / f"{name}.npz")["logits"]
    ours, sequence = Ours(raw(RECIPES[name]), dtype), tokens(LENGTH, RECIPES[name].vocab)
    for logits in (ours.logits(sequence), ours.chunked(sequence, [40])):
        assert logits.dtype == np.float32
        difference = np.abs(logits - recorded).mean()
        assert difference < MEAN[dtype]
