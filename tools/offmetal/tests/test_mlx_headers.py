"""MLX's own Metal kernels, the headers in its wheel as they are, against its CPU ops: quantized products, steel GEMM
with simdgroup matrices, attention, softmax, sort."""

from __future__ import annotations

import mlx.core as mx
import pytest

import offmetal
from offmetal.tests.support import close

pytestmark = pytest.mark.slow

# a rounding of each partial sum to the dtype, of the largest value
TOLERANCE = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 4e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float16", "bfloat16"])
INC = '#include "mlx/backend/metal/kernels/%s.h"\n'
QUANT = INC % "steel/gemm/gemm" + INC % "quantized_utils" + INC % "quantized"


def exact(x, w, s, b, gs, bits):
    f = mx.float32
    return x.astype(f) @ mx.dequantize(w, s.astype(f), b.astype(f), group_size=gs, bits=bits).T


def quantized(dtype, N, K, gs, bits):
    w, s, b = mx.quantize(mx.random.normal((N, K)) * K**-0.5, group_size=gs, bits=bits)
    return w, s.astype(dtype), b.astype(dtype)


@DTYPES
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_qmv_fast(mode: str, dtype: mx.Dtype, bits: int):
    N, K, gs = 16, 1024, 64
    w, s, b = quantized(dtype, N, K, gs, bits)
    x = mx.random.normal((2, K)).astype(dtype)
    k = offmetal.emulated_kernel(
        name="qmv_fast",
        input_names=["w", "scales", "biases", "x", "K", "N"],
        output_names=["y"],
        header=QUANT,
        source="""qmv_fast_impl<T, GS, BITS>(w, scales, biases, x, y, K, N, threadgroup_position_in_grid,
            simdgroup_index_in_threadgroup, thread_index_in_simdgroup);""",
    )
    y = k(
        inputs=[w, s, b, x, K, N],
        template=[("T", dtype), ("GS", gs), ("BITS", bits)],
        grid=(2 * 32, N // 8 * 2, 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(2, N)],
        output_dtypes=[dtype],
    )[0]
    close(y, exact(x, w, s, b, gs, bits), TOLERANCE[dtype])


@DTYPES
def test_qmm_t(mode: str, dtype: mx.Dtype):
    """A tiled quantized matmul: threadgroup tiles, barriers, simdgroup matrices."""
    M, N, K, gs, bits = 37, 64, 128, 32, 4
    w, s, b = quantized(dtype, N, K, gs, bits)
    x = mx.random.normal((M, K)).astype(dtype)
    k = offmetal.emulated_kernel(
        name="qmm_t",
        input_names=["w", "scales", "biases", "x", "K", "N", "M"],
        output_names=["y"],
        header=QUANT,
        source="""
        constexpr int BM = 32, BN = 32, BK = 32;
        constexpr int BK_padded = (BK + 16 / sizeof(T));
        threadgroup T Xs[BM * BK_padded];
        threadgroup T Ws[BN * BK_padded];
        qmm_t_impl<T, GS, BITS, true, T, BM, BK, BN>(w, scales, biases, x, y, Xs, Ws, K, N, M, K,
            threadgroup_position_in_grid, thread_index_in_threadgroup, simdgroup_index_in_threadgroup,
                thread_index_in_simdgroup);""",
    )
    y = k(
        inputs=[w, s, b, x, K, N, M],
        template=[("T", dtype), ("GS", gs), ("BITS", bits)],
        grid=(-(-N // 32) * 32, -(-M // 32) * 2, 2),
        threadgroup=(32, 2, 2),
        output_shapes=[(M, N)],
        output_dtypes=[dtype],
    )[0]
    close(y, exact(x, w, s, b, gs, bits), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("M,N,K", [(64, 64, 64), (50, 70, 40)])
def test_steel_gemm(mode: str, dtype: mx.Dtype, M: int, N: int, K: int):
    a, b = mx.random.normal((M, K)).astype(dtype), mx.random.normal((K, N)).astype(dtype)
    aligned = M % 32 == 0 and N % 32 == 0
    k = offmetal.emulated_kernel(
        name="steel",
        input_names=["A", "B"],
        output_names=["D"],
        header=INC % "steel/gemm/gemm",
        source="""
        using namespace mlx::steel;
        using G = GEMMKernel<T, T, 32, 32, 16, 2, 2, false, false, MNA, KA>;
        static constexpr constant GEMMParams params[1] = {
            {M, N, K, K, N, N, (N + 31) / 32, (M + 31) / 32, 0, 0, 0, 0, K / 16, 1}};
        threadgroup T As[G::tgp_mem_size_a];
        threadgroup T Bs[G::tgp_mem_size_b];
        G::run(A, B, D, params, As, Bs, thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
               threadgroup_position_in_grid, thread_position_in_threadgroup);""",
    )
    d = k(
        inputs=[a, b],
        template=[("T", dtype), ("M", M), ("N", N), ("K", K), ("MNA", aligned), ("KA", K % 16 == 0)],
        grid=(-(-N // 32) * 32, -(-M // 32) * 2, 2),
        threadgroup=(32, 2, 2),
        output_shapes=[(M, N)],
        output_dtypes=[dtype],
    )[0]
    close(d, a @ b, TOLERANCE[dtype])


@DTYPES
def test_softmax(mode: str, dtype: mx.Dtype):
    x = mx.random.normal((3, 1000)).astype(dtype)
    k = offmetal.emulated_kernel(
        name="softmax",
        input_names=["x", "n"],
        output_names=["out"],
        header=INC % "defines" + INC % "softmax",
        source="""softmax_looped<T, float>(x, out, (constant int&)n, threadgroup_position_in_grid.x,
            thread_position_in_threadgroup.x, threads_per_threadgroup.x, thread_index_in_simdgroup,
                simdgroup_index_in_threadgroup);""",
    )
    y = k(
        inputs=[x, 1000],
        template=[("T", dtype)],
        grid=(1024 * 3, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[dtype],
    )[0]
    close(y, mx.softmax(x, axis=-1, precise=True), TOLERANCE[dtype])


def test_sort(mode: str):
    x = mx.random.normal((2, 500))
    k = offmetal.emulated_kernel(
        name="sort",
        input_names=["x", "n", "one", "stride"],
        output_names=["out"],
        header=INC % "sort",
        source="""block_sort<float, float, false, 128, 4>(x, out, n, one, one, stride, stride,
            threadgroup_position_in_grid, thread_position_in_threadgroup);""",
    )
    y = k(
        inputs=[x, 500, 1, 500],
        grid=(128, 2, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]
    assert mx.array_equal(y, mx.sort(x, axis=-1))


@DTYPES
def test_sdpa_vector(mode: str, dtype: mx.Dtype):
    """Decode attention; its function constants read as 0."""
    B, H, HK, N, D = 1, 4, 2, 37, 64
    q, k, v = (mx.random.normal(s).astype(dtype) for s in ((B, H, 1, D), (B, HK, N, D), (B, HK, N, D)))
    kern = offmetal.emulated_kernel(
        name="sdpa",
        input_names=["q", "k", "v", "gqa", "N", "hs", "ss", "scale", "m"],
        output_names=["out"],
        header=INC % "sdpa_vector",
        source="""sdpa_vector<T, 64>(q, k, v, out, gqa, N, hs, ss, hs, ss, scale, (const device bool*)q, q, m, m, m, q,
            m, threadgroup_position_in_grid, threadgroups_per_grid, simdgroup_index_in_threadgroup,
                thread_index_in_simdgroup);""",
    )
    steps = [mx.array(step, mx.uint64) for step in (N * D, D)]
    with offmetal.options(lint=False):  # a cast in the call line is MLX's business
        out = kern(
            inputs=[q, k, v, H // HK, N, *steps, D**-0.5, 0],
            template=[("T", dtype)],
            grid=(B * H * 1024, 1, 1),
            threadgroup=(1024, 1, 1),
            output_shapes=[q.shape],
            output_dtypes=[dtype],
        )[0]
    f = mx.float32
    close(
        out,
        mx.fast.scaled_dot_product_attention(q.astype(f), k.astype(f), v.astype(f), scale=D**-0.5),
        TOLERANCE[dtype],
    )
