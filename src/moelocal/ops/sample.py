"""The draw of a token from softmax(x) after top_k, top_p and min_p: the argmax of x + noise among what they leave.

x float32 [V]: the largest value 0, removed rows -inf, no NaN. `noise`: finite float32 of a standard Gumbel
distribution, [noise_size(V, top_k)]. `top_k` from 0 and `top_p` in (0, 1] are off at 0 and 1, `min_p` in [0, 1] at 0.
-> token int32 [], never a removed row. Where x is not as said, the token means nothing.

Order: largest value first, equals by id. top_k keeps the first k; where that is below V the noise belongs to ranks,
otherwise to ids. top_p keeps a token if those before it sum to less than top_p of what top_k left; without top_k,
where nobody sorts a large vocabulary, tokens as likely as the last one kept stay too. min_p keeps x >= log(min_p).

The forms agree but where such a sum is within rounding of top_p: they add in different orders.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Final

import mlx.core as mx

from moelocal.metal import Kernel
from moelocal.ops import choice
from moelocal.ops.op import Op

# Up to this size one sort is cheaper than selecting: on Metal it fits into one threadgroup.
SORTED_AT_ONCE = 4096

_NOTHING: Final = -math.inf
_BITS_OF_INFINITY: Final = 0x7F800000


def noise_size(size: int, top_k: int) -> int:
    """How many values of noise a draw from `size` tokens takes."""
    return top_k if 0 < top_k < size else size


def _lowest(min_p: float) -> float:
    return math.log(min_p) if min_p > 0 else _NOTHING


def reference(x: mx.array, noise: mx.array, top_k: int, top_p: float, min_p: float) -> mx.array:
    order = mx.argsort(-x)[: noise.size]
    values = x[order]
    kept = values >= _lowest(min_p)
    if top_p < 1:
        p = mx.softmax(values)
        kept = kept & (mx.cumsum(p, inclusive=False) < top_p)
    if noise.size < x.size:
        token = order[mx.argmax(mx.where(kept, values + noise, _NOTHING))]
    else:
        smallest = mx.min(mx.where(kept, values, math.inf))
        token = mx.argmax(mx.where(x >= smallest, x + noise, _NOTHING))
    return token.astype(mx.int32)


def portable(x: mx.array, noise: mx.array, top_k: int, top_p: float, min_p: float) -> mx.array:
    values, ids = truncated(x, top_k, top_p, min_p)
    drawn = mx.argmax(values + noise)
    return drawn.astype(mx.int32) if ids is None else ids[drawn]


def truncated(x: mx.array, top_k: int, top_p: float, min_p: float) -> tuple[mx.array, mx.array | None]:
    """What is left of x, the rest -inf: by rank with the int32 ids if top_k is below V, otherwise [V] and None."""
    ids = None
    if 0 < top_k < x.size:
        x, ids = largest(x, top_k)
    if top_p < 1:
        if ids is None:
            nucleus = x >= nucleus_floor(x, top_p)
        else:
            nucleus = mx.cumsum(mx.softmax(x), inclusive=False) < top_p
        x = mx.where(nucleus, x, _NOTHING)
    if min_p > 0:
        x = mx.where(x >= _lowest(min_p), x, _NOTHING)
    return x, ids


def largest(x: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The `count` largest values of `x` [V], largest first, equals by id, and their int32 ids.

    A large `x` is cut into blocks: the `count` largest values lie in the `count` blocks of largest maximum,
    so two sorts of about sqrt(V * count) values find them.
    """
    size = x.shape[0]
    width = 1 << max(round(math.log2(max(size / count, 1)) / 2), 0)
    if size <= SORTED_AT_ONCE or width < 4:
        ids = mx.argsort(-x)[:count]
        return x[ids], ids.astype(mx.int32)
    blocks = mx.pad(x, (0, -size % width), constant_values=_NOTHING).reshape(-1, width)
    # by position again, for the sake of equals: argsort leaves those in their order
    chosen = mx.sort(mx.argsort(-mx.max(blocks, axis=-1))[:count])
    values = blocks[chosen].reshape(-1)
    order = mx.argsort(-values)[:count]
    ids = chosen[order // width] * width + order % width
    return values[order], ids.astype(mx.int32)


def nucleus_floor(x: mx.array, top_p: float) -> mx.array:
    """The smallest value of the nucleus: the largest f such that softmax(x) [V] from f on sums to `top_p`.

    Bisection over the bits of |x|, which order as -x does: exact after the 31 bits of a float without its sign.
    """
    if x.size <= SORTED_AT_ONCE:
        values = -mx.sort(-x)
        before = mx.cumsum(mx.softmax(values), inclusive=False)
        return mx.min(mx.where(before < top_p, values, math.inf))
    p, bits = mx.softmax(x), mx.abs(x).view(mx.uint32)
    low, high = mx.array(0, dtype=mx.uint32), mx.array(_BITS_OF_INFINITY, dtype=mx.uint32)
    for _ in range(_BITS_OF_INFINITY.bit_length()):
        middle = (low + high) // 2
        enough = mx.sum(mx.where(bits <= middle, p, 0.0)) >= top_p
        low, high = mx.where(enough, low, middle + 1), mx.where(enough, middle, high)
    return -high.view(mx.float32)


# Not tuned on hardware: values of x that a lane holds in registers, twice as many for a vocabulary over 2^18.
VALUES_PER_LANE: Final = 8
_MOST_PER_LANE: Final = 16
_MOST_RANKS: Final = 64  # a list per simdgroup fits into threadgroup memory
_NUCLEUS_LAUNCHES: Final = 7  # 31 bits, 5 a launch

_BLOCK: Final = """threadgroup_position_in_grid.x, simdgroups_per_threadgroup, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);"""
_LISTS: Final = """threadgroup float list_values[32 * K], merged_values[K];
threadgroup uint list_ids[32 * K], merged_ids[K];
"""
_SCRATCH: Final = "list_values, list_ids, merged_values, merged_ids"

TOP = Kernel(
    name="sample_top",
    file="sample",
    inputs=("x",),
    outputs=("values", "ids"),
    call=f"{_LISTS}sample_top<K, PER>(x, values, ids, {_SCRATCH}, x_shape[0], {_BLOCK}",
)
DRAW = Kernel(
    name="sample_draw",
    file="sample",
    inputs=("values", "ids", "noise", "limits"),
    outputs=("token",),
    call=f"""{_LISTS}sample_draw<K>(values, ids, noise, limits, token, {_SCRATCH}, values_shape[0],
    thread_index_in_simdgroup);""",
)
NUCLEUS = Kernel(
    name="sample_nucleus",
    file="sample",
    inputs=("x", "limits", "state", "sums"),
    outputs=("next_state", "next_sums"),
    call=f"""threadgroup float partial[32 * 32];
sample_nucleus<FIRST, PER>(x, limits, state, sums, next_state, next_sums, partial, x_shape[0],
    threadgroups_per_grid.x, {_BLOCK}""",
)
RACE = Kernel(
    name="sample_race",
    file="sample",
    inputs=("x", "noise", "limits"),
    outputs=("values", "ids"),
    call=f"{_LISTS}sample_race<PER>(x, noise, limits[1], values, ids, {_SCRATCH}, x_shape[0], {_BLOCK}",
)
RACE_IN_NUCLEUS = Kernel(
    name="sample_race_in_nucleus",
    file="sample",
    inputs=("x", "noise", "limits", "state", "sums"),
    outputs=("values", "ids"),
    call=f"""{_LISTS}const float nucleus = nucleus_floor(state, sums, limits[0], sums_shape[0],
    thread_index_in_simdgroup);
sample_race<PER>(x, noise, metal::max(nucleus, limits[1]), values, ids, {_SCRATCH}, x_shape[0], {_BLOCK}""",
)
FINISH = Kernel(
    name="sample_finish",
    file="sample",
    inputs=("values", "ids"),
    outputs=("token",),
    call="sample_finish(values, ids, token, values_shape[0], thread_index_in_simdgroup);",
)


def metal(x: mx.array, noise: mx.array, top_k: int, top_p: float, min_p: float) -> mx.array:
    limits = mx.array([top_p if top_p < 1 else math.inf, _lowest(min_p)], dtype=mx.float32)
    ranked = noise.size < x.size
    per_lane = VALUES_PER_LANE
    while x.size > 32**3 * per_lane:
        per_lane *= 2
    simdgroups = min(32, -(-x.size // (32 * per_lane)))
    blocks = -(-x.size // (32 * per_lane * simdgroups))
    grid, threadgroup = (blocks * simdgroups * 32, 1, 1), (simdgroups * 32, 1, 1)
    template = {"PER": per_lane, "K": top_k if ranked else 1}
    lists, kinds = [(blocks, template["K"])] * 2, [mx.float32, mx.uint32]
    if ranked:
        values, ids = TOP(
            [x], shapes=lists, dtypes=kinds, grid=grid, threadgroup=threadgroup, template=template
        )
        last, inputs = DRAW, [values, ids, noise, limits]
    else:
        inputs, race = [x, noise, limits], RACE
        if top_p < 1:
            state, sums = limits, limits  # the first launch reads neither
            for launch in range(_NUCLEUS_LAUNCHES):
                state, sums = NUCLEUS(
                    [x, limits, state, sums],
                    shapes=[(3,), (blocks, 32)],
                    dtypes=[mx.uint32, mx.float32],
                    grid=grid,
                    threadgroup=threadgroup,
                    template={"PER": per_lane, "FIRST": launch == 0},
                )
            inputs, race = [*inputs, state, sums], RACE_IN_NUCLEUS
        values, ids = race(
            inputs, shapes=lists, dtypes=kinds, grid=grid, threadgroup=threadgroup, template=template
        )
        last, inputs = FINISH, [values, ids]
    (token,) = last(
        inputs,
        shapes=[()],
        dtypes=[mx.int32],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        template={"K": top_k} if ranked else {},
    )
    return token


def supports(x: mx.array, noise: mx.array, top_k: int, top_p: float, min_p: float) -> bool:
    return x.size <= 32**3 * _MOST_PER_LANE and (noise.size == x.size or top_k <= _MOST_RANKS)


def _key(x: mx.array, noise: mx.array, top_k: int, top_p: float, min_p: float) -> Hashable:
    return choice.shapes(x, noise, top_p < 1)


sample = Op("sample", reference=reference, portable=portable, metal=metal, supports=supports, key=_key)
