"""This library on a checkpoint folder, with the same face as the originals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from moelocal.model import Decoder


class Ours:
    """moelocal on a folder, computing in float32 unless told otherwise."""

    def __init__(self, folder: Path, dtype: mx.Dtype = mx.float32) -> None:
        self.model = Decoder.open(folder, dtype)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """[T] -> [T, V], all at once on a new cache."""
        return self.chunked(tokens, [len(tokens)])

    def chunked(self, tokens: np.ndarray, chunks: Sequence[int]) -> np.ndarray:
        """[T] -> [T, V]: chunks of these sizes, then one token at a time."""
        cache, parts = self.model.new_cache(), []
        for part in cut(tokens, chunks):
            parts.append(np.array(self.model(mx.array(part)[None], cache)[0]))
        return np.concatenate(parts)

    def padded(self, rows: Sequence[np.ndarray], steps: int) -> list[np.ndarray]:
        """Rows of unequal length as one left-padded batch; the last `steps` tokens of each one by one."""
        longest = max(len(row) for row in rows)
        padding = [longest - len(row) for row in rows]
        batch = np.stack(
            [np.concatenate([np.zeros(p, row.dtype), row]) for p, row in zip(padding, rows, strict=True)]
        )
        cache, parts = self.model.new_cache(padding=padding), []
        for part in np.split(batch, range(longest - steps, longest), axis=1):
            parts.append(np.array(self.model(mx.array(part), cache)))
        joined = np.concatenate(parts, axis=1)
        return [joined[i, p:] for i, p in enumerate(padding)]


def cut(tokens: np.ndarray, chunks: Sequence[int]) -> list[np.ndarray]:
    """Chunks of these sizes, then single tokens."""
    borders = np.cumsum(chunks).tolist()
    return [
        part for part in np.split(tokens, borders + list(range(borders[-1] + 1, len(tokens)))) if len(part)
    ]


def assert_same(
    ours: np.ndarray, theirs: np.ndarray, most: float = 5e-3, mean: float = 1e-4, routing_ties: int = 0
) -> None:
    """Two float32 implementations of one model, on random nets with logits of standard deviation 1.6.

    `most`: rounding alone gave up to 2.5e-3 between transformers and mlx-lm, which are both right; `mean`:
    it gave up to 3.4e-5. A wrong formula (a missing + 1, a swapped half, a wrong angle) gives 0.1 to 10.
    The likeliest token must be the same everywhere, except between two that they hold equal up to rounding
    (one position in some 20,000 was such a tie, 1.3e-4 apart).

    `routing_ties`: positions that `most` does not bind. Where the last expert chosen and the first one left out have
    equal router logits up to rounding, two right implementations choose differently. One position of 1,500 tokens by
    8 layers did, and moved by 0.07; our own portable form differs there from the host form in the same way, and the
    positions after it agree again.
    """
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    difference = np.abs(ours - theirs)
    worst = np.sort(difference.max(axis=-1).reshape(-1))[::-1]
    assert worst[routing_ties] < most, f"max |difference| {worst[routing_ties]:.2e}"
    assert difference.mean() < mean, f"mean |difference| {difference.mean():.2e}"
    chosen = np.take_along_axis(theirs, ours.argmax(-1)[:, None], -1)[:, 0]
    lost = theirs.max(-1) - chosen
    assert lost.max() < 1e-3, f"another likeliest token at {lost.argmax()}, {lost.max():.1e} below theirs"
