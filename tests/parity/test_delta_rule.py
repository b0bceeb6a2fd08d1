"""The recurrence of `ops.delta` against the chunked form of transformers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from moelocal.ops import delta

pytestmark = pytest.mark.parity

# float32 sums over 150 positions in another order; measured 1e-6 on outputs and states of about 1
LIMIT = 2e-5


@pytest.mark.parametrize("form", ["reference", "portable", "host"])
@pytest.mark.parametrize(("time", "key_dim", "value_dim"), [(1, 32, 32), (63, 16, 24), (150, 32, 16)])
def test_transformers_computes_the_same_chunked(form, time, key_dim, value_dim):
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import torch_chunk_gated_delta_rule

    rng = np.random.default_rng(time)
    heads = 3  # transformers repeats the key heads before the rule

    def unit(a: np.ndarray) -> np.ndarray:
        return a / np.linalg.norm(a, axis=-1, keepdims=True)

    q, k = (unit(rng.standard_normal((2, time, heads, key_dim))).astype(np.float32) for _ in range(2))
    v = rng.standard_normal((2, time, heads, value_dim)).astype(np.float32)
    log_decay = (-3 * rng.random((2, time, heads)) ** 2).astype(np.float32)
    beta = rng.random((2, time, heads)).astype(np.float32)
    state = rng.standard_normal((2, heads, value_dim, key_dim)).astype(np.float32)
    # it scales q by Dk^-½ itself, and keeps the state as [Dk, Dv]
    expected, after = torch_chunk_gated_delta_rule(
        *(torch.from_numpy(a) for a in (q, k, v)),
        g=torch.from_numpy(log_decay),
        beta=torch.from_numpy(beta),
        initial_state=torch.from_numpy(state.swapaxes(-1, -2).copy()),
        output_final_state=True,
    )
    arguments = (q * key_dim**-0.5, k, v, log_decay, beta, state)
    if form == "host":
        got, new = delta.host(*arguments, None)
    else:
        got, new = (np.array(a) for a in getattr(delta, form)(*(mx.array(a) for a in arguments), None))
    assert np.abs(got - expected.numpy()).max() < LIMIT
    assert np.abs(new.swapaxes(-1, -2) - after.numpy()).max() < LIMIT
