"""The graph of a step: arrays, and the primitives between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import mlx.core as mx

Path = tuple[str, ...]


@dataclass(slots=True, eq=False)
class Array:
    """`source`: the node that makes it, None for a constant."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    source: Node | None = None

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size


@dataclass(slots=True, eq=False)
class Node:
    """One primitive. `facts`: the exporter's arguments, or what a stand-in remembered; `path`: the regions it is in."""

    name: str
    inputs: list[Array]
    outputs: list[Array]
    facts: Any
    path: Path = ()
    region: int | None = None  # the compiled one that it is in
    parts: list[Node] = field(default_factory=list)  # of a `Compiled` node: what was joined


@dataclass(slots=True)
class Graph:
    """Nodes, each behind those that it reads, and the arrays that the step returns: first its `results`, then what its
    caches hold. `merged` primitives are not in it: the exporter found them to be the same as others."""

    nodes: list[Node]
    outputs: list[Array]
    results: int
    merged: int
