"""Divergence, acceptance and agreement against an independent computation with the full distributions in float64."""

from __future__ import annotations

from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.evaluate.distribution import MOST, NEGLIGIBLE, Distributions, Scores, joined


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def exact(reference: np.ndarray, model: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """From the definitions, over every token."""
    logp, logq = log_softmax(reference), log_softmax(model)
    p, q = np.exp(logp), np.exp(logq)
    at = np.arange(len(targets)), targets
    return {
        "kl": (p * (logp - logq)).sum(-1),
        "acceptance": np.minimum(p, q).sum(-1),
        "nll": -logq[at],
        "reference_nll": -logp[at],
    }


def compared(reference: np.ndarray, model: np.ndarray, targets: np.ndarray) -> Scores:
    ids = mx.array(targets)
    return Distributions.of(mx.array(reference), ids).compare(0, mx.array(model), ids)


def random_pair(rows: int, vocab: int, spread: float, noise: float, seed: int) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(seed)
    reference = (spread * random.normal(size=(rows, vocab))).astype(np.float32)
    model = (reference + noise * random.normal(size=reference.shape)).astype(np.float32)
    return reference, model, random.integers(0, vocab, rows)


@given(
    rows=st.integers(1, 12),
    vocab=st.integers(2, MOST),
    spread=st.floats(0, 40),
    noise=st.floats(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_small_vocabularies_are_exact(rows, vocab, spread, noise, seed):
    reference, model, targets = random_pair(rows, vocab, spread, noise, seed)
    found, expected = compared(reference, model, targets), exact(reference, model, targets)
    # float32 logits and log-probabilities have steps of up to 8e-6 at 100; a mass of 2^-20 may be in the tail bin
    assert np.all(np.abs(found.nll - expected["nll"]) < 2e-5)
    assert np.all(np.abs(found.reference_nll - expected["reference_nll"]) < 2e-5)
    missing = expected["kl"] - found.kl
    assert np.all(missing > -2e-5) and np.all(missing < found.kl_slack + 2e-5)
    too_high = found.acceptance - expected["acceptance"]
    assert np.all(too_high > -2e-5) and np.all(too_high < found.acceptance_slack + 2e-5)
    assert np.all(found.acceptance_slack <= NEGLIGIBLE * 1.001)


@given(
    vocab=st.integers(MOST + 1, 4000),
    spread=st.floats(0, 20),
    noise=st.floats(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_of_large_ones_what_the_tail_hides_is_within_the_slack(vocab, spread, noise, seed):
    reference, model, targets = random_pair(6, vocab, spread, noise, seed)
    found, expected = compared(reference, model, targets), exact(reference, model, targets)
    missing = expected["kl"] - found.kl
    assert np.all(missing > -2e-5) and np.all(missing < found.kl_slack + 2e-5)
    too_high = found.acceptance - expected["acceptance"]
    assert np.all(too_high > -2e-5) and np.all(too_high < found.acceptance_slack + 2e-5)


def test_small_divergences_are_exact_to_a_relative_thousandth():
    # smaller than those of an 8-bit quantization
    reference, model, targets = random_pair(200, 800, 4.0, 0.005, 1)
    found, expected = compared(reference, model, targets), exact(reference, model, targets)
    assert 1e-6 < expected["kl"].mean() < 1e-5
    assert found.kl.mean() == pytest.approx(expected["kl"].mean(), rel=1e-3)


@given(vocab=st.integers(2, 3000), spread=st.floats(0, 50), seed=st.integers(0, 2**32 - 1))
def test_a_distribution_is_at_no_distance_from_itself(vocab, spread, seed):
    reference, _, targets = random_pair(5, vocab, spread, 0.0, seed)
    found = compared(reference, reference, targets)
    assert np.array_equal(found.kl, np.zeros(5))
    assert np.array_equal(found.top1, np.ones(5))
    assert np.allclose(found.acceptance, 1, rtol=0, atol=1e-14)  # the rounding of a float64 sum
    assert np.array_equal(found.nll, found.reference_nll)


@given(vocab=st.integers(2, 2000), spread=st.floats(0, 30), noise=st.floats(0, 30), seed=st.integers(0, 999))
def test_divergence_is_never_negative_and_acceptance_never_above_one(vocab, spread, noise, seed):
    found = compared(*random_pair(5, vocab, spread, noise, seed))
    assert np.all(found.kl >= -1e-14) and np.all(found.acceptance <= 1 + 1e-14)
    assert np.all(np.isfinite([getattr(found, f.name) for f in fields(found)]))


def test_agreement_counts_equal_likeliest_tokens():
    reference = np.array([[0, 3, 1], [5, 1, 1], [0, 0, 2], [1, 1, 0]], np.float32)
    model = np.array([[0, 2, 9], [9, 1, 1], [0, 0, 1], [2, 2, 3]], np.float32)
    assert compared(reference, model, np.zeros(4, int)).top1.tolist() == [0, 1, 1, 0]


def test_what_is_kept_are_the_likeliest_down_to_a_millionth_and_at_most_1024():
    random = np.random.default_rng(3)
    flat, steep = random.normal(size=(4, 5000)) * 0.1, random.normal(size=(4, 5000)) * 9
    logits = np.concatenate([flat, steep]).astype(np.float32)
    kept = Distributions.of(mx.array(logits), mx.array(np.zeros(8, np.int32)))
    p = np.exp(log_softmax(logits))
    assert kept.counts[:4].tolist() == [MOST] * 4
    starts = np.concatenate([[0], kept.counts.cumsum(dtype=int)])
    for row in range(8):
        ids = kept.ids[starts[row] : starts[row + 1]]
        count = int(kept.counts[row])
        by_mass = np.argsort(-p[row], kind="stable")
        assert set(ids) == set(by_mass[:count])
        outside = np.delete(p[row], ids).sum()
        assert np.exp(float(kept.tails[row])) == pytest.approx(outside, rel=1e-4)
        if count < MOST:
            # enough, and one fewer would not be
            assert outside <= NEGLIGIBLE < outside + p[row][by_mass[count - 1]]
    assert kept.counts[4:].max() < 600
    assert kept.top.tolist() == logits.argmax(1).tolist()


def test_one_token_may_be_all_that_is_kept():
    logits = np.zeros((2, 50), np.float32)
    logits[0, 7] = 1000.0  # nothing is left for the others
    logits[1, 9] = 25.0
    kept = Distributions.of(mx.array(logits), mx.array([0, 0]))
    assert kept.counts.tolist() == [1, 1] and kept.ids.tolist() == [7, 9]
    found = kept.compare(0, mx.array(logits), mx.array([0, 0]))
    assert np.array_equal(found.kl, [0, 0])


def test_a_model_that_rules_out_the_certain_token_is_far_away_not_infinitely():
    reference = np.zeros((1, 50), np.float32)
    reference[0, 7] = 100.0
    found = compared(reference, -reference, np.array([7]))
    assert found.kl[0] == pytest.approx(100 + np.log(49), rel=1e-6)
    assert found.acceptance[0] < 1e-6


def test_positions_are_compared_where_they_begin():
    reference, model, targets = random_pair(30, 500, 3.0, 1.0, 4)
    kept = Distributions.of(mx.array(reference), mx.array(targets))
    parts = [
        kept.compare(first, mx.array(model[first:last]), mx.array(targets[first:last]))
        for first, last in ((0, 11), (11, 12), (12, 30))
    ]
    whole = kept.compare(0, mx.array(model), mx.array(targets))
    for field in fields(Scores):
        assert np.allclose(getattr(joined(parts), field.name), getattr(whole, field.name), rtol=0, atol=1e-12)


def test_chunks_of_a_reference_are_joined():
    reference, model, targets = random_pair(30, 500, 3.0, 1.0, 5)
    kept = joined(
        [
            Distributions.of(mx.array(reference[first:last]), mx.array(targets[first:last]))
            for first, last in ((0, 11), (11, 12), (12, 30))
        ]
    )
    found = kept.compare(0, mx.array(model), mx.array(targets))
    expected = exact(reference, model, targets)
    assert np.allclose(found.kl, expected["kl"], rtol=0, atol=1e-5)
