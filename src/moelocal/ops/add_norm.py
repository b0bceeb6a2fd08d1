"""h = x + r and its RMS norm, y = h / sqrt(mean(h²) + ε) · w, over the last axis.

x, r [..., size] of one dtype, weight float32 [size] -> h, y in that dtype. The norm is of the rounded h, in float32.
"""

from __future__ import annotations

import mlx.core as mx

from moelocal.metal import Kernel
from moelocal.ops import norm
from moelocal.ops.op import Op

Result = tuple[mx.array, mx.array]


def reference(x: mx.array, r: mx.array, weight: mx.array, eps: float) -> Result:
    h = (x.astype(mx.float32) + r.astype(mx.float32)).astype(x.dtype)
    return h, norm.reference(h, weight, eps)


def portable(x: mx.array, r: mx.array, weight: mx.array, eps: float) -> Result:
    h = x + r
    return h, norm.portable(h, weight, eps)


ADD_NORM = Kernel(
    name="add_norm",
    file="add_norm",
    inputs=("x", "r", "weight", "eps"),
    outputs=("h", "y"),
    call="""threadgroup float partial[32];
add_norm<T>(x, r, weight, h, y, partial, weight_shape[0], eps, threadgroup_position_in_grid.x,
    thread_index_in_threadgroup, threads_per_threadgroup.x, thread_index_in_simdgroup,
    simdgroup_index_in_threadgroup);""",
)


def metal(x: mx.array, r: mx.array, weight: mx.array, eps: float) -> Result:
    size = weight.shape[0]
    rows, threads = x.size // size, norm.threads_for(size)
    h, y = ADD_NORM(
        [x, r, weight, mx.array(eps)],
        shapes=[x.shape, x.shape],
        dtypes=[x.dtype, x.dtype],
        grid=(rows * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template={"T": x.dtype},
    )
    return h, y


def supports(x: mx.array, r: mx.array, weight: mx.array, eps: float) -> bool:
    return x.dtype == r.dtype and norm.supports(x, weight, eps)


add_norm = Op("add_norm", reference=reference, portable=portable, metal=metal, supports=supports)
