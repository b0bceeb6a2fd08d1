"""Attention: every form against the reference."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from close import relative_error
from moelocal.ops import attend

# float32 softmax sums in another order; measured 6e-7
LIMIT = 1e-5


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    ratio=st.integers(1, 4),
    queries=st.integers(1, 300),
    before=st.integers(0, 70),
    size=st.sampled_from([8, 24, 64]),
    gated=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_all_forms_agree(batch, groups, ratio, queries, before, size, gated, seed):
    mx.random.seed(seed)
    q = mx.random.normal((batch, groups * ratio, queries, size)) * 3
    k, v = (mx.random.normal((batch, groups, before + queries, size)) for _ in range(2))
    # as the projection leaves it, beside the queries
    gate = mx.random.normal((batch, queries, groups * ratio, 2 * size))[..., size:] if gated else None
    expected = attend.reference(q, k, v, size**-0.5, None, gate)
    assert expected.shape == (batch, queries, groups * ratio * size)
    assert relative_error(attend.portable(q, k, v, size**-0.5, None, gate), expected) < LIMIT
    assert relative_error(attend.host(q, k, v, size**-0.5, None, gate), expected) < LIMIT


FORMS = ("reference", "portable", "host")


@pytest.mark.parametrize("form", FORMS)
def test_heads_lie_side_by_side_and_each_has_its_gate(form):
    # one key: softmax is 1 and every head gives its group's value
    q, k, v = mx.ones((2, 4, 1, 8)), mx.ones((2, 2, 1, 8)), mx.random.normal((2, 2, 1, 8))
    gate = mx.random.normal((2, 1, 4, 8)) * 100
    got = getattr(attend, form)(q, k, v, 1.0, None, gate).reshape(2, 1, 4, 8)
    expected = mx.repeat(v[:, :, 0], 2, axis=1)[:, None] * mx.sigmoid(gate)
    assert relative_error(got, expected) < LIMIT


@pytest.mark.parametrize("form", FORMS[:2])
def test_padding_is_not_seen(form):
    q, k, v = (mx.random.normal((1, 2, 20, 16)) for _ in range(3))
    gate = mx.random.normal((1, 20, 2, 16))
    run = getattr(attend, form)
    padded = run(q, k, v, 0.25, mx.array([6]), gate)
    alone = run(q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], 0.25, None, gate[:, 6:])
    assert relative_error(padded[:, 6:], alone) < LIMIT
    assert not mx.any(mx.isnan(padded)).item()


def test_a_query_does_not_see_what_follows():
    q, k, v = (mx.random.normal((1, 2, 300, 16)) for _ in range(3))
    changed = mx.concatenate([v[:, :, :299], v[:, :, 299:] + 5], axis=2)
    for form in (attend.reference, attend.portable, attend.host):
        one, other = (form(q, k, values, 0.25, None, None)[:, :299] for values in (v, changed))
        assert mx.all(one == other).item()
