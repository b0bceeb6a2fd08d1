"""Logits against transformers (float32, plain PyTorch attention), the implementation that the models were
released with."""

from __future__ import annotations

import numpy as np
import pytest

from parity.checkpoints import Recipe, tokens
from parity.ours import Ours, assert_same

# the originals warn about themselves
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# three value heads to one of keys, Dk != Dv, unequal heads, sizes that no tile divides
ODD = {
    "hidden": 96, "heads": 6, "kv_heads": 2, "head_dim": 24, "key_heads": 2, "value_heads": 6, "key_dim": 24,
    "value_dim": 40, "experts": 11, "per_token": 3, "width": 56, "shared_width": 80, "vocab": 301,
}  # fmt: skip

RECIPES = {
    "qwen3_5_moe": Recipe("qwen3_5_moe", layers=8),
    "qwen3_5_moe bfloat16 as Qwen3.5": Recipe("qwen3_5_moe", dtype="BF16", sensitive="F32"),
    "qwen3_5_moe bfloat16 as Qwen3.6": Recipe("qwen3_5_moe", dtype="BF16", sensitive="BF16"),
    "qwen3_5_moe text only": Recipe("qwen3_5_moe", text_only=True, mtp=False),
    "qwen3_5_moe text only, expert by expert": Recipe("qwen3_5_moe", text_only=True, per_expert=True),
    "qwen3_5_moe odd sizes": Recipe("qwen3_5_moe", **ODD),
    "qwen3_5_moe one key head, one expert per token": Recipe(
        "qwen3_5_moe", key_heads=1, kv_heads=1, per_token=1
    ),
    "qwen3_5_moe yarn": Recipe("qwen3_5_moe", rope=YARN, context=256),
    "qwen3_5 tied": Recipe("qwen3_5", layers=8, tied=True),
    "qwen3_5 untied": Recipe("qwen3_5"),
    "qwen3_5 text only": Recipe("qwen3_5", text_only=True, tied=True),
    "qwen3_5 odd sizes": Recipe("qwen3_5", **ODD),
    "qwen3_5 yarn": Recipe("qwen3_5", rope=YARN, context=256),
    "qwen3_next": Recipe("qwen3_next", layers=8),
    "qwen3_next expert weights not normalised": Recipe("qwen3_next", normalize=False),
    "qwen3_next odd sizes": Recipe("qwen3_next", **ODD),
    "qwen3_next yarn": Recipe("qwen3_next", rope=YARN, context=256),
    "qwen3_moe": Recipe("qwen3_moe", layers=8),
    "qwen3_moe expert weights not normalised": Recipe("qwen3_moe", normalize=False),
    "qwen3_moe odd sizes": Recipe("qwen3_moe", **ODD),
    "qwen3_moe yarn": Recipe("qwen3_moe", rope=YARN, context=256),
}
# longer than the chunks of 64 in which transformers computes the delta net, and than the range of YARN
LENGTH = 151


@pytest.fixture(scope="module", params=RECIPES)
def case(request, raw, originals):
    """(transformers, ours, tokens) on one recipe."""
    recipe = RECIPES[request.param]
    folder = raw(recipe)
    return originals(folder), Ours(folder), tokens(LENGTH, recipe.vocab)


def test_full_forward(case):
    theirs, ours, sequence = case
    assert_same(ours.logits(sequence), theirs.logits(sequence))


def test_cached_decode(case):
    theirs, ours, sequence = case
    expected = theirs.stepwise(sequence[:90], 71)
    assert_same(ours.chunked(sequence[:90], [71]), expected)


def test_decode_from_the_first_token(case):
    theirs, ours, sequence = case
    assert_same(ours.chunked(sequence[:12], [1]), theirs.logits(sequence[:12]))


def test_odd_chunks_and_steps_equal_one_pass(case):
    _, ours, sequence = case
    whole = ours.logits(sequence)
    # one implementation, other shapes of the products: a fifth of the bound between two implementations
    assert_same(ours.chunked(sequence, [7, 64, 1, 30, 2, 33]), whole, most=1e-3, mean=2e-5)


def test_rows_of_a_left_padded_batch_equal_the_rows_alone(case):
    theirs, ours, sequence = case
    rows = [sequence[:60], sequence[60:77], sequence[77:78], sequence[100:141]]
    for row, together in zip(rows, ours.padded(rows, steps=0), strict=True):
        assert_same(together, ours.logits(row), most=1e-3, mean=2e-5)
        assert_same(together, theirs.logits(row))


def test_decode_in_a_left_padded_batch(case):
    _, ours, sequence = case
    rows = [sequence[:40], sequence[40:66], sequence[66:75]]
    for row, together in zip(rows, ours.padded(rows, steps=5), strict=True):
        assert_same(together, ours.logits(row), most=1e-3, mean=2e-5)


def test_only_the_rows_asked_for_are_computed(case):
    import mlx.core as mx

    _, ours, sequence = case
    whole = ours.logits(sequence)
    for rows in (1, 3):
        last = np.array(ours.model(mx.array(sequence)[None], ours.model.new_cache(), rows=rows)[0])
        assert_same(last, whole[-rows:], most=1e-3, mean=2e-5)


def test_the_control_fails_where_yarn_is_forgotten(raw, originals):
    recipe = RECIPES["qwen3_5_moe yarn"]
    plain = Recipe("qwen3_5_moe", context=256)
    sequence = tokens(LENGTH, recipe.vocab)
    with pytest.raises(AssertionError, match="difference"):
        assert_same(Ours(raw(plain)).logits(sequence), originals(raw(recipe)).logits(sequence))


@pytest.mark.slow
def test_error_does_not_grow_over_1500_tokens(raw, originals):
    recipe = Recipe("qwen3_5_moe", layers=8)
    sequence = tokens(1500, recipe.vocab)
    assert_same(Ours(raw(recipe)).logits(sequence), originals(raw(recipe)).logits(sequence), routing_ties=2)
