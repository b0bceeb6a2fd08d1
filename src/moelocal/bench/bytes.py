"""The bytes that a token cannot do without: the limit that memory sets to its speed."""

from __future__ import annotations

from moelocal.config import ModelConfig
from moelocal.formats import arrays_of
from moelocal.layers.mlp import MoE
from moelocal.model import Decoder
from moelocal.quantize.sizes import sizes


def read_per_token(decoder: Decoder) -> int:
    """Bytes of the weights, as they lie in memory, that decoding a token reads: all of them, but of the routed experts
    those that run and of the embedding one row."""
    config = decoder.config
    embedding = sum(array.nbytes for array in arrays_of(decoder.embedding))
    total = embedding // config.vocab + sum(array.nbytes for array in arrays_of(decoder.head))
    total += decoder.norm.nbytes
    for block in decoder.blocks:
        total += sum(array.nbytes for array in block.arrays)
        if isinstance(block.mlp, MoE):
            routed = sum(array.nbytes for array in block.mlp.routed.arrays)
            total -= routed - routed * block.mlp.spec.per_token // block.mlp.spec.experts
    return total


def moved_per_token(config: ModelConfig, read: int, context: int, dtype_size: int) -> int:
    """Bytes that decoding a token behind `context` others moves at least: `read` of weights, the recurrent states (read
    and written), keys and values of all positions (read) and of its own (written). `dtype_size`: of activations."""
    beside = sizes(config, {}, {}, dtype_size)
    return read + 2 * beside.state + (context + 2) * beside.cache_per_token
