"""Random tensors of every supported family, by our names, as `synthetic.py` writes them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import mlx.core as mx
import numpy as np

from moelocal.checkpoint.names import Source
from moelocal.config import ModelConfig
from moelocal.formats import QuantSpec
from moelocal.quantize.pieces import Part, stored_dtype
from moelocal.quantize.recipe import class_of
from moelocal.quantize.sizes import shapes_of

BLOCK: Final = 32 << 20
"""Bytes of random numbers made at once. Part of the format: each block has a seed of its own."""


@dataclass(frozen=True, slots=True)
class Random:
    """A tensor of our name and shape, whose values are a function of `seed` and name. `matrices`: paths of the plan
    that it holds; none if it is no matrix."""

    name: str
    shape: tuple[int, ...]
    matrices: tuple[str, ...]
    mean: float
    std: float
    seed: int

    @property
    def part(self) -> Part:
        """As a part of a conversion, which knows how it is stored."""
        source = Source(self.shape, mx.float32, (self.name,), self.floats)
        return Part(self.name.removesuffix(".weight"), self.name, self.shape, self.matrices, source)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of axis 0 of about `BLOCK` bytes of float32."""
        step = max(1, BLOCK // (4 * math.prod(self.shape[1:])))
        for first in range(0, self.shape[0], step):
            yield first, min(first + step, self.shape[0])

    def stored(self, spec: QuantSpec | None, dtype: mx.Dtype, first: int, last: int) -> tuple[mx.array, ...]:
        """A block as the file has it: floats, or words, scales and biases."""
        if spec is None:
            return (self.floats(first, last).astype(stored_dtype(self.part, dtype)),)
        *lead, cols = (last - first, *self.shape[1:])
        random, codes = self._generator(first), 2**spec.bits
        shape = (*lead, cols * spec.bits // 32)
        count = math.prod(shape)
        raw = random.bit_generator.random_raw((count + 1) // 2).view(np.uint32)[:count]
        # uniform codes 0 .. n - 1 have variance (n^2 - 1) / 12, the square of a factor uniform on 1/2 .. 3/2 mean 13/12
        unit = self.std / math.sqrt((codes**2 - 1) / 12 * 13 / 12)
        factor = random.random((*lead, cols // spec.group), np.float32) + np.float32(0.5)
        scales = mx.array(factor * np.float32(unit)).astype(dtype)
        biases = (scales.astype(mx.float32) * (-(codes - 1) / 2)).astype(dtype)
        return mx.array(raw.reshape(shape)), scales, biases

    def floats(self, first: int, last: int | None) -> mx.array:
        """Indices first to last of axis 0, float32."""
        count = (self.shape[0] if last is None else last) - first
        values = self._generator(first).standard_normal((count, *self.shape[1:]), np.float32)
        values *= np.float32(self.std)
        values += np.float32(self.mean)
        return mx.array(values)

    def _generator(self, first: int) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self.seed, zlib.crc32(self.name.encode()), first]))


def sources_of(config: ModelConfig, seed: int) -> list[Random]:
    """Every tensor that mlx-lm stores for the family, in the order of the network."""
    found: dict[str, Random] = {}
    for name, dims in shapes_of(config).items():
        path = name.removesuffix(".weight")
        matrices = (path,) if class_of(path) else ()
        stem, _, leaf = path.rpartition(".")
        if (
            config.architecture == "qwen3_next" and leaf in _JOINED
        ):  # four of our matrices are two in every file
            before, leaf = _JOINED[leaf]
            other = found.pop(f"{stem}.{before}.weight")
            name, dims = f"{stem}.{leaf}.weight", (other.shape[0] + dims[0], dims[1])
            matrices = (*other.matrices, *matrices)
        found[name] = Random(name, dims, matrices, *_distribution(name, dims, config), seed)
    return list(found.values())


_JOINED: Final = {"in_proj_z": ("in_proj_qkv", "in_proj_qkvz"), "in_proj_a": ("in_proj_b", "in_proj_ba")}


def _distribution(name: str, dims: tuple[int, ...], config: ModelConfig) -> tuple[float, float]:
    """Mean and standard deviation of a tensor of ours."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    fixed = {"A_log": (0.2, 0.8), "dt_bias": (-0.5, 0.8), "conv1d": (0.0, 0.6)}
    if leaf in fixed:
        return fixed[leaf]
    if len(dims) == 1:  # a norm, stored with its one
        return 1.0, 0.1
    if leaf == "embed_tokens" and not config.tied:
        return 0.0, 1.0
    gain = 1.0
    if leaf in ("o_proj", "out_proj", "down_proj"):
        gain = (2 * len(config.layers)) ** -0.5  # two of these a layer add to the residual stream
    elif leaf in ("lm_head", "embed_tokens"):
        gain = 1.6  # the standard deviation of the logits
    elif leaf == "gate":
        gain = 2.0
    return 0.0, gain / dims[-1] ** 0.5
