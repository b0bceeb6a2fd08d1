"""How a cost grows: the work that a token asks for, counted from the config; exponents with intervals.

Work is multiply-adds: of every matrix that a token passes (of the experts those it chooses), of the scores and sums of
attention over its context, of the delta nets' states. It says what has to be computed, not how fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
