"""The layer-streamed forward pass: a model computes whole texts while one layer of its weights is in memory.

The loops of a usual pass are exchanged: every sequence goes through layer 0, then that layer is forgotten and layer 1
is read. Between layers only hidden states are kept, tokens x hidden x size of the compute dtype (0.27 GB for 65,536
tokens of the 35B-A3B in bfloat16, whose layers take 1.7 GB each). The arithmetic is `Decoder`'s.

A `Checkpoint` hands out each tensor once, so it is good for one pass; a second one opens it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from moelocal.cache import AttentionCache, RecurrentCache
from moelocal.checkpoint.scope import Checkpoint
from moelocal.errors import NumericsError
from moelocal.formats import QuantizedArray, arrays_of
from moelocal.layers.attention import Attention
from moelocal.layers.block import Block
from moelocal.ops.linear import linear
from moelocal.ops.norm import rms_norm

ROWS = 256
"""Positions whose logits are in memory at once: 0.25 GB with 248,320 tokens in the vocabulary."""

Report = Callable[[int, int], None]
After = Callable[[int, list[mx.array]], None]


def embed(checkpoint: Checkpoint, sequences: Sequence[mx.array], dtype: mx.Dtype) -> list[mx.array]:
    """Rows of the embedding: int32 [T] each -> [1, T, H] each in `dtype`, evaluated."""
    config = checkpoint.config
    table = checkpoint.root().matrix("embed_tokens", config.vocab, config.hidden, None)
    # rows first, then their dtype: the whole table in another dtype is never made
    if isinstance(table, QuantizedArray):
        states = [table.rows(ids[None]).astype(dtype).dequantize(dtype) for ids in sequences]
    else:
        states = [table[ids[None]].astype(dtype) for ids in sequences]
    mx.eval(states)
    return states


def block_of(checkpoint: Checkpoint, index: int, dtype: mx.Dtype) -> Block:
    """Layer `index` with its weights read. They are freed when the caller lets go of it (`mx.clear_cache` gives the
    memory back to the system). Raises `CheckpointError`."""
    config = checkpoint.config
    scope = checkpoint.root().at(f"layers.{index}")
    block = Block(scope, config.layers[index], config.hidden, config.norm_eps, dtype)
    for array in block.arrays:  # one by one: what a fusion was made of is freed before the next is read
        mx.eval(array)
    return block


def forward(block: Block, states: list[mx.array], kv_bits: int | None = None) -> list[mx.array]:
    """Whole sequences from position 0 through one layer: [1, T, H] each -> the same list, each replaced by its result,
    evaluated one by one. `kv_bits`: as in `AttentionCache`; every query then reads codes, as it does in a chat."""
    for number, x in enumerate(states):
        cache = AttentionCache(kv_bits) if isinstance(block.mixer, Attention) else RecurrentCache()
        states[number] = block(x, cache, 0, None, None, None)
        mx.eval(states[number])
    return states


def logits(
    checkpoint: Checkpoint, states: Sequence[mx.array], dtype: mx.Dtype
) -> Iterator[tuple[int, int, mx.array]]:
    """Final norm and head: [1, T, H] each -> (sequence, first position, logits float32 [at most `ROWS`, V]) in order.

    Raises `NumericsError` where a logit is NaN or infinite.
    """
    config = checkpoint.config
    root = checkpoint.root()
    norm = root.array("norm.weight", (config.hidden,))
    if config.tied:  # `embed` took the matrix
        root = Checkpoint.of(checkpoint.folder, config, checkpoint.entries).root()
    head = root.matrix("embed_tokens" if config.tied else "lm_head", config.vocab, config.hidden, dtype)
    mx.eval(norm, *arrays_of(head))
    for number, x in enumerate(states):
        for first in range(0, x.shape[1], ROWS):
            normed = rms_norm(x[0, first : first + ROWS], norm, config.norm_eps)
            rows = linear(normed, head).astype(mx.float32)
            _require_finite(checkpoint, "the output head", number, rows, dtype)
            yield number, first, rows


def stream(
    checkpoint: Checkpoint,
    sequences: Sequence[mx.array],
    dtype: mx.Dtype,
    report: Report = lambda done, total: None,
    after: After = lambda index, states: None,
    kv_bits: int | None = None,
) -> list[mx.array]:
    """All layers: int32 [T] each -> what goes into `logits`, [1, T, H] each in `dtype`.

    `report(done, total)` counts sequences through layers; `after(index, states)` is told when a layer is done, and may
    read what comes out of it. Raises `CheckpointError`; `NumericsError` where a hidden state is NaN or infinite.
    """
    states = embed(checkpoint, sequences, dtype)
    layers = len(checkpoint.config.layers)
    for index in range(layers):
        block = block_of(checkpoint, index, dtype)
        for number in range(len(states)):
            states[number : number + 1] = forward(block, states[number : number + 1], kv_bits)
            _require_finite(checkpoint, f"layer {index}", number, states[number], dtype)
            report(index * len(states) + number + 1, layers * len(states))
        after(index, states)
        del block
        mx.clear_cache()  # before the next layer is read, not while
    return states


def _require_finite(checkpoint: Checkpoint, where: str, number: int, x: mx.array, dtype: mx.Dtype) -> None:
    if not mx.all(mx.isfinite(x)).item():
        name = str(dtype).removeprefix("mlx.core.")
        raise NumericsError(
            f"{checkpoint.folder}: {where}: NaN or infinite values in sequence {number}: "
            f"its weights are damaged, or too large for a computation in {name}"
        )
