"""Angles per position of the rotary embedding (half-split pairs), with YaRN where a config asks for it."""

from __future__ import annotations

import math

import mlx.core as mx

from moelocal.config import AttentionSpec, Yarn


def frequencies(spec: AttentionSpec) -> mx.array:
    """Radians per position of each of the rotary_dim / 2 pairs, float32."""
    dims, base = spec.rotary_dim, spec.rope_base
    plain = mx.power(base, -2.0 * mx.arange(dims // 2, dtype=mx.float32) / dims)
    return plain if spec.yarn is None else _slowed(plain, dims, base, spec.yarn)


def _slowed(plain: mx.array, dims: int, base: float, yarn: Yarn) -> mx.array:
    """YaRN, arXiv 2309.00071, section 3.2.

    Pairs that turn more than `beta_fast` times within the original context keep their frequency, those that turn less
    than `beta_slow` times are slowed by `factor`, a ramp lies between.
    """

    def pair_that_turns(times: float) -> float:
        return dims * math.log(yarn.original_context / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dims - 1)
    pairs = mx.arange(dims // 2, dtype=mx.float32)
    slowed = mx.clip((pairs - low) / max(high - low, 1e-3), 0.0, 1.0)
    return plain * (1.0 - slowed) + plain / yarn.factor * slowed


def attention_factor(spec: AttentionSpec) -> mx.array:
    """What YaRN multiplies the elements of a query or key head with, float32 [D]: its factor where they rotate, else 1.
    A rotation keeps factors, so it can be part of the norm before it."""
    factor = 1.0 if spec.yarn is None else spec.yarn.attention_factor
    return mx.where(mx.arange(spec.head_dim) < spec.rotary_dim, factor, 1.0)
