"""`--target-size`: a recipe fitted to a number of bytes, by spending bits where they help most per byte.

Above the recipe's own size its formats are the least that a matrix gets, below it the most. Between its least and its
most each matrix has a few choices of bits (its group stays). Of these only the lower convex hull of error over bytes
counts; the steps along all hulls are taken in the order of error saved per byte, each where it still fits. That is the
greedy solution of the multiple-choice knapsack (Sinha and Zoltners 1979). As long as every step fits, no other plan of
that size is better, and of what remains the same holds again; so a larger target never gives a larger error. What
stays unused is less than the next step of any matrix.

Matrices that the network multiplies as one (gate and up, q and k and v, …) move together, because products of one
format are one launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from moelocal.config import ModelConfig
from moelocal.errors import RequestError
from moelocal.formats import QuantSpec
from moelocal.quantize.recipe import BITS, Plan, Recipe, class_of, layer_of, matrices
from moelocal.quantize.sizes import packed_nbytes, sizes
from moelocal.units import size, size_above

Errors = Callable[[str, QuantSpec], float]
"""(path, format) -> what quantizing that matrix so costs, in one unit for all matrices; not below 0."""

HARM: Final[dict[str, float]] = {
    "embedding": 0.15, "head": 0.05, "router": 1.0, "shared_gate": 0.5,
    "attention.q": 2.2, "attention.k": 2.2, "attention.v": 2.2, "attention.o": 2.9,
    "delta.qkv": 2.9, "delta.z": 2.9, "delta.b": 0.5, "delta.a": 0.5, "delta.out": 6.0,
    "shared.gate": 0.8, "shared.up": 0.8, "shared.down": 1.4,
    "experts.gate": 3.2, "experts.up": 3.2, "experts.down": 4.4,
    "dense.gate": 3.2, "dense.up": 3.2, "dense.down": 4.4,
}  # fmt: skip
"""How much worse the model gets when all matrices of a class go to 4 bits in groups of 64; the unit is arbitrary.

Published, not measured here, and rough. Output projection, inputs, q/k/v, embedding and head: mlx-node's scan of the
flagship (99.9th percentile of the KL divergence: 6.0, 2.9, 1.5 to 2.9, 0.15, 0.05). Experts: 31 % of the sum, because
oQ4, which raises everything else, removes 69 % of plain 4 bits' divergence (deepsweet/mlx-kld: 0.054 -> 0.017), down
more than gate and up (Unsloth). Router, gates, b and a, shared expert, dense feed-forward: assumed. A caller with
errors of its own passes them as `errors`.
"""

EDGE: Final = 0.5
"""The first and the last layer count this much more than the middle one, linearly in between. That layers near the ends
are more sensitive is published (APEX); by how much is assumed."""

_LEAST: Final = {"experts": 2, "dense": 3}
"""The fewest bits that a family goes down to; all else stops at 4, where its cost explodes before the bytes count."""

_TOGETHER: Final = {
    "attention.k": "attention.q",
    "attention.v": "attention.q",
    "delta.z": "delta.qkv",
    "shared.up": "shared.gate",
    "experts.up": "experts.gate",
    "dense.up": "dense.gate",
}

# tail -> group -> by bits 2, 3, 4, 5, 6, 8: squared error x 1e4 relative to the weights, of the search of
# `ops/group_search.py` with bfloat16 scales on a 256 x 2048 matrix of Student's t. 19 degrees of freedom (kurtosis 3.4)
# are like routed experts, 6.5 (5.4) like attention, 4.5 (about 10) like shared experts and routers.
_SEARCHED: Final[dict[float, dict[int, tuple[float, ...]]]] = {
    19: {
        32: (929.4, 221.4, 50.9, 11.95, 2.90, 0.19),
        64: (1098.4, 294.5, 71.9, 17.35, 4.25, 0.27),
        128: (1199.1, 352.4, 93.0, 23.10, 5.71, 0.36),
    },
    6.5: {
        32: (1068.9, 256.7, 59.1, 13.87, 3.37, 0.22),
        64: (1326.6, 365.3, 89.7, 21.60, 5.30, 0.33),
        128: (1488.6, 465.8, 124.2, 30.99, 7.66, 0.48),
    },
    4.5: {
        32: (1169.4, 286.1, 66.1, 15.51, 3.77, 0.24),
        64: (1511.9, 428.0, 105.5, 25.42, 6.23, 0.39),
        128: (1757.5, 573.9, 154.7, 38.46, 9.52, 0.59),
    },
}
_TAILS: Final = {"attention": 6.5, "delta": 6.5, "shared": 4.5, "router": 4.5, "shared_gate": 4.5}


def searched_error(kind: str, spec: QuantSpec) -> float:
    """Squared error relative to the weights of a class in an affine format."""
    tail = _TAILS.get(kind.split(".")[0], 19)
    return _SEARCHED[tail][spec.group][BITS.index(spec.bits)] * 1e-4


def expected_errors(shapes: Mapping[str, tuple[int, ...]]) -> Errors:
    """What is known before anything was measured: `HARM` of the class, divided among its layers by `EDGE`, times the
    format's error relative to that of 4 bits in groups of 64."""
    found = [(path, kind, layer_of(path)) for path, kind, _ in matrices(shapes)]
    last = max((layer for _, _, layer in found if layer is not None), default=0)

    def edge(layer: int | None) -> float:
        return 1.0 if not layer or not last else 1 - EDGE * min(layer, last - layer) / last

    sums: dict[str, float] = {}
    for _, kind, layer in found:
        sums[kind] = sums.get(kind, 0.0) + edge(layer)
    harm = {path: HARM[kind] * edge(layer) / sums[kind] for path, kind, layer in found}

    def errors(path: str, spec: QuantSpec) -> float:
        kind = class_of(path)
        assert kind is not None, path
        return harm[path] * searched_error(kind, spec) / searched_error(kind, QuantSpec(4, 64))

    return errors


def total_error(plan: Plan, errors: Errors) -> float:
    """The sum over the quantized matrices of a plan."""
    return math.fsum(errors(path, spec) for path, spec in plan.items() if spec is not None)


@dataclass(frozen=True, slots=True)
class _Step:
    """One step along the hull of the matrices `paths`: to `spec`, for `nbytes` more, at `rate` error saved per byte."""

    rate: float
    item: int
    nbytes: int
    paths: tuple[str, ...]
    spec: QuantSpec | None


def fit(
    recipe: Recipe,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    target: int,
    errors: Errors | None = None,
    dtype_size: int = 2,
) -> Plan:
    """The plan of at most `target` bytes (of all text tensors) that `recipe` becomes; `errors` instead of the expected
    ones where they were measured. The same arguments give the same plan.

    Raises `RequestError` if the target is below the smallest plan, or not below the unquantized model;
    `ConfigError` as `Recipe.plan` does.
    """
    plan = recipe.plan(config, shapes)
    original = sizes(config, shapes, {}, dtype_size).nbytes
    if target >= original:
        raise RequestError(
            f"target size {size(target)}: the unquantized model has only {size(original)}; use it as it is"
        )
    grow = target >= sizes(config, shapes, plan, dtype_size).nbytes
    errors = errors or expected_errors(shapes)
    steps: list[_Step] = []
    for index, paths in enumerate(_items(plan)):
        choices = _choices(paths[0], plan[paths[0]], grow)
        nbytes = [sum(packed_nbytes(shapes[f"{p}.weight"], c, dtype_size) for p in paths) for c in choices]
        error = [math.fsum(errors(p, c) for p in paths) if c else 0.0 for c in choices]
        plan.update(dict.fromkeys(paths, choices[0]))
        last = 0
        for chosen in _hull(nbytes, error)[1:]:
            more = nbytes[chosen] - nbytes[last]
            steps.append(_Step((error[last] - error[chosen]) / more, index, more, paths, choices[chosen]))
            last = chosen
    smallest = sizes(config, shapes, plan, dtype_size).nbytes
    if target < smallest:
        raise RequestError(
            f"target size {size(target)}: the smallest that recipe {recipe.name} can become is "
            f"{size_above(smallest)}"
        )
    room = target - smallest
    closed: set[int] = set()
    # steps of one item have falling rates: sorting keeps their order
    for step in sorted(steps, key=lambda step: (-step.rate, step.item)):
        if step.item in closed or step.nbytes > room:
            closed.add(step.item)
            continue
        room -= step.nbytes
        plan.update(dict.fromkeys(step.paths, step.spec))
    return plan


def _items(plan: Plan) -> list[tuple[str, ...]]:
    """The quantized paths, those together that move together: same layer, same product, same format in the recipe."""
    groups: dict[object, list[str]] = {}
    for path, spec in plan.items():
        if spec is not None:
            kind = class_of(path) or ""
            groups.setdefault((layer_of(path), _TOGETHER.get(kind, kind), spec), []).append(path)
    return [tuple(paths) for paths in groups.values()]


def _choices(path: str, start: QuantSpec | None, grow: bool) -> list[QuantSpec | None]:
    """The formats that a matrix can take, by size: from the recipe's own upwards, or up to it."""
    assert start is not None
    least = min(start.bits, _LEAST.get((class_of(path) or "").split(".")[0], 4))
    if grow:
        return [*(QuantSpec(bits, start.group) for bits in BITS if bits >= start.bits), None]
    return [QuantSpec(bits, start.group) for bits in BITS if least <= bits <= start.bits]


def _hull(nbytes: Sequence[int], error: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull of points by rising bytes, from the first one: the error falls along it, ever
    more slowly per byte. A larger format that is no better is not on it."""
    hull = [0]

    def rate(a: int, b: int) -> float:
        return (error[a] - error[b]) / (nbytes[b] - nbytes[a])

    for index in range(1, len(nbytes)):
        if error[index] >= error[hull[-1]]:
            continue
        while len(hull) > 1 and rate(hull[-1], index) >= rate(hull[-2], hull[-1]):
            hull.pop()
        hull.append(index)
    return hull
