"""The router's logits in float32: y = x Wᵀ, for x [..., H] in the compute dtype -> [..., rows] float32.

Rounding them to bfloat16 changes which experts are chosen (reference: float32 router, modeling_qwen3_5_moe.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from moelocal.formats import QuantizedArray, Weight, arrays_of, join_rows, same_form
from moelocal.metal import Kernel
from moelocal.ops import linear as lin
from moelocal.ops.geometry import ROWS
from moelocal.ops.host import many_rows
from moelocal.ops.op import Op


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """`wide`: the matrices with float32 values, joined along rows where they have one form. `stored`: the one packed
    matrix with scales and biases as the file has them, which the kernel reads, or None; its codes are those of `wide`.
    """

    wide: tuple[Weight, ...]
    stored: QuantizedArray | None

    @classmethod
    def build(cls, matrices: Sequence[Weight]) -> RouterWeights:
        """From the matrices as stored, in the order of the columns of y."""
        joined = (join_rows(matrices),) if same_form(matrices) else tuple(matrices)
        only = joined[0]
        packed = len(joined) == 1 and isinstance(only, QuantizedArray) and only.spec.mode == "affine"
        return cls(
            tuple(w.astype(mx.float32) for w in joined),
            only if packed and isinstance(only, QuantizedArray) else None,
        )

    @property
    def arrays(self) -> list[mx.array]:
        every = self.wide if self.stored is None else (*self.wide, self.stored)
        return [array for weight in every for array in arrays_of(weight)]


def _side_by_side(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def reference(x: mx.array, weights: RouterWeights) -> mx.array:
    return _side_by_side([lin.reference(x.astype(mx.float32), w) for w in weights.wide])


def portable(x: mx.array, weights: RouterWeights) -> mx.array:
    wide = x.astype(mx.float32)
    return _side_by_side([lin.portable(wide, w) for w in weights.wide])


def host(x: mx.array, weights: RouterWeights) -> mx.array:
    return _side_by_side([lin.host(x, w) for w in weights.wide])


# Untuned on hardware: simdgroups of a threadgroup
SIMDGROUPS = 2

MOST_TOKENS = 8
"""Every token reads the matrix by itself."""

ROUTER = Kernel(
    name="router",
    file="router",
    inputs=("x", "packed", "scales", "biases"),
    outputs=("y",),
    call="""router<BITS, GROUP, ROWS>(x, packed, scales, biases, y, packed_shape[0], scales_shape[1] * GROUP,
    threadgroup_position_in_grid.y, threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);""",
)


def metal(x: mx.array, weights: RouterWeights) -> mx.array:
    assert weights.stored is not None
    packed, spec = weights.stored, weights.stored.spec
    tokens, rows, threads = x.size // x.shape[-1], packed.weight.shape[0], 32 * SIMDGROUPS
    (y,) = ROUTER(
        [x, *packed.arrays],
        shapes=[(*x.shape[:-1], rows)],
        dtypes=[mx.float32],
        grid=(-(-rows // (ROWS * SIMDGROUPS)) * threads, tokens, 1),
        threadgroup=(threads, 1, 1),
        template={"BITS": spec.bits, "GROUP": spec.group, "ROWS": ROWS, "SIMDGROUPS": SIMDGROUPS},
    )
    return y


def supports(x: mx.array, weights: RouterWeights) -> bool:
    few = 0 < x.size <= MOST_TOKENS * x.shape[-1]
    # fewer scales would come in `constant` address space
    return weights.stored is not None and few and weights.stored.scales.size >= 8


router = Op(
    "router",
    reference=reference,
    portable=portable,
    host=host,
    host_when=lambda x, weights: many_rows(x),
    metal=metal,
    supports=supports,
)
