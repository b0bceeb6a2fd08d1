"""Next-token distributions: how the reference's are kept, and how another model's are held against them.

p is the reference's distribution at a position, q the model's, S the tokens that are kept of p: its likeliest, at most
`MOST` (1,024) of them, fewer where those hold all but `NEGLIGIBLE` of the mass. All other tokens are one bin, of mass
P = 1 - Σ_S p and Q = 1 - Σ_S q. Then

    KL(p || q) is taken as  Σ_S p log(p / q) + P log(P / Q),

which is never above the true one (log-sum inequality). No tail token has more than p_k, the least p in S, or less than
q_0, the least q outside S; so what is missing is between 0 and P log(p_k / q_0) - P log(P / Q), the *slack*. In the
same way the acceptance Σ min(p, q) is taken as Σ_S min(p, q) + min(P, Q), too high by at most min(P, Q).

Softmax and tail are float32 on the device, where log-probabilities have errors of about 1e-6; bins are scaled to a sum
of 1 in float64, and added up there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

MOST: Final = 1024
NEGLIGIBLE: Final = 2.0**-20

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


T = TypeVar("T", "Distributions", "Scores")


@dataclass(frozen=True, slots=True)
class Distributions:
    """What is kept of N distributions.

    `counts` uint16 [N]: tokens kept of each; `ids` uint32 and `logprobs` float32 [Σ counts]: those, position after
    position, likeliest first; `tails` float32 [N]: log P; `top` uint32 [N]: the likeliest token; `targets` float32 [N]:
    log-probability of the token that comes next in the text.
    """

    counts: Array
    ids: Array
    logprobs: Array
    tails: Array
    top: Array
    targets: Array

    @classmethod
    def of(cls, logits: mx.array, targets: mx.array) -> Distributions:
        """From finite logits float32 [N, V] and the tokens that come next, int [N]."""
        logp = _log_softmax(logits)
        vocab = logp.shape[-1]
        ids = (
            mx.argpartition(-logp, MOST - 1, axis=-1)[:, :MOST]
            if vocab > MOST
            else mx.broadcast_to(mx.arange(vocab, dtype=mx.uint32), logp.shape)
        )
        ids = mx.take_along_axis(ids, mx.argsort(-mx.take_along_axis(logp, ids, axis=-1), axis=-1), axis=-1)
        beyond = np.exp(np.array(_tail(logp, ids), np.float64))
        chosen, values = np.array(ids), np.array(mx.take_along_axis(logp, ids, axis=-1))
        # the mass after each token, added up from the small end
        after = np.exp(values[:, ::-1].astype(np.float64)).cumsum(1)[:, ::-1] + beyond[:, None]
        counts = np.maximum((after > NEGLIGIBLE).sum(1), 1)
        kept = np.arange(values.shape[1]) < counts[:, None]
        table = _padded(counts, chosen[kept])
        return cls(
            counts.astype(np.uint16),
            chosen[kept],
            values[kept],
            np.array(_tail(logp, mx.array(table))),
            np.array(mx.argmax(logp, axis=-1)),
            np.array(_at(logp, targets)),
        )

    def compare(self, first: int, logits: mx.array, targets: mx.array) -> Scores:
        """Another model's finite logits float32 [n, V] at positions `first` and on."""
        last = first + logits.shape[0]
        begin, end = self.counts[:first].sum(dtype=np.int64), self.counts[:last].sum(dtype=np.int64)
        counts = self.counts[first:last].astype(np.int64)
        wide = _log_softmax(logits)
        ids = mx.array(_padded(counts, self.ids[begin:end]))
        kept = np.arange(ids.shape[1]) < counts[:, None]
        theirs = np.full(kept.shape, -np.inf)
        theirs[kept] = self.logprobs[begin:end]
        ours = np.where(kept, np.array(mx.take_along_axis(wide, ids, axis=-1), np.float64), -np.inf)
        logp, _ = _bins(theirs, self.tails[first:last])
        logq, scale = _bins(ours, np.array(_tail(wide, ids)))
        p, q = np.exp(logp), np.exp(logq)
        ratio = np.subtract(logp, logq, where=p > 0, out=np.zeros_like(p))
        some = p[:, -1] > 0  # where all tokens are kept there is no least one outside
        least_q = np.array(mx.min(_without(wide, ids, mx.inf), axis=-1), np.float64) - scale
        most = logp[np.arange(len(counts)), counts - 1] - np.where(some, least_q, 0.0)
        return Scores(
            kl=(p * ratio).sum(1),
            kl_slack=np.maximum(p[:, -1] * (most - ratio[:, -1]), 0.0),
            acceptance=np.minimum(p, q).sum(1),
            acceptance_slack=np.minimum(p, q)[:, -1],
            top1=(np.array(mx.argmax(wide, axis=-1)) == self.top[first:last]).astype(np.float64),
            nll=-np.array(_at(wide, targets), np.float64),
            reference_nll=-self.targets[first:last].astype(np.float64),
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """Float64 [N] each: nats for `kl` and the two negative log-likelihoods of the text, shares for the others."""

    kl: Floats
    kl_slack: Floats
    acceptance: Floats
    acceptance_slack: Floats
    top1: Floats
    nll: Floats
    reference_nll: Floats


def joined(parts: list[T]) -> T:
    """Parts of one sequence, one after the other."""
    kind = type(parts[0])
    return kind(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(kind)))


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _at(logp: mx.array, tokens: mx.array) -> mx.array:
    return mx.take_along_axis(logp, tokens[:, None], axis=-1)[:, 0]


def _without(logp: mx.array, ids: mx.array, value: float) -> mx.array:
    return mx.put_along_axis(logp, ids, mx.array(value, logp.dtype), axis=-1)


def _tail(logp: mx.array, ids: mx.array) -> mx.array:
    """Log of the mass outside `ids` [N, K], which may repeat: one sum for reference and model, so that a model is at a
    distance of exactly 0 from itself. Minus infinity where nothing is outside."""
    return mx.logsumexp(_without(logp, ids, -mx.inf), axis=-1)


def _bins(kept: Floats, tails: Array) -> tuple[Floats, Floats]:
    """Log-probabilities [n, K] and the tail's behind them [n, K + 1], scaled to a sum of exactly 1, and the logarithm
    of what that divided them by, [n]: the float32 softmax is off by some 1e-6, which a divergence of two almost equal
    distributions would show."""
    bins = np.concatenate([kept, tails[:, None]], axis=1, dtype=np.float64)
    scale: Floats = np.log(np.exp(bins).sum(1))
    return bins - scale[:, None], scale


def _padded(counts: Array, values: Array) -> Array:
    """Rows of `counts` values each, filled up with the first of each: [N, most]."""
    starts = np.cumsum(counts, dtype=np.int64) - counts
    columns = np.arange(counts.max())
    return np.asarray(values[starts[:, None] + np.where(columns < counts[:, None], columns, 0)])
