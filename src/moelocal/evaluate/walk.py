"""One model through a corpus: logits chunk by chunk, and which experts each token went to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from moelocal.checkpoint.scope import Checkpoint
from moelocal.ops.op import observing
from moelocal.quantize.corpus import Corpus
from moelocal.quantize.streamed import Report, logits, stream

Experts = Mapping[int, npt.NDArray[np.uint16]]
"""By layer that has routed experts: those that each position went to, uint16 [T, K]."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Logits float32 [n, V] at positions `first` and on of sequence `number`, and the tokens that come next, int32 [n];
    `last` of its sequence."""

    number: int
    first: int
    logits: mx.array
    targets: mx.array
    last: bool


def walk(
    checkpoint: Checkpoint, corpus: Corpus, dtype: mx.Dtype, report: Report, kv_bits: int | None = None
) -> tuple[list[Experts], Iterator[Chunk]]:
    """All layers at once, then chunk by chunk the logits of every position that has a next token.

    `report(done, total)` counts sequences through layers, the head being one more. Raises `CheckpointError` (also for
    tensors that no layer took), `NumericsError`.
    """
    sequences = [mx.array(ids, mx.int32) for ids in corpus.sequences]
    layers, count = len(checkpoint.config.layers), len(sequences)
    seen: list[mx.array] = []
    chosen: list[dict[int, npt.NDArray[np.uint16]]] = [{} for _ in sequences]

    def observe(op: Any, args: tuple[Any, ...]) -> None:
        if op.name == "experts":
            seen.append(args[2])  # [1, T, K]

    def after(index: int, states: list[mx.array]) -> None:
        # one call per sequence, or none: a dense layer
        for number, each in enumerate(seen):
            chosen[number][index] = np.array(each[0]).astype(np.uint16)
        seen.clear()

    with observing(observe):
        states = stream(
            checkpoint, sequences, dtype, lambda done, _: report(done, (layers + 1) * count), after, kv_bits
        )

    def chunks() -> Iterator[Chunk]:
        for number, first, rows in logits(checkpoint, [x[:, :-1] for x in states], dtype):
            targets = sequences[number][first + 1 : first + 1 + rows.shape[0]]
            last = first + 1 + rows.shape[0] == sequences[number].size
            yield Chunk(number, first, rows, targets, last)
            report(layers * count + number + last, (layers + 1) * count)
        checkpoint.require_all_used()

    return list(chosen), chunks()
