"""`sample` in the simulator, and its other forms, against NumPy in float64 that sorts and loops.

top_p compares a sum with a number: where they lie within 1e-5 the forms, which add in float32 and in different orders,
may keep one token more or less. Such inputs are left out (`decided`). Everything else must agree exactly: the noise is
added once, and every form takes the first among equals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import offmetal
from moelocal import metal
from moelocal.engine.sampling import Sampler, Sampling
from moelocal.ops.op import force
from moelocal.ops.sample import noise_size, portable, reference, sample

FLAGSHIP = 248_320
FORMS: dict[str, Callable[..., mx.array]] = {"metal": sample, "portable": portable, "reference": reference}


def some_x(
    size: int, seed: int = 0, spread: float = 2.0, step: float = 0.0, holes: bool = False
) -> np.ndarray:
    """Values up to 0. `step`: all are multiples of it, so that there are equals; `holes`: some are -inf."""
    random = np.random.default_rng(seed)
    x = random.normal(scale=spread, size=size)
    if step:
        x = np.round(x / step) * step
    x = x.astype(np.float32)
    if holes:
        x[random.random(size) < 0.3] = -np.inf
        x[random.integers(size)] = 1.0
    return x - x.max()


def order_of(x: np.ndarray) -> np.ndarray:
    return np.argsort(-x, kind="stable")


def sums_before(x: np.ndarray, top_k: int) -> np.ndarray:
    """By rank: what the likelier ones among the top_k sum to, of 1."""
    e = np.exp(x[order_of(x)][: top_k or len(x)].astype(np.float64))
    return np.concatenate([[0.0], np.cumsum(e)[:-1]]) / e.sum()


def decided(x: np.ndarray, top_k: int, top_p: float) -> bool:
    return top_p == 1 or bool(np.abs(sums_before(x, top_k) - top_p).min() > 1e-5)


def kept_ids(x: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """What is left, by rank."""
    if top_k >= len(x):
        top_k = 0
    ids = order_of(x)[: top_k or len(x)]
    if top_p < 1:
        count = int((sums_before(x, top_k) < top_p).sum())
        ids = ids[:count] if top_k else ids[x[ids] >= x[ids[count - 1]]]
    # the bound is a float32 number in every form
    lowest = np.float32(math.log(min_p)) if min_p else -np.inf
    return ids[(x[ids] >= lowest) & (x[ids] > -np.inf)]


def draw(form: str, x: np.ndarray, noise: np.ndarray, top_k: int, top_p: float, min_p: float) -> int:
    token = FORMS[form](mx.array(x), mx.array(noise.astype(np.float32)), top_k, top_p, min_p)
    assert token.shape == () and token.dtype == mx.int32
    return int(token.item())


def check(x: np.ndarray, top_k: int, top_p: float, min_p: float, seed: int = 0) -> None:
    """Two draws of each form: with Gumbel noise, and with noise that makes the last one kept win.

    What is kept is what comes first in one order, so its last member tells all of it.
    """
    size = noise_size(len(x), top_k)
    ids = kept_ids(x, top_k, top_p, min_p)
    noise = np.random.default_rng(seed).gumbel(size=size).astype(np.float32)
    scores = x[ids] + (noise[: len(ids)] if size < len(x) else noise[ids])
    for form in FORMS:
        assert draw(form, x, noise, top_k, top_p, min_p) == ids[scores.argmax()], form
    finite = np.maximum(x, -1e3)
    revealing = 1e3 * np.arange(size) if size < len(x) else -1e3 * finite
    last = x[ids] == x[ids[-1]]
    for form in FORMS:
        token = draw(form, x, revealing, top_k, top_p, min_p)
        # by id, equals have equal noise and the lowest id among them is taken
        assert token == (ids[-1] if size < len(x) else ids[last].min()), form


@contextmanager
def recorded():
    """The launches made inside: name, bytes read and bytes written."""
    launches: list[tuple[str, dict[str, dict[str, int]]]] = []

    def executor(name, **kwargs):
        kernel = offmetal.emulated_kernel(name, **kwargs)

        def call(**arguments):
            outputs = kernel(**arguments)
            launches.append((name.removeprefix("moelocal_"), offmetal.last_result.traffic))
            return outputs

        return call

    with metal.executing(executor):
        yield launches


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(20, 0.95, 0.0), (64, 0.8, 0.02), (0, 1.0, 0.05), (0, 0.9, 0.0)]
)
def test_modes(mode: str, top_k: int, top_p: float, min_p: float):
    check(some_x(1003), top_k, top_p, min_p)


@settings(max_examples=60, deadline=None)
@given(
    size=st.one_of(st.integers(1, 70), st.integers(71, 20_000)),
    top_k=st.sampled_from([0, 1, 2, 20, 64, 30_000]),
    top_p=st.sampled_from([1.0, 1e-6, 0.5, 0.8, 0.95, 0.999]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    spread=st.sampled_from([1e-3, 1.0, 4.0, 100.0]),
    step=st.sampled_from([0.0, 0.5]),
    holes=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any(size, top_k, top_p, min_p, spread, step, holes, seed):
    x = some_x(size, seed, spread, step, holes)
    assume(decided(x, top_k if top_k < size else 0, top_p))
    with offmetal.options(allow_unwritten=False):
        check(x, top_k, top_p, min_p, seed)


@pytest.mark.parametrize("top_k", [1, 3, 20, 64])
@pytest.mark.parametrize("size", [300, 8192, 20_001])
def test_equals_at_the_last_place_stay_by_id(size: int, top_k: int):
    check(np.zeros(size, dtype=np.float32), top_k, 1.0, 0.0)
    x = np.full(size, -5.0, dtype=np.float32)
    x[[size - 1, size // 2, size // 2 + 1, 7, 40]] = -1.0  # across lanes, simdgroups and blocks
    x[size // 3] = 0.0
    check(x, top_k, 1.0, 0.0)


def test_equals_at_the_end_of_the_nucleus():
    x = np.log(np.array([0.2, 0.1, 0.2, 0.4, 0.1, 0.0] * 2, dtype=np.float32).clip(1e-9) / 0.4)
    # of 2.0: 0.8 and a half of the four 0.2
    assert kept_ids(x, 11, 0.55, 0.0).tolist() == [3, 9, 0, 2]
    assert kept_ids(x, 0, 0.55, 0.0).tolist() == [3, 9, 0, 2, 6, 8]
    check(x, 11, 0.55, 0.0)
    check(x, 0, 0.55, 0.0)


@pytest.mark.parametrize("size", [300, 5000, 20_001])
@pytest.mark.parametrize("top_p", [0.05, 0.8, 0.99])
def test_nucleus_of_a_whole_vocabulary(size: int, top_p: float):
    for seed in range(3):
        x = some_x(size, seed, spread=8.0, holes=True)
        assert decided(x, 0, top_p)
        check(x, 0, top_p, 0.0)


@pytest.mark.parametrize("top_k", [0, 1, 20, 64])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 1e-6])
def test_one_token_alone(top_k: int, top_p: float):
    x = np.full(20_001, -np.inf, dtype=np.float32)
    x[12_345] = 0.0
    check(x, top_k, top_p, 0.01)


def test_top_p_next_to_1_takes_nothing_that_counts():
    x = np.log(np.array([0.5, 0.3, 0.2] + [1e-30] * 40, dtype=np.float32) / 0.5)
    for top_k in (0, 20):
        assert sorted(kept_ids(x, top_k, 0.999999, 0.0)) == [0, 1, 2]
        check(x, top_k, 0.999999, 0.0)


def test_top_p_of_1_takes_nothing_at_all():
    """Though in float32 the first 20 already sum to 1."""
    x = -np.arange(300, dtype=np.float32)
    for top_k in (0, 64):
        assert len(kept_ids(x, top_k, 1.0, 0.0)) == (top_k or 300)
        check(x, top_k, 1.0, 0.0)


def test_min_p_keeps_what_lies_on_its_bound():
    bound = np.float32(math.log(0.1))
    x = np.zeros(600, dtype=np.float32) - 9
    x[[5, 77, 78, 300]] = [
        0.0,
        bound,
        np.nextafter(bound, np.float32(-9)),
        np.nextafter(bound, np.float32(0)),
    ]
    for top_k in (0, 20):
        assert kept_ids(x, top_k, 1.0, 0.1).tolist() == [5, 300, 77]
        check(x, top_k, 1.0, 0.1)


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("bad", [-np.inf, np.nan])
def test_where_there_is_nothing_to_draw_the_token_is_0(bad: float, top_p: float, top_k: int):
    """The sampler sees by the largest logit that such a token means nothing; a launch must end and stay in bounds."""
    x = np.full(500, bad, dtype=np.float32)
    assert draw("metal", x, np.zeros(noise_size(500, top_k)), top_k, top_p, 0.0) == 0


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(5, 1.0, 0.0), (8, 0.85, 0.0), (0, 1.0, 0.1), (0, 0.8, 0.0), (9, 0.9, 0.07)],
)
def test_draws_follow_the_probabilities(top_k: int, top_p: float, min_p: float):
    """Chi-square of 600 draws with fixed noise, against the value that chance exceeds once in 1000."""
    above_0_1_percent = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3, 8: 26.1, 9: 27.9}
    draws, size = 600, 12
    x = some_x(size, seed=5, spread=1.0)
    ids = kept_ids(x, top_k, top_p, min_p)
    p = np.exp(x[ids].astype(np.float64))
    expected = draws * p / p.sum()
    assert expected.min() > 5  # the approximation by chi-square needs that
    keys = mx.random.split(mx.random.key(3), draws)
    with offmetal.options(checked=False):
        tokens = [
            sample(mx.array(x), mx.random.gumbel((noise_size(size, top_k),), key=key), top_k, top_p, min_p)
            for key in keys
        ]
    counts = np.bincount([token.item() for token in tokens], minlength=size)
    assert counts[ids].sum() == draws
    assert ((counts[ids] - expected) ** 2 / expected).sum() < above_0_1_percent[len(ids) - 1]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=20, top_p=0.95),
        Sampling(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5),
        Sampling(min_p=0.1, logit_bias={4: 2.0}),
        Sampling(top_p=0.9, repetition_penalty=1.2),
    ],
)
def test_a_sampler_draws_the_same_tokens_in_every_form(sampling: Sampling):
    logits = [mx.array(np.random.default_rng(i).normal(size=777).astype(np.float32)) for i in range(12)]
    mask = np.arange(777) < 700

    def tokens(form: str) -> list[int]:
        with force(form):
            sampler = Sampler(sampling, token_mask=mask, seed=11, prompt=[3, 4])
            return [sampler(each).item() for each in logits]

    assert tokens("metal") == tokens("portable") == tokens("reference")


def test_launches_and_bytes_of_the_flagship():
    x = some_x(FLAGSHIP, spread=3.0)
    with recorded() as launches:
        check(x, 20, 0.95, 0.0)
    assert [name for name, _ in launches] == ["sample_top", "sample_draw"] * 2
    top, drawn = launches[0][1], launches[1][1]
    blocks = 31
    assert top["x"]["read"] == top["x"]["touched"] == 4 * FLAGSHIP
    assert top["values"]["written"] == top["ids"]["written"] == 4 * blocks * 20
    assert drawn["values"]["read"] == drawn["ids"]["read"] == 4 * blocks * 20
    assert drawn["token"]["written"] == 4


@pytest.mark.parametrize(("min_p", "top_p", "launches"), [(0.02, 1.0, 2), (0.0, 0.9, 9)])
def test_launches_and_bytes_without_top_k(min_p: float, top_p: float, launches: int):
    size = 20_001
    x = some_x(size, spread=3.0)
    noise = np.random.default_rng(0).gumbel(size=size)
    with recorded() as made:
        draw("metal", x, noise, 0, top_p, min_p)
    assert len(made) == launches
    assert sum(traffic["x"]["read"] for _, traffic in made if "x" in traffic) == 4 * size * (launches - 1)
    # noise is read where a value is kept
    assert made[-2][1]["noise"]["read"] == 4 * len(kept_ids(x, 0, top_p, min_p))


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(64, 0.9, 0.01), (0, 1.0, 0.001), (0, 0.7, 0.0)])
@pytest.mark.parametrize("size", [FLAGSHIP, 300_001])
def test_large_vocabularies(size: int, top_k: int, top_p: float, min_p: float):
    x = some_x(size, spread=8.0)
    assert decided(x, top_k, top_p)
    check(x, top_k, top_p, min_p)


@pytest.mark.falls_back
def test_what_the_kernel_does_not_take():
    def supported(size: int, top_k: int) -> bool:
        return sample.supports(mx.zeros((size,)), mx.zeros((noise_size(size, top_k),)), top_k, 0.9, 0.0)

    assert supported(FLAGSHIP, 64) and supported(FLAGSHIP, 0) and supported(60, 65) and supported(2**19, 1)
    assert not supported(FLAGSHIP, 65) and not supported(2**19 + 1, 1)
    check(some_x(900), 65, 0.9, 0.0)
