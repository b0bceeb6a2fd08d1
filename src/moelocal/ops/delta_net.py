"""All of a gated delta net between its projections: convolution, normalised heads, gates, delta rule, gated norm.

u [B, T, C] (queries, keys and values before the convolution), z [B, T, Hv·Dv], b and a [B, T, Hv];
conv [B, W − 1, C] the last rows of u before this call, state [B, Hv, Dv, Dk] float32; `valid` bool [B, T] or None.
    u = silu(causal depthwise conv(u));  q, k, v = split(u);  q = q/sqrt(Σq² + 1e-6)·Dk^-½;  k = k/sqrt(Σk² + 1e-6)
    log g = −exp(A_log)·softplus(a + dt_bias);  β = σ(b);  o = delta rule;  y = o/sqrt(mean(o²) + ε)·w ⊙ silu(z)
-> y [B, T, Hv·Dv] in the dtype of u, and the new conv and state. Float32 inside.

`delta_net_states` is the same with conv and state after every position, conv [B, T, W − 1, C] and state
[B, T, Hv, Dv, Dk]: what goes back to after a draft was refused in its middle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import mlx.core as mx
import numpy as np

from moelocal.config import DeltaNetSpec
from moelocal.metal import Kernel
from moelocal.ops import delta, norm
from moelocal.ops.host import MANY_ROWS, borrow, silu
from moelocal.ops.op import Op

L2_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class DeltaNetWeights:
    """Row-contiguous: `conv` [W, C] of any float dtype; float32 `decay` = −exp(A_log) [Hv],
    `dt_bias` [Hv], `norm` [Dv]; `eps` of the gated norm.

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
            decay=mx.contiguous(-mx.exp(a_log)),
            dt_bias=mx.contiguous(dt_bias),
            norm=mx.contiguous(norm),
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
        taps = mx.swapaxes(weights.conv, 0, 1)[..., None].astype(mx.float32)  # [C, W, 1]
        mixed = mx.conv1d(window.astype(mx.float32), taps, groups=spec.conv_channels)
    q, k, v = _split(mixed * mx.sigmoid(mixed), spec)
    q = mx.fast.rms_norm(q, weights.q_scale, L2_EPS / spec.key_dim)
    k = mx.fast.rms_norm(k, weights.k_scale, L2_EPS / spec.key_dim)
    log_decay = weights.decay * mx.logaddexp(a.astype(mx.float32) + weights.dt_bias, 0.0)
    out, state = delta.portable(q, k, v, log_decay, mx.sigmoid(b.astype(mx.float32)), state, valid)
    gate = z.astype(mx.float32).reshape(out.shape)
    y = mx.fast.rms_norm(out, weights.norm, weights.eps) * (gate * mx.sigmoid(gate))
    # a copy: a slice would keep the whole window of a prefill alive
    return y.reshape(z.shape).astype(u.dtype), mx.contiguous(window[:, time:]), state


def host(
    u: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    conv: mx.array,
    state: mx.array,
    valid: mx.array | None,
    weights: DeltaNetWeights,
) -> Result:
    mx.eval(u, z, b, a, conv, state)
    spec, (batch, time, _) = weights.spec, u.shape
    real = None if valid is None else np.asarray(valid).astype(np.float32)
    new = borrow(u) if real is None else borrow(u) * real[..., None]
    window = np.concatenate([borrow(conv), new], axis=1)
    mixed = window[:, :time] * borrow(weights.conv)[0]
    for i in range(1, spec.conv_width):
        mixed += window[:, i : i + time] * borrow(weights.conv)[i]
    keys, heads = spec.key_heads * spec.key_dim, (batch, time, -1, spec.key_dim)
    mixed = silu(mixed)
    q, k = mixed[..., :keys].reshape(heads), mixed[..., keys : 2 * keys].reshape(heads)
    v = mixed[..., 2 * keys :].reshape(batch, time, spec.value_heads, spec.value_dim)
    q = q / np.sqrt(np.sum(q * q, axis=-1, keepdims=True) + L2_EPS) * spec.key_dim**-0.5
    k = k / np.sqrt(np.sum(k * k, axis=-1, keepdims=True) + L2_EPS)
    log_decay = borrow(weights.decay) * np.logaddexp(borrow(a) + borrow(weights.dt_bias), np.float32(0))
    beta = 0.5 * np.tanh(0.5 * borrow(b)) + 0.5
    out, after = delta.host(q, k, v, log_decay, beta, borrow(state), real)
    out = out / np.sqrt(np.mean(out * out, axis=-1, keepdims=True) + weights.eps) * borrow(weights.norm)
    y = out.reshape(batch, time, -1) * silu(borrow(z))
    return mx.array(y), mx.array(window[:, time:]), mx.array(after)


LANES: Final = 8
"""Threads of the kernel along a row of the state. Like the next two not tuned, for want of hardware."""

SIMDGROUPS: Final = 16
"""At most in a threadgroup."""

OWNED: Final = 32
"""Elements of the state that a thread can keep in registers: 16 simdgroups own a matrix of 128 x 128."""

MOST: Final = 8
"""Positions of one launch."""

DELTA_NET: Final = Kernel(
    name="delta_net",
    file="delta_net",
    inputs=("u", "z", "b", "a", "conv", "state", "taps", "decay", "dt_bias", "norm", "eps"),
    outputs=("y", "conv_after", "state_after"),
    call="""threadgroup float queries[TIME * COLUMNS * LANES];
threadgroup float keys[TIME * COLUMNS * LANES];
threadgroup float values[TIME * ROWS * SIMDGROUPS * 32 / LANES];
threadgroup float outputs[TIME * ROWS * SIMDGROUPS * 32 / LANES];
threadgroup float gates[2 * TIME];
delta_net<T, EVERY, TIME, HK, HV, DK, DV, WIDTH, LANES, SIMDGROUPS, ROWS, COLUMNS>(
    u, u_strides, z, z_strides, b, b_strides, a, a_strides, conv, conv_strides, state, state_strides,
    taps, decay, dt_bias, norm, eps, y, conv_after, state_after, queries, keys, values, outputs, gates,
    threadgroup_position_in_grid.y, threadgroup_position_in_grid.z, thread_index_in_threadgroup,
    thread_index_in_simdgroup, simdgroup_index_in_threadgroup);""",
    strided=True,
)


def _geometry(spec: DeltaNetSpec) -> tuple[int, int, int]:
    """Simdgroups of a threadgroup, and rows and columns of the state that a thread owns."""
    simdgroups = min(SIMDGROUPS, -(-spec.value_dim * LANES // 32))
    rows = -(-spec.value_dim * LANES // (32 * simdgroups))
    return simdgroups, rows, 4 * -(-spec.key_dim // (4 * LANES))


def _launch(
    every: bool,
    u: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    conv: mx.array,
    state: mx.array,
    valid: mx.array | None,
    weights: DeltaNetWeights,
) -> Result:
    """With conv and state after `every` position, or after the last only."""
    spec, (batch, time, _) = weights.spec, u.shape
    simdgroups, rows, columns = _geometry(spec)
    after = (batch, time) if every else (batch,)
    constants = [weights.conv, weights.decay, weights.dt_bias, weights.norm, mx.array(weights.eps)]
    y, conv, state = DELTA_NET(
        [u, z, b, a, conv, state, *constants],
        shapes=[z.shape, (*after, *conv.shape[1:]), (*after, *state.shape[1:])],
        dtypes=[u.dtype, u.dtype, mx.float32],
        grid=(32 * simdgroups, spec.value_heads, batch),
        threadgroup=(32 * simdgroups, 1, 1),
        template={
            **{"T": u.dtype, "EVERY": every, "TIME": time, "WIDTH": spec.conv_width},
            **{"HK": spec.key_heads, "HV": spec.value_heads, "DK": spec.key_dim, "DV": spec.value_dim},
            **{"LANES": LANES, "SIMDGROUPS": simdgroups, "ROWS": rows, "COLUMNS": columns},
        },
    )
    return y, conv, state


def supports(
    u: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    conv: mx.array,
    state: mx.array,
    valid: mx.array | None,
    weights: DeltaNetWeights,
) -> bool:
    """Up to `MOST` positions without padding, one compute dtype. Dv from 8 (shorter arrays of values would lie in
    constant memory) to 256 (no checkpoint has more); any Dk, as long as the matrix fits `OWNED`: 128 x 128 does,
    256 x 64 and 64 x 256 too."""
    _, rows, columns = _geometry(weights.spec)
    return (
        valid is None
        and u.shape[0] > 0
        and 1 <= u.shape[1] <= MOST
        and 8 <= weights.spec.value_dim <= 256
        and rows * columns <= OWNED
        and u.dtype == z.dtype == b.dtype == a.dtype == conv.dtype
        and state.dtype == mx.float32
    )


def _one_by_one(form: Callable[..., Result]) -> Callable[..., Result]:
    """The positions one after the other, with conv and state after each."""

    def states(
        u: mx.array,
        z: mx.array,
        b: mx.array,
        a: mx.array,
        conv: mx.array,
        state: mx.array,
        valid: mx.array | None,
        weights: DeltaNetWeights,
    ) -> Result:
        after: list[Result] = []
        for t in range(u.shape[1]):
            now = [x if x is None else x[:, t : t + 1] for x in (u, z, b, a, valid)]
            y, conv, state = form(*now[:4], conv, state, now[4], weights)
            after.append((y, conv[:, None], state[:, None]))
        y, conv, state = (mx.concatenate(list(parts), axis=1) for parts in zip(*after, strict=True))
        return y, conv, state

    return states


delta_net = Op(
    "delta_net",
    reference=reference,
    portable=portable,
    host=host,
    host_when=lambda u, *rest: u.dtype == mx.float32 and u.shape[1] >= MANY_ROWS,
    metal=partial(_launch, False),
    supports=supports,
)

delta_net_states = Op(
    "delta_net_states",
    reference=_one_by_one(reference),
    portable=_one_by_one(portable),
    metal=partial(_launch, True),
    supports=supports,
)
