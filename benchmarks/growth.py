"""How a cost grows: the work that a token asks for, counted from the config; exponents with intervals.

Work is multiply-adds: of every matrix that a token passes (of the experts those it chooses), of the scores and sums of
attention over its context, of the delta nets' states. It says what has to be computed, not how fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from moelocal.bench.speed import t_quantile
from moelocal.config import AttentionSpec, DenseSpec, LayerSpec, ModelConfig
from moelocal.evaluate.statistics import Estimate
from moelocal.quantize.sizes import shapes_of


def exponent(x: Sequence[float], costs: Sequence[Sequence[float]]) -> Estimate:
    """The slope of log cost over log x by least squares. `costs`: for each x its measurements, of which it takes the
    geometric mean: rounds at one x share what a power law does not describe, so they are one point and not several.

    The interval is that of Student's t for the slope, from the scatter of the points around the line. Needs two
    different x, and three for an interval.
    """
    u = np.log(np.asarray(x, np.float64))
    v = np.array([np.log(np.asarray(each, np.float64)).mean() for each in costs])
    centred = u - u.mean()
    square = float(centred @ centred)
    slope = float(centred @ v) / square
    freedom = len(u) - 2
    if freedom < 1:
        return Estimate(slope, None, None)
    rest = v - v.mean() - slope * centred
    half = t_quantile(freedom) * math.sqrt(float(rest @ rest) / freedom / square)
    return Estimate(slope, slope - half, slope + half)


def decode_work(config: ModelConfig, context: float) -> float:
    """Multiply-adds of one token behind `context` others."""
    every = range(len(config.layers))
    return config.vocab * config.hidden + sum(sum(_layer(config, i, context + 1)) for i in every)


def prefill_work(config: ModelConfig, tokens: int) -> float:
    """Multiply-adds per token of a prompt: attention over what is before each token; the head once, for the last token,
    and so all of the last layer that no other token is read for: only its keys and values, or its state, are kept."""
    last = len(config.layers) - 1
    every = sum(sum(_layer(config, i, (tokens + 1) / 2)) for i in range(last))
    return (
        every
        + _layer(config, last, 0)[0]
        + (_layer(config, last, tokens)[1] + config.vocab * config.hidden) / tokens
    )


_STORED: Final = ("k_proj", "v_proj", "in_proj_qkv", "in_proj_a", "in_proj_b", "conv1d")
"""Matrices of a layer that its cache needs."""


def _layer(config: ModelConfig, index: int, seen: float) -> tuple[float, float]:
    """Multiply-adds of a layer for one token that attends over `seen` positions: what its cache needs, and the rest."""
    layer = config.layers[index]
    stored = rest = 0.0
    for name, shape in shapes_of(config).items():
        if name.startswith(f"layers.{index}.") and len(shape) > 1:
            work = math.prod(shape) * _share(layer, name)
            if name.split(".")[-2] in _STORED:
                stored += work
            else:
                rest += work
    mixer = layer.mixer
    if isinstance(mixer, AttentionSpec):
        rest += 2 * mixer.heads * mixer.head_dim * seen  # scores and sums
    else:  # the states: decay, what they hold for a key, update; query
        state = mixer.value_heads * mixer.value_dim * mixer.key_dim
        stored, rest = stored + 3 * state, rest + state
    return stored, rest


def _share(layer: LayerSpec, name: str) -> float:
    """The share of a tensor that one token uses."""
    if ".switch_mlp." not in name:
        return 1.0
    assert not isinstance(layer.mlp, DenseSpec)
    return layer.mlp.per_token / layer.mlp.experts
