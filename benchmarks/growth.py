"""How a cost grows: the work that a token asks for, counted from the config; exponents with intervals.

Work is multiply-adds: of every matrix that a token passes (of the experts those it chooses), of the scores and sums of
attention over its context, of the delta nets' states. It says what has to be computed, not how fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from moelocal.config import AttentionSpec, DenseSpec, LayerSpec, ModelConfig
from moelocal.evaluate.statistics import Bootstrap, Estimate
from moelocal.quantize.sizes import shapes_of

# 0.975 quantiles of Student's t by degrees of freedom; those between are rounded down to the next smaller one
_T: Final = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
             12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980}  # fmt: skip


def t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t, at most a few percent too large between the rows of the table."""
    return _T[max(each for each in _T if each <= freedom)]


def ratio(over: Sequence[float], under: Sequence[float]) -> Estimate:
    """The geometric mean of the ratios of pairs, with its 95 % interval by bootstrap over the pairs."""
    logs = np.log(np.asarray(over, np.float64)) - np.log(np.asarray(under, np.float64))
    return Bootstrap(len(logs)).mean([np.array([each]) for each in logs], np.exp)


def exponent(x: Sequence[float], costs: Sequence[Sequence[float]]) -> Estimate:
    """The slope of log cost over log x by least squares. `costs`: for each x its measurements.

    The interval is that of Student's t for the slope, from the scatter around the line: noise, and what a power law
    does not describe. Needs two different x.
    """
    u = np.log(np.repeat(np.asarray(x, np.float64), [len(each) for each in costs]))
    v = np.log(np.concatenate([np.asarray(each, np.float64) for each in costs]))
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
    return _matrices(config) + config.vocab * config.hidden + _mixing(config, context + 1)


def prefill_work(config: ModelConfig, tokens: int) -> float:
    """Multiply-adds per token of a prompt: the head once, attention over what is before each token."""
    return _matrices(config) + config.vocab * config.hidden / tokens + _mixing(config, (tokens + 1) / 2)


def _matrices(config: ModelConfig) -> float:
    """Of the layers' matrices."""
    total = 0.0
    for name, shape in shapes_of(config).items():
        if name.startswith("layers.") and len(shape) > 1:
            layer = config.layers[int(name.split(".")[1])]
            total += math.prod(shape) * _share(layer, name)
    return total


def _share(layer: LayerSpec, name: str) -> float:
    """The share of a tensor that one token uses."""
    if ".switch_mlp." not in name:
        return 1.0
    assert not isinstance(layer.mlp, DenseSpec)
    return layer.mlp.per_token / layer.mlp.experts


def _mixing(config: ModelConfig, seen: float) -> float:
    """Of attention over `seen` positions, and of the states: decay, what they hold for a key, update, query."""
    total = 0.0
    for layer in config.layers:
        mixer = layer.mixer
        if isinstance(mixer, AttentionSpec):
            total += 2 * mixer.heads * mixer.head_dim * seen
        else:
            total += 4 * mixer.value_heads * mixer.value_dim * mixer.key_dim
    return total
