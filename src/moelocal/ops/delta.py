"""The gated delta rule (Yang et al., arXiv 2412.06464; equations as in transformers' qwen3_5 and the family's cards).

Per value head, with key head h // (Hv / Hk), state S [Dv, Dk] in float32:
    S ← g_t S;  δ = β_t (v_t − S k_t);  S ← S + δ k_tᵀ;  o_t = S q_t          with  log g_t = `log_decay`
q, k [B, T, Hk, Dk] (normalised); v [B, T, Hv, Dv]; log_decay, beta [B, T, Hv]; all float32; state [B, Hv, Dv, Dk];
`valid` bool [B, T] marks the positions that are no padding, or None: padding leaves the state as it is.
-> o [B, T, Hv, Dv], the state after the last position. `ops.delta_net` chooses the form.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from moelocal.ops.host import Host


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
    q: Host, k: Host, v: Host, log_decay: Host, beta: Host, state: Host, valid: Host | None
) -> tuple[Host, Host]:
    """The chunked form on NumPy arrays (same paper, section 3.3). Within a chunk, with G_t the product of decays up to
    t, (I + diag(β) tril(G_t/G_s · k_t·k_s, −1)) Δ = diag(β) (V − diag(G) K S₀ᵀ) is solved for all δ at once."""
    time, ratio = q.shape[1], v.shape[2] // k.shape[2]
    if valid is not None:  # β = 0 and no decay: the state passes through
        log_decay, beta = log_decay * valid[..., None], beta * valid[..., None]
    short = -time % CHUNK  # and so for the padding to whole chunks

    def chunks(a: Host, repeat: int = 1) -> Host:
        a = np.pad(a, [(0, 0), (0, short)] + [(0, 0)] * (a.ndim - 2))
        a = a.reshape(a.shape[0], -1, CHUNK, *a.shape[2:]).swapaxes(2, 3)
        return np.repeat(a, repeat, axis=2) if repeat > 1 else np.ascontiguousarray(a)

    q, k, v, beta = chunks(q, ratio), chunks(k, ratio), chunks(v), chunks(beta)[..., None]  # [B, N, Hv, C, D]
    log_g = np.cumsum(chunks(log_decay), axis=-1)
    # for s <= t the exponent is at most 0; above the diagonal it would overflow
    above = np.triu(np.full((CHUNK, CHUNK), -np.inf, np.float32), 1)
    ratio_g = np.exp(log_g[..., :, None] - log_g[..., None, :] + above)
    g = np.exp(log_g)[..., None]
    system = beta * ratio_g * (k @ k.swapaxes(-1, -2))
    solved = np.concatenate([beta * v, beta * g * k], axis=-1)
    for t in range(
        1, CHUNK
    ):  # forward substitution, all chunks at once: only what is below the diagonal is read
        solved[..., t : t + 1, :] -= system[..., t : t + 1, :t] @ solved[..., :t, :]
    own, from_state = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    within = ratio_g * (q @ k.swapaxes(-1, -2))
    to_end = (np.exp(log_g[..., -1:] - log_g)[..., None] * k).swapaxes(-1, -2)
    decayed_q, last = g * q, g[..., -1:, :]
    state = state.swapaxes(-1, -2)  # [B, Hv, Dk, Dv]
    out = np.empty_like(v)
    for n in range(out.shape[1]):
        delta = own[:, n] - from_state[:, n] @ state
        out[:, n] = decayed_q[:, n] @ state + within[:, n] @ delta
        state = last[:, n] * state + to_end[:, n] @ delta
    out = out.swapaxes(2, 3).reshape(len(v), time + short, *v.shape[2:][::2])[:, :time]
    return out, np.ascontiguousarray(state.swapaxes(-1, -2))
