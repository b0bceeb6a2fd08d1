"""The gated delta rule (Yang et al., arXiv 2412.06464; equations as in transformers' qwen3_5 and the family's cards).

Per value head, with key head h // (Hv / Hk), state S [Dv, Dk] in float32:
    S ← g_t S;  δ = β_t (v_t − S k_t);  S ← S + δ k_tᵀ;  o_t = S q_t          with  log g_t = `log_decay`
q, k [B, T, Hk, Dk] (normalised); v [B, T, Hv, Dv]; log_decay, beta [B, T, Hv]; all float32; state [B, Hv, Dv, Dk];
`valid` bool [B, T] marks the positions that are no padding, or None: padding leaves the state as it is.
-> o [B, T, Hv, Dv], the state after the last position.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from moelocal.ops.host import Host, borrow
from moelocal.ops.op import Op


def reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array,
    valid: mx.array | None,
) -> tuple[mx.array, mx.array]:
    ratio = v.shape[2] // k.shape[2]
    q, k = (mx.repeat(a, ratio, axis=2) for a in (q, k))
    decay, outputs = mx.exp(log_decay), []
    for t in range(q.shape[1]):
        decayed = state * decay[:, t, :, None, None]
        recalled = mx.sum(decayed * k[:, t, :, None, :], axis=-1)
        delta = beta[:, t, :, None] * (v[:, t] - recalled)
        updated = decayed + delta[..., None] * k[:, t, :, None, :]
        if valid is not None:
            updated = mx.where(valid[:, t, None, None, None], updated, state)
        state = updated
        outputs.append(mx.sum(state * q[:, t, :, None, :], axis=-1))
    return mx.stack(outputs, axis=1), state


def portable(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array,
    valid: mx.array | None,
) -> tuple[mx.array, mx.array]:
    out, new = mx.fast.gated_delta_update(q, k, v, mx.exp(log_decay), beta, state, mask=valid)
    return out, new


CHUNK = 32
"""Positions that the host form solves at once."""


def host(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array,
    valid: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """The chunked form (same paper, section 3.3): within a chunk, with G_t the product of decays up to t,
    (I + diag(β) tril(G_t/G_s · k_t·k_s, −1)) Δ = diag(β) (V − diag(G) K S₀ᵀ) is solved for all δ at once."""
    mx.eval(q, k, v, log_decay, beta, state)
    time, ratio = q.shape[1], v.shape[2] // k.shape[2]
    gate = np.ones((q.shape[0], time), np.float32) if valid is None else np.asarray(valid).astype(np.float32)
    short = -time % CHUNK  # padding to whole chunks, with β = 0 and no decay: the state passes through

    def chunks(a: Host, repeat: int = 1) -> Host:
        a = np.pad(a, [(0, 0), (0, short)] + [(0, 0)] * (a.ndim - 2))
        a = a.reshape(a.shape[0], -1, CHUNK, *a.shape[2:]).swapaxes(2, 3)
        return np.repeat(a, repeat, axis=2) if repeat > 1 else a

    hq, hk, hv = chunks(borrow(q), ratio), chunks(borrow(k), ratio), chunks(borrow(v))  # [B, N, Hv, C, D]
    hb = chunks(borrow(beta) * gate[..., None])  # [B, N, Hv, C]
    log_g = np.cumsum(chunks(borrow(log_decay) * gate[..., None]), axis=-1)
    lower = np.tri(CHUNK, dtype=bool)
    # for s <= t the exponent is at most 0; above the diagonal it would overflow
    ratio_g = np.exp(np.where(lower, log_g[..., :, None] - log_g[..., None, :], -np.inf))
    g = np.exp(log_g)[..., None]
    system = hb[..., None] * ratio_g * (hk @ hk.swapaxes(-1, -2))
    system[..., ~np.tri(CHUNK, k=-1, dtype=bool)] = 0
    system += np.eye(CHUNK, dtype=np.float32)
    right = np.concatenate([hb[..., None] * hv, hb[..., None] * g * hk], axis=-1)
    solved = np.linalg.solve(system, right)
    own, from_state = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    within = ratio_g * (hq @ hk.swapaxes(-1, -2))
    to_end = np.exp(log_g[..., -1:] - log_g)[..., None] * hk
    decayed_q, last = g * hq, g[..., -1:, :]
    s = np.array(borrow(state))
    out = np.empty_like(hv)
    for n in range(out.shape[1]):
        delta = own[:, n] - from_state[:, n] @ s.swapaxes(-1, -2)
        out[:, n] = decayed_q[:, n] @ s.swapaxes(-1, -2) + within[:, n] @ delta
        s = last[:, n] * s + delta.swapaxes(-1, -2) @ to_end[:, n]
    out = out.swapaxes(2, 3).reshape(v.shape[0], time + short, *v.shape[2:])[:, :time]
    return mx.array(np.ascontiguousarray(out)), mx.array(s)


delta_rule = Op(
    "delta_rule",
    reference=reference,
    portable=portable,
    host=host,
    host_when=lambda q, *rest: q.shape[1] >= 32,
)
