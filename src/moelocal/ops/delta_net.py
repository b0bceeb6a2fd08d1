"""All of a gated delta net between its projections: convolution, normalised heads, gates, delta rule, gated norm.

u [B, T, C] (queries, keys and values before the convolution), z [B, T, Hv·Dv], b and a [B, T, Hv];
conv [B, W − 1, C] the last rows of u before this call, state [B, Hv, Dv, Dk] float32; `valid` bool [B, T] or None.
    u = silu(causal depthwise conv(u));  q, k, v = split(u);  q = q/sqrt(Σq² + 1e-6)·Dk^-½;  k = k/sqrt(Σk² + 1e-6)
    log g = −exp(A_log)·softplus(a + dt_bias);  β = σ(b);  o = delta rule;  y = o/sqrt(mean(o²) + ε)·w ⊙ silu(z)
-> y [B, T, Hv·Dv] in the dtype of u, and the new conv and state. Float32 inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from moelocal.config import DeltaNetSpec
from moelocal.ops import delta, norm
from moelocal.ops.op import Op

L2_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class DeltaNetWeights:
    """Float32: `conv` [W, C], `decay` = −exp(A_log) [Hv], `dt_bias` [Hv], `norm` [Dv]; `eps` of the gated norm.

    `q_scale`, `k_scale` [Dk] make an RMS norm with eps 1e-6 / Dk the l2 norm that the equations ask for.
    """

    spec: DeltaNetSpec
    conv: mx.array
    decay: mx.array
    dt_bias: mx.array
    norm: mx.array
    eps: float
    q_scale: mx.array
    k_scale: mx.array

    @classmethod
    def build(
        cls,
        spec: DeltaNetSpec,
        conv: mx.array,
        a_log: mx.array,
        dt_bias: mx.array,
        norm: mx.array,
        eps: float,
    ) -> DeltaNetWeights:
        """From the checkpoint's tensors: conv [C, W, 1], A_log, dt_bias [Hv], norm [Dv]."""
        ones = mx.ones((spec.key_dim,))
        return cls(
            spec=spec,
            conv=mx.contiguous(mx.swapaxes(conv[..., 0], 0, 1)),
            decay=-mx.exp(a_log),
            dt_bias=dt_bias,
            norm=norm,
            eps=eps,
            q_scale=ones / spec.key_dim,
            k_scale=ones / spec.key_dim**0.5,
        )

    @property
    def arrays(self) -> list[mx.array]:
        return [self.conv, self.decay, self.dt_bias, self.norm, self.q_scale, self.k_scale]


def _split(u: mx.array, spec: DeltaNetSpec) -> tuple[mx.array, mx.array, mx.array]:
    """[B, T, C] -> q, k [B, T, Hk, Dk], v [B, T, Hv, Dv]."""
    keys = spec.key_heads * spec.key_dim
    q, k, v = mx.split(u, [keys, 2 * keys], axis=-1)
    lead = u.shape[:2]
    return (
        q.reshape(*lead, spec.key_heads, spec.key_dim),
        k.reshape(*lead, spec.key_heads, spec.key_dim),
        v.reshape(*lead, spec.value_heads, spec.value_dim),
    )


Result = tuple[mx.array, mx.array, mx.array]


def reference(
    u: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    conv: mx.array,
    state: mx.array,
    valid: mx.array | None,
    weights: DeltaNetWeights,
) -> Result:
    spec, time = weights.spec, u.shape[1]
    if valid is not None:
        u = mx.where(valid[..., None], u, 0)
    window = mx.concatenate([conv, u], axis=1)
    wide = window.astype(mx.float32)
    mixed = sum((wide[:, i : i + time] * weights.conv[i] for i in range(spec.conv_width)), mx.array(0.0))
    q, k, v = _split(mixed * mx.sigmoid(mixed), spec)
    q = q * mx.rsqrt(mx.sum(q * q, axis=-1, keepdims=True) + L2_EPS) * spec.key_dim**-0.5
    k = k * mx.rsqrt(mx.sum(k * k, axis=-1, keepdims=True) + L2_EPS)
    log_decay = weights.decay * mx.logaddexp(a.astype(mx.float32) + weights.dt_bias, 0.0)
    out, state = delta.reference(q, k, v, log_decay, mx.sigmoid(b.astype(mx.float32)), state, valid)
    gate = z.astype(mx.float32).reshape(out.shape)
    y = norm.reference(out, weights.norm, weights.eps) * gate * mx.sigmoid(gate)
    return y.reshape(z.shape).astype(u.dtype), window[:, time:], state


def portable(
    u: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    conv: mx.array,
    state: mx.array,
    valid: mx.array | None,
    weights: DeltaNetWeights,
) -> Result:
    spec, time = weights.spec, u.shape[1]
    if valid is not None:
        u = mx.where(valid[..., None], u, 0)
    window = mx.concatenate([conv, u], axis=1)
    if time == 1:
        mixed = mx.sum(window.astype(mx.float32) * weights.conv, axis=1, keepdims=True)
    else:
        taps = mx.swapaxes(weights.conv, 0, 1)[..., None]  # [C, W, 1]
        mixed = mx.conv1d(window.astype(mx.float32), taps, groups=spec.conv_channels)
    q, k, v = _split(mixed * mx.sigmoid(mixed), spec)
    q = mx.fast.rms_norm(q, weights.q_scale, L2_EPS / spec.key_dim)
    k = mx.fast.rms_norm(k, weights.k_scale, L2_EPS / spec.key_dim)
    log_decay = weights.decay * mx.logaddexp(a.astype(mx.float32) + weights.dt_bias, 0.0)
    out, state = delta.delta_rule(q, k, v, log_decay, mx.sigmoid(b.astype(mx.float32)), state, valid)
    gate = z.astype(mx.float32).reshape(out.shape)
    y = mx.fast.rms_norm(out, weights.norm, weights.eps) * (gate * mx.sigmoid(gate))
    # a copy: a slice would keep the whole window of a prefill alive
    return y.reshape(z.shape).astype(u.dtype), mx.contiguous(window[:, time:]), state


delta_net = Op("delta_net", reference=reference, portable=portable)
