"""Sampling against a NumPy reference in float64 that sorts, loops and hides nothing."""

import math
from collections.abc import Sequence
from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moelocal.engine import sampling as sampling_module
from moelocal.engine.sampling import BAD_LOGITS, Sampler, Sampling, log_probabilities
from moelocal.errors import RequestError
from moelocal.ops import sample as sample_module
from moelocal.ops.sample import SORTED_AT_ONCE

VOCABULARY = 48
DRAWS = 2000


def reference(
    logits: np.ndarray,
    sampling: Sampling,
    mask: np.ndarray | None = None,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
) -> np.ndarray:
    """The distribution [V] that the next token is drawn from."""
    x = logits.astype(np.float64)
    for token in {*prompt, *answer}:
        x[token] *= 1 / sampling.repetition_penalty if x[token] > 0 else sampling.repetition_penalty
    for token in set(answer):
        x[token] -= sampling.frequency_penalty * list(answer).count(token) + sampling.presence_penalty
    for token, bias in sampling.logit_bias.items():
        x[token] += bias
    if mask is not None:
        x[~mask] = -np.inf
    if sampling.temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    p = softmax(x / sampling.temperature)
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
    p[order[before >= sampling.top_p]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def some_logits(size: int = VOCABULARY, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=1.5, size=size).astype(np.float32)


def sampler(sampling: Sampling, mask: np.ndarray | None = None, seed: int = 0, prompt=()) -> Sampler:
    return Sampler(sampling, token_mask=mask, seed=seed, prompt=prompt)


def assert_drawn_from(tokens: Sequence[mx.array], p: np.ndarray) -> None:
    """Bounds the total variation between N draws and `p`.

    Over m possible tokens it is at most sqrt(m / N) / 2 on average (Cauchy-Schwarz), and it exceeds its
    average by e with probability exp(-2 N e^2) at most (McDiarmid): e is chosen for 1e-9.
    """
    counts = np.bincount(np.array(mx.stack(list(tokens))).reshape(-1), minlength=len(p))
    n = counts.sum()
    assert not counts[p == 0].any()
    bound = math.sqrt(np.count_nonzero(p) / n) / 2 + math.sqrt(math.log(1e9) / (2 * n))
    assert np.abs(counts / n - p).sum() / 2 < bound


TRUNCATIONS = {
    "temperature 1": Sampling(),
    "temperature 0.6": Sampling(temperature=0.6),
    "temperature 2": Sampling(temperature=2.0),
    "top_k": Sampling(top_k=5),
    "top_k over the vocabulary": Sampling(top_k=1000),
    "top_p": Sampling(top_p=0.8),
    "min_p": Sampling(min_p=0.1),
    "top_k top_p": Sampling(temperature=0.7, top_k=20, top_p=0.8),
    "top_k min_p": Sampling(top_k=12, min_p=0.2),
    "top_p min_p": Sampling(temperature=1.3, top_p=0.9, min_p=0.15),
    "all": Sampling(temperature=0.8, top_k=15, top_p=0.9, min_p=0.05, logit_bias={3: 2.5, 7: -100.0}),
    "bias": Sampling(logit_bias={0: 3.0, 1: -3.0}),
}


@pytest.mark.parametrize("sampling", TRUNCATIONS.values(), ids=TRUNCATIONS.keys())
def test_draws_follow_the_reference(sampling):
    logits = some_logits()
    mask = np.ones(VOCABULARY, dtype=np.bool_)
    mask[-6:] = False
    draw = sampler(sampling, mask)
    array = mx.array(logits)
    assert_drawn_from([draw(array) for _ in range(DRAWS)], reference(logits, sampling, mask))


@pytest.fixture
def never_sorted(monkeypatch):
    """The paths of a large vocabulary at a size that a test can afford."""
    monkeypatch.setattr(sample_module, "SORTED_AT_ONCE", 0)
    sampling_module._compiled.cache_clear()
    yield
    sampling_module._compiled.cache_clear()


@pytest.mark.parametrize("name", ["top_p", "top_p min_p", "top_k", "top_k top_p", "temperature 0.6"])
def test_draws_follow_the_reference_where_the_vocabulary_is_not_sorted(name, never_sorted):
    logits = some_logits()
    draw = sampler(TRUNCATIONS[name])
    array = mx.array(logits)
    assert_drawn_from([draw(array) for _ in range(DRAWS)], reference(logits, TRUNCATIONS[name]))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(presence_penalty=1.5),
        Sampling(frequency_penalty=0.8),
        Sampling(repetition_penalty=1.7),
        Sampling(presence_penalty=-0.5, frequency_penalty=0.4, repetition_penalty=1.2, top_k=20, top_p=0.9),
    ],
    ids=["presence", "frequency", "repetition", "all"],
)
def test_penalties_count_what_was_sampled(sampling):
    logits, prompt, answer = some_logits(), [4, 5, 5, 9], [7, 11, 7]
    # A row 1000 above the others is sampled whatever the penalties.
    forced = [
        mx.array(np.where(np.arange(VOCABULARY) == token, 1000, 0).astype(np.float32)) for token in answer
    ]
    array, tokens = mx.array(logits), []
    for seed in range(DRAWS // 3):
        draw = sampler(sampling, seed=seed, prompt=prompt)
        for step in forced:
            draw(step)
        tokens.append(draw(array))
    assert_drawn_from(tokens, reference(logits, sampling, prompt=prompt, answer=answer))


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals():
    logits = np.array([0, 3, -1, 3, 2], dtype=np.float32)
    assert sampler(Sampling(temperature=0))(mx.array(logits)).item() == 1
    assert sampler(Sampling(temperature=0, logit_bias={4: 1.5}))(mx.array(logits)).item() == 4


def test_greedy_with_penalties():
    draw = sampler(Sampling(temperature=0, presence_penalty=2.0))
    logits = mx.array([5.0, 4.0, 1.0])
    assert [draw(logits).item() for _ in range(4)] == [0, 1, 0, 0]


def test_a_tiny_temperature_is_greedy():
    logits = some_logits()
    draw = sampler(Sampling(temperature=1e-300))
    assert {draw(mx.array(logits)).item() for _ in range(20)} == {int(logits.argmax())}


@pytest.mark.parametrize("shape", [(VOCABULARY,), (1, VOCABULARY)])
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(top_k=3), Sampling(presence_penalty=1.0)]
)
def test_shape_and_dtype(shape, sampling):
    token = sampler(sampling)(mx.array(some_logits()).reshape(shape))
    assert token.shape == shape[:-1]
    assert token.dtype == mx.int32


sampling_values = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.8]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.8, 0.95, 0.999]),
    top_k=st.sampled_from([0, 1, 2, 5, 20, 40, 1000]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.7, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(sampling_values, st.integers(0, 10_000), st.integers(2, 300), st.booleans())
def test_what_is_left_equals_the_reference(sampling, seed, size, sorts):
    # Values of a permuted grid have no ties, of which any may go.
    grid = np.random.default_rng(seed).permutation(size).astype(np.float32) * np.float32(6 / size)
    p = reference(grid, Sampling(temperature=sampling.temperature, top_k=sampling.top_k))
    sums = np.cumsum(np.sort(p)[::-1])
    assume(np.abs(sums - sampling.top_p).min() > 1e-5 or sampling.top_p == 1)
    kept = p[p > 0] / p.max()
    assume(sampling.min_p in (0, 1) or np.abs(kept - sampling.min_p).min() > 1e-5)

    threshold = sample_module.SORTED_AT_ONCE
    sample_module.SORTED_AT_ONCE = size if sorts else 0
    try:
        x = mx.array((grid - grid.max()) / sampling.temperature)
        values, ids = sample_module.truncated(x, sampling.top_k, sampling.top_p, sampling.min_p)
    finally:
        sample_module.SORTED_AT_ONCE = threshold
    left = np.flatnonzero(np.array(values) > -np.inf)
    if ids is not None:
        left = np.sort(np.array(ids)[left])
    np.testing.assert_array_equal(left, np.flatnonzero(reference(grid, sampling)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(SORTED_AT_ONCE + 1, 30_000), st.sampled_from([1, 2, 20, 64, 700, 4000]), st.integers(0, 99)
)
def test_the_largest_of_a_large_vocabulary(size, count, seed):
    x = np.random.default_rng(seed).permutation(size).astype(np.float32)
    values, ids = sample_module.largest(mx.array(x), count)
    expected = np.argsort(-x)[:count]
    np.testing.assert_array_equal(np.array(ids), expected)
    np.testing.assert_array_equal(np.array(values), x[expected])


@pytest.mark.parametrize("sorts", [True, False])
def test_tokens_as_likely_as_the_last_of_the_nucleus_all_stay(sorts, monkeypatch):
    monkeypatch.setattr(sample_module, "SORTED_AT_ONCE", 4 if sorts else 0)
    x = mx.log(mx.array([0.4, 0.2, 0.2, 0.2], dtype=mx.float32) / 0.4)
    assert sample_module.nucleus_floor(x, 0.5).item() == x[1].item()
    assert sample_module.nucleus_floor(x, 0.39).item() == 0


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(top_k=20, top_p=0.95), Sampling(repetition_penalty=1.3)]
)
def test_a_seed_gives_the_same_tokens_again_and_another_seed_others(sampling):
    logits = [mx.array(some_logits(seed=i)) for i in range(40)]

    def run(seed: int | None) -> list[int]:
        draw = sampler(sampling, seed=seed, prompt=[1, 2])
        return [draw(each).item() for each in logits]

    assert run(7) == run(7)
    assert len({tuple(run(seed)) for seed in (7, 8, -1, 2**64 - 2, 2**40)}) == 5
    assert run(None) != run(None)


def test_a_sampler_does_not_touch_the_global_random_state():
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(5)
    draw = sampler(Sampling(), seed=None)
    mx.eval(draw(mx.array(some_logits())))
    assert mx.random.uniform(shape=(3,)).tolist() == expected


@pytest.mark.parametrize("temperature", [0, 1, 50])
@pytest.mark.parametrize("padding", [1e30, np.nan, np.inf])
def test_rows_without_a_token_are_never_chosen(temperature, padding):
    logits = some_logits()
    mask = np.zeros(VOCABULARY, dtype=np.bool_)
    mask[10:20] = True
    logits[~mask] = padding
    draw = sampler(Sampling(temperature=temperature, logit_bias={0: 100.0, 47: 1e30}), mask)
    tokens = {draw(mx.array(logits)).item() for _ in range(300)}
    assert tokens <= set(range(10, 20))


EVERY_PATH = [
    Sampling(temperature=0),
    Sampling(),
    Sampling(top_k=5),
    Sampling(top_p=0.5),
    Sampling(min_p=0.5),
    Sampling(frequency_penalty=1),
]


@pytest.mark.parametrize("size", [50, SORTED_AT_ONCE + 50])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", EVERY_PATH)
def test_bad_logits_give_the_token_that_says_so(sampling, bad, size):
    logits = some_logits(size)
    logits[size // 2] = bad
    assert sampler(sampling)(mx.array(logits)).item() == BAD_LOGITS


@pytest.mark.parametrize("sampling", EVERY_PATH)
def test_minus_infinity_rules_a_token_out_and_is_bad_only_everywhere(sampling):
    logits = np.full(50, -np.inf, dtype=np.float32)
    assert sampler(sampling)(mx.array(logits)).item() == BAD_LOGITS
    logits[33] = -5
    assert sampler(sampling)(mx.array(logits)).item() == 33


def test_counts_do_not_chain_up():
    """One pending update is all that is alive after a token is read, however many were read before."""
    draw = sampler(Sampling(presence_penalty=0.5, top_k=5))
    logits = mx.array(some_logits())
    held = []
    for step in range(3000):
        draw(logits).item()
        if step in (10, 2999):
            held.append(mx.get_active_memory())
    assert held[1] <= held[0]


@pytest.mark.parametrize("size", [VOCABULARY, SORTED_AT_ONCE + 100])
def test_log_probabilities(size):
    logits = some_logits(size)
    expected = np.log(softmax(logits.astype(np.float64)))
    chosen, ids, values = log_probabilities(mx.array(logits)[None], mx.array([5]), 4)
    order = np.argsort(-logits)[:4]
    # float32 of a sum of a few thousand terms: an error of some 1e-6 in a logarithm of about 8.
    assert abs(chosen.item() - expected[5]) < 1e-5
    assert ids.tolist() == order.tolist()
    np.testing.assert_allclose(np.array(values), expected[order], atol=1e-5)


def test_log_probabilities_list_no_row_without_a_token():
    logits = some_logits()
    mask = np.ones(VOCABULARY, dtype=np.bool_)
    mask[logits.argmax()] = False
    _, ids, _ = log_probabilities(mx.array(logits), mx.array(0), 3, token_mask=mx.array(mask))
    assert ids.tolist() == np.argsort(-logits)[1:4].tolist()
    _, ids, values = log_probabilities(mx.array(logits), mx.array(0), 0)
    assert ids.tolist() == values.tolist() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "sampling: temperature: expected a number from 0, got -0.1"),
        ({"temperature": math.nan}, "sampling: temperature: expected a number from 0, got nan"),
        ({"temperature": True}, "sampling: temperature: expected a number from 0, got True"),
        ({"temperature": "hot"}, "sampling: temperature: expected a number from 0, got 'hot'"),
        ({"top_p": 0}, "sampling: top_p: expected a number above 0, at most 1, got 0"),
        ({"top_p": 1.1}, "sampling: top_p: expected a number above 0, at most 1, got 1.1"),
        ({"top_k": -1}, "sampling: top_k: expected an integer from 0 (0: off), got -1"),
        ({"top_k": 2.5}, "sampling: top_k: expected an integer from 0 (0: off), got 2.5"),
        ({"min_p": 1.5}, "sampling: min_p: expected a number from 0 to 1, got 1.5"),
        ({"presence_penalty": math.inf}, "sampling: presence_penalty: expected a finite number, got inf"),
        ({"frequency_penalty": None}, "sampling: frequency_penalty: expected a finite number, got None"),
        ({"repetition_penalty": 0}, "sampling: repetition_penalty: expected a number above 0, got 0"),
        ({"logit_bias": [1]}, "sampling: logit_bias: expected a mapping of token id to number, got [1]"),
        ({"logit_bias": {"1": 1.0}}, "sampling: logit_bias: expected token ids, integers from 0, got '1'"),
        ({"logit_bias": {1: math.inf}}, "sampling: logit_bias[1]: expected a finite number, got inf"),
    ],
)
def test_values_that_no_sampling_has(values, message):
    with pytest.raises(RequestError) as caught:
        Sampling(**values)
    assert str(caught.value) == message


def test_from_defaults():
    assert Sampling.from_defaults({"top_k": 20, "top_p": 0.95}) == Sampling(top_k=20, top_p=0.95)
    with pytest.raises(RequestError) as caught:
        Sampling.from_defaults({"temprature": 0.5, "top_k": 3})
    names = ", ".join(each.name for each in fields(Sampling))
    assert str(caught.value) == f"sampling: unknown field 'temprature'; known are {names}"


def test_a_bias_outside_the_vocabulary_and_a_seed_that_is_no_integer():
    with pytest.raises(RequestError) as caught:
        sampler(Sampling(logit_bias={VOCABULARY: 1.0}))(mx.array(some_logits()))
    assert str(caught.value) == "sampling: logit_bias: expected token ids below 48, got 48"
    with pytest.raises(RequestError) as caught:
        Sampler(Sampling(), token_mask=None, seed=1.5, prompt=[])
    assert str(caught.value) == "seed: expected an integer or None, got 1.5"


def test_a_sampling_does_not_change_with_the_mapping_that_it_was_made_of():
    bias = {1: 1.0}
    sampling = Sampling(logit_bias=bias)
    bias[2] = 5.0
    assert sampling.logit_bias == {1: 1.0}
