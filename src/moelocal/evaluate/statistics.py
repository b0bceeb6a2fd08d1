"""Estimates over the positions of a corpus, with confidence intervals over its sequences.

Positions of one text depend on each other, so what is drawn again (with replacement, `RESAMPLES` times, seed `SEED`)
are whole sequences; an interval reaches from the 2.5th to the 97.5th percentile of the estimate over the draws
(percentile bootstrap, Efron 1979; Davison and Hinkley 1997, 5.3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

RESAMPLES: Final = 1000
SEED: Final = 0
LEVEL: Final = 0.95

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % confidence interval; None for both ends where there is only one sequence."""

    value: float
    low: float | None
    high: float | None


class Bootstrap:
    """Draws of `sequences` sequences: the same for every estimate of a corpus."""

    def __init__(self, sequences: int) -> None:
        drawn = np.random.default_rng(SEED).integers(0, sequences, (RESAMPLES, sequences))
        self._times = np.stack([np.bincount(row, minlength=sequences) for row in drawn])
        """How often each sequence is in each draw, int [RESAMPLES, sequences]."""

    def mean(self, values: Sequence[Floats], then: Callable[[Any], Any] = lambda mean: mean) -> Estimate:
        """The mean over all positions, [N] values per sequence; `then` is applied to it (and to each draw's)."""
        sums = np.array([part.sum() for part in values])
        counts = np.array([part.size for part in values], np.float64)
        draws = then((self._times @ sums) / (self._times @ counts))
        return self._estimate(then(sums.sum() / counts.sum()), draws)

    def quantiles(self, values: Sequence[Floats], shares: Sequence[float]) -> list[Estimate]:
        """For each share the least value that at least this share of all positions does not exceed."""
        every = np.concatenate(values)
        order = np.argsort(every, kind="stable")
        owner = np.repeat(np.arange(len(values)), [part.size for part in values])[order]
        every = every[order]

        def at(times: npt.NDArray[np.int64]) -> Floats:
            reached = np.cumsum(times[owner])
            ranks = np.ceil(np.array(shares) * reached[-1])
            found: Floats = every[np.searchsorted(reached, ranks)]
            return found

        draws = np.stack([at(times) for times in self._times])
        whole = at(np.ones(len(values), np.int64))
        return [self._estimate(value, draws[:, i]) for i, value in enumerate(whole)]

    def _estimate(self, value: float, draws: Floats) -> Estimate:
        if self._times.shape[1] == 1:
            return Estimate(float(value), None, None)
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(float(value), float(low), float(high))
