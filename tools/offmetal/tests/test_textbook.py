"""Kernels that every textbook has, in checked mode, with results that are known."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import offmetal
from offmetal.tests.support import close, run

T = "uint i = thread_position_in_grid.x, t = thread_position_in_threadgroup.x;\n"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

REDUCTION = f"""
    threadgroup float s[256];
    s[t] = a[i];
    {BARRIER}
    for (uint half_width = 128; half_width; half_width /= 2) {{
        if (t < half_width) s[t] += s[t + half_width];
        {BARRIER}
    }}
    if (t == 0) out[threadgroup_position_in_grid.x] = s[0];
"""


def test_tree_reduction(mode: str):
    a = mx.random.randint(-50, 50, (1024,)).astype(mx.float32)
    out = run(T + REDUCTION, {"a": a}, threads=1024, threadgroup=256, shape=(4,))
    assert mx.array_equal(out, a.reshape(4, 256).sum(1))  # sums of small integers are exact


SCAN = f"""
    threadgroup int s[2][256];
    int now = 0;
    s[now][t] = a[t];
    {BARRIER}
    for (uint step = 1; step < 256; step *= 2) {{
        s[1 - now][t] = s[now][t] + (t >= step ? s[now][t - step] : 0);
        now = 1 - now;
        {BARRIER}
    }}
    out[t] = s[now][t];
"""


def test_prefix_sum_between_two_buffers(mode: str):
    a = mx.random.randint(-9, 9, (256,))
    out = run(T + SCAN, {"a": a}, threads=256, shape=(256,), dtype=mx.int32)
    assert mx.array_equal(out, mx.cumsum(a))


SIMD_SCAN = f"""
    threadgroup int totals[32];
    int mine = simd_prefix_inclusive_sum(a[t]);
    if (thread_index_in_simdgroup == 31) totals[simdgroup_index_in_threadgroup] = mine;
    {BARRIER}
    if (simdgroup_index_in_threadgroup == 0)
        totals[t] = simd_prefix_exclusive_sum(t < simdgroups_per_threadgroup ? totals[t] : 0);
    {BARRIER}
    out[t] = mine + totals[simdgroup_index_in_threadgroup];
"""


def test_prefix_sum_over_simd_groups(mode: str):
    a = mx.random.randint(-9, 9, (512,))
    out = run(T + SIMD_SCAN, {"a": a}, threads=512, threadgroup=512, shape=(512,), dtype=mx.int32)
    assert mx.array_equal(out, mx.cumsum(a))


TRANSPOSE = f"""
    threadgroup float tile[16][17];
    uint2 at = thread_position_in_grid.xy, in = thread_position_in_threadgroup.xy;
    uint2 corner = threadgroup_position_in_grid.xy * 16;
    if (at.x < COLUMNS && at.y < ROWS) tile[in.y][in.x] = a[at.y * COLUMNS + at.x];
    {BARRIER}
    uint2 to = corner.yx + in;
    if (to.x < ROWS && to.y < COLUMNS) out[to.y * ROWS + to.x] = tile[in.x][in.y];
"""


@pytest.mark.parametrize("rows, columns", [(32, 48), (33, 20)])
def test_transpose_in_tiles(mode: str, rows: int, columns: int):
    a = mx.random.normal((rows, columns))
    out = run(
        TRANSPOSE,
        {"a": a},
        threads=(-(-columns // 16) * 16, -(-rows // 16) * 16, 1),
        threadgroup=(16, 16, 1),
        shape=(columns, rows),
        template=[("ROWS", rows), ("COLUMNS", columns)],
    )
    assert mx.array_equal(out, a.T)
    if mode == "checked":
        assert offmetal.last_result.traffic["a"]["read"] == a.nbytes


MATMUL = """
    // a SIMD-group makes 16 x 16 of the product
    uint row = threadgroup_position_in_grid.y * 16, column = threadgroup_position_in_grid.x * 16;
    simdgroup_matrix<float, 8, 8> sum[2][2];
    for (int r = 0; r < 2; r++)
        for (int c = 0; c < 2; c++) sum[r][c] = make_filled_simdgroup_matrix<float, 8>(0.0f);
    for (int k = 0; k < K; k += 8) {
        simdgroup_matrix<T, 8, 8> x[2], y[2];
        for (int r = 0; r < 2; r++) simdgroup_load(x[r], a + (row + 8 * r) * K + k, K);
        for (int c = 0; c < 2; c++) simdgroup_load(y[c], b + k * N + column + 8 * c, N);
        for (int r = 0; r < 2; r++)
            for (int c = 0; c < 2; c++) simdgroup_multiply_accumulate(sum[r][c], x[r], y[c], sum[r][c]);
    }
    for (int r = 0; r < 2; r++)
        for (int c = 0; c < 2; c++) simdgroup_store(sum[r][c], out + (row + 8 * r) * N + column + 8 * c, N);
"""


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_matrix_product(mode: str, dtype: mx.Dtype):
    m, n, k = 32, 48, 40
    a, b = mx.random.normal((m, k)).astype(dtype), mx.random.normal((k, n)).astype(dtype)
    out = run(
        MATMUL,
        {"a": a, "b": b},
        threads=(n // 16 * 32, m // 16, 1),
        threadgroup=(32, 1, 1),
        shape=(m, n),
        template=[("T", dtype), ("N", n), ("K", k)],
    )
    # float32 sums of 40 products, in another order
    close(out, a.astype(mx.float32) @ b.astype(mx.float32), 1e-6)


HISTOGRAM = f"""
    threadgroup atomic_uint bins[16];
    if (t < 16) atomic_store_explicit(&bins[t], 0u, memory_order_relaxed);
    {BARRIER}
    atomic_fetch_add_explicit(&bins[a[i]], 1u, memory_order_relaxed);
    {BARRIER}
    if (t < 16) atomic_fetch_add_explicit(&out[t], atomic_load_explicit(&bins[t], memory_order_relaxed),
                                          memory_order_relaxed);
"""


def test_histogram_with_atomics(mode: str):
    a = mx.random.randint(0, 16, (500,)).astype(mx.uint32)
    out = run(
        T + HISTOGRAM,
        {"a": a},
        threads=500,
        threadgroup=128,
        shape=(16,),
        dtype=mx.uint32,
        init_value=0,
        atomic_outputs=True,
    )
    assert out.tolist() == np.bincount(np.array(a), minlength=16).tolist()


BITONIC = f"""
    threadgroup float s[512];
    s[t] = a[t];
    {BARRIER}
    for (uint length = 2; length <= 512; length *= 2)
        for (uint distance = length / 2; distance; distance /= 2) {{
            uint other = t ^ distance;
            float x = s[t], y = s[other];
            {BARRIER}
            bool up = (t & length) == 0, lower = t < other;
            s[t] = (up == lower) ? min(x, y) : max(x, y);
            {BARRIER}
        }}
    out[t] = s[t];
"""


def test_bitonic_sort(mode: str):
    a = mx.random.normal((512,))
    out = run(T + BITONIC, {"a": a}, threads=512, threadgroup=512, shape=(512,))
    assert mx.array_equal(out, mx.sort(a))


SOFTMAX = f"""
    threadgroup float parts[32];
    uint row = threadgroup_position_in_grid.y, group = simdgroup_index_in_threadgroup;
    bool first = thread_index_in_simdgroup == 0;
    float largest = -INFINITY;
    for (uint k = t; k < N; k += threads_per_threadgroup.x) largest = max(largest, a[row * N + k]);
    largest = simd_max(largest);
    if (first) parts[group] = largest;
    {BARRIER}
    for (uint g = 0; g < simdgroups_per_threadgroup; g++) largest = max(largest, parts[g]);
    {BARRIER}
    float sum = 0;
    for (uint k = t; k < N; k += threads_per_threadgroup.x) sum += exp(a[row * N + k] - largest);
    sum = simd_sum(sum);
    if (first) parts[group] = sum;
    {BARRIER}
    sum = 0;
    for (uint g = 0; g < simdgroups_per_threadgroup; g++) sum += parts[g];
    for (uint k = t; k < N; k += threads_per_threadgroup.x) out[row * N + k] = exp(a[row * N + k] - largest) / sum;
"""


@pytest.mark.parametrize("size", [1000, 37])
def test_softmax(mode: str, size: int):
    a = mx.random.normal((3, size)) * 20
    out = run(
        T + SOFTMAX,
        {"a": a},
        threads=(96, 3, 1),
        threadgroup=(96, 1, 1),
        shape=(3, size),
        template=[("N", size)],
    )
    close(out, mx.softmax(a, axis=-1), 1e-6)  # two exponentials, each rounded once


QUANTIZED = """
    // y = W x, W in 4 bits as mx.quantize packs it, groups of 64; a SIMD-group makes 4 rows, a lane takes 8 weights
    constexpr int WORDS = K / 8, GROUPS = K / 64;
    uint lane = thread_index_in_simdgroup;
    uint first = (threadgroup_position_in_grid.x * simdgroups_per_threadgroup + simdgroup_index_in_threadgroup) * 4;
    float sums[4] = {0};
    for (int w = lane; w < WORDS; w += 32) {
        const device vec<T, 4>* p = (const device vec<T, 4>*)(x + w * 8);
        float4 low = float4(p[0]), high = float4(p[1]);
        float sum = dot(low, float4(1)) + dot(high, float4(1));
        for (int r = 0; r < 4; r++) {
            uint q = weights[(first + r) * WORDS + w];
            float4 a = float4(q & 15, (q >> 4) & 15, (q >> 8) & 15, (q >> 12) & 15);
            float4 b = float4((q >> 16) & 15, (q >> 20) & 15, (q >> 24) & 15, q >> 28);
            int g = (first + r) * GROUPS + w / 8;
            sums[r] += float(scales[g]) * (dot(a, low) + dot(b, high)) + float(biases[g]) * sum;
        }
    }
    for (int r = 0; r < 4; r++) {
        float v = simd_sum(sums[r]);
        if (lane == 0) out[first + r] = T(v);
    }
"""


@pytest.mark.parametrize(
    "dtype, tolerance",  # one rounding of the result
    [(mx.float32, 1e-5), (mx.float16, 1e-3), (mx.bfloat16, 8e-3)],
    ids=["float32", "float16", "bfloat16"],
)
def test_quantized_matrix_vector_product(mode: str, dtype: mx.Dtype, tolerance: float):
    n, k = 64, 512
    weights, scales, biases = mx.quantize(mx.random.normal((n, k)) * k**-0.5, group_size=64, bits=4)
    scales, biases, x = scales.astype(dtype), biases.astype(dtype), mx.random.normal((k,)).astype(dtype)
    inputs = {"weights": weights, "scales": scales, "biases": biases, "x": x}
    out = run(QUANTIZED, inputs, threads=512, threadgroup=64, dtype=dtype, template=[("T", dtype), ("K", k)])
    exact = mx.dequantize(
        weights, scales.astype(mx.float32), biases.astype(mx.float32), group_size=64, bits=4
    )
    close(out, exact @ x.astype(mx.float32), tolerance)
    if mode != "fast":
        traffic = offmetal.last_result.traffic
        assert traffic["weights"]["read"] == traffic["weights"]["touched"] == n * k // 2  # each weight once
        assert traffic["x"]["read"] == n // 4 * x.nbytes  # once by each SIMD-group
