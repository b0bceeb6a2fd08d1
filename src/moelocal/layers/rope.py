"""Rotary position embedding on the first dims of each head (half-split pairs), with YaRN where a config asks for it."""

from __future__ import annotations

import math

import mlx.core as mx

from moelocal.config import AttentionSpec, Yarn


class Rope:
    """Rotates [B, H, T, D] for positions offset .. offset + T; offset is an int or one per row [B]."""

    def __init__(self, spec: AttentionSpec) -> None:
        self._dims = spec.rotary_dim
        self._base: float | None = spec.rope_base
        self._periods: mx.array | None = None
        self._scale = 1.0
        if spec.yarn is not None:
            self._base = None
            self._periods = 1.0 / yarn_frequencies(spec.rotary_dim, spec.rope_base, spec.yarn)
            self._scale = spec.yarn.attention_factor

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        if self._scale != 1.0:
            x = mx.concatenate([x[..., : self._dims] * self._scale, x[..., self._dims :]], axis=-1)
        return mx.fast.rope(
            x, self._dims, traditional=False, base=self._base, scale=1.0, offset=offset, freqs=self._periods
        )


def yarn_frequencies(dims: int, base: float, yarn: Yarn) -> mx.array:
    """Angle per position of each of the dims/2 pairs, float32 (YaRN, arXiv 2309.00071, section 3.2).

    Pairs that turn more than `beta_fast` times within the original context keep their frequency, those that turn less
    than `beta_slow` times are slowed by `factor`, a ramp lies between.
    """

    def pair_that_turns(times: float) -> float:
        return dims * math.log(yarn.original_context / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dims - 1)
    pairs = mx.arange(dims // 2, dtype=mx.float32)
    slowed = mx.clip((pairs - low) / max(high - low, 1e-3), 0.0, 1.0)
    plain = mx.power(base, -2.0 * pairs / dims)
    return plain * (1.0 - slowed) + plain / yarn.factor * slowed
