"""Several matrices that read the same input, as few products as their formats allow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import mlx.core as mx

from moelocal.formats import Weight, arrays_of, join_rows, same_form
from moelocal.ops.linear import linear


def fuse(weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """The matrices joined along rows if they have one form, else as they are."""
    return (join_rows(weights),) if same_form(weights) else tuple(weights)


class Projection:
    """x [..., cols] -> one output per matrix; neighbours of one form are a single product."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._parts: list[tuple[Weight, list[int]]] = []
        for _, group in groupby(weights, key=lambda w: None if isinstance(w, mx.array) else w.spec):
            members = list(group)
            rows = [w.shape[-2] if isinstance(w, mx.array) else w.weight.shape[-2] for w in members]
            self._parts.append((join_rows(members), list(accumulate(rows))[:-1]))

    @property
    def arrays(self) -> list[mx.array]:
        return [array for weight, _ in self._parts for array in arrays_of(weight)]

    def __call__(self, x: mx.array) -> list[mx.array]:
        outputs: list[mx.array] = []
        for weight, cuts in self._parts:
            y = linear(x, weight)
            outputs.extend(mx.split(y, cuts, axis=-1) if cuts else [y])
        return outputs
