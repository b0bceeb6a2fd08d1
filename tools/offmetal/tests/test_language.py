"""What the library covers of Metal's language, and that it means what it means on Metal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import offmetal
from offmetal.tests.support import close, run

X = np.random.default_rng(0).standard_normal(32).astype(np.float32)
POSITION = "uint i = thread_position_in_grid.x;\n"

SIMD: dict[str, Callable[[Any], Any]] = {
    "simd_sum(x)": lambda x: x.sum(),
    "simd_max(x)": lambda x: x.max(),
    "simd_min(x)": lambda x: x.min(),
    "simd_product(x)": lambda x: x.prod(),
    "simd_prefix_inclusive_sum(x)": np.cumsum,
    "simd_prefix_exclusive_sum(x)": lambda x: np.cumsum(x) - x,
    "simd_prefix_inclusive_product(x)": np.cumprod,
    "simd_prefix_exclusive_product(x)": lambda x: np.cumprod(x) / x,
    "simd_shuffle(x, 31 - i)": lambda x: x[::-1],
    "simd_shuffle_xor(x, 5)": lambda x: x[np.arange(32) ^ 5],
    "simd_shuffle_up(x, 3)": lambda x: np.concatenate([x[:3], x[:-3]]),
    "simd_shuffle_down(x, 3)": lambda x: np.concatenate([x[3:], x[-3:]]),
    "simd_shuffle_rotate_up(x, 3)": lambda x: np.roll(x, 3),
    "simd_shuffle_rotate_down(x, 3)": lambda x: np.roll(x, -3),
    "simd_shuffle_and_fill_down(x, -x, 3)": lambda x: np.concatenate([x[3:], -x[:3]]),
    "simd_shuffle_and_fill_up(x, -x, 3)": lambda x: np.concatenate([-x[-3:], x[:-3]]),
    "simd_broadcast(x, 9)": lambda x: x[9],
    "simd_broadcast_first(x)": lambda x: x[0],
    "quad_sum(x)": lambda x: x.reshape(8, 4).sum(1).repeat(4),
    "quad_max(x)": lambda x: x.reshape(8, 4).max(1).repeat(4),
    "quad_shuffle_xor(x, 1)": lambda x: x[np.arange(32) ^ 1],
    "quad_broadcast(x, 2)": lambda x: x.reshape(8, 4)[:, 2].repeat(4),
    "float(simd_all(x < 9))": lambda x: 1.0,
    "float(simd_any(x > 9))": lambda x: 0.0,
    "float(simd_is_first())": lambda x: (np.arange(32) == 0) * 1.0,
    "float(popcount(uint(ulong(simd_ballot(x > 0)))))": lambda x: (x > 0).sum(),
    "simd_sum(float2(x, 1)).y": lambda x: 32.0,
    "simd_shuffle(float4(x), 3).w": lambda x: x[3],
    "float(simd_sum(half(1)))": lambda x: 32.0,
}


def test_simd_operations(mode: str):
    lines = "\n".join(f"out[{k * 32} + i] = {expression};" for k, expression in enumerate(SIMD))
    out = run(f"{POSITION}float x = a[i];\n{lines}", {"a": mx.array(X)}, threads=32, shape=(len(SIMD), 32))
    # scans and trees add in another order than NumPy
    wrong = [
        expression
        for row, (expression, reference) in zip(np.array(out), SIMD.items(), strict=True)
        if not np.allclose(row, reference(X), rtol=2e-6, atol=2e-6)
    ]
    assert wrong == []


def test_simd_integers(mode: str):
    values = np.arange(32, dtype=np.int32) * 37 % 101
    source = POSITION + "\n".join(
        f"out[{k * 32} + i] = {what};"
        for k, what in enumerate(
            ["simd_and(a[i])", "simd_or(a[i])", "simd_xor(a[i])", "simd_max(uchar(a[i]))"]
        )
    )
    out = run(source, {"a": mx.array(values)}, threads=32, shape=(4, 32), dtype=mx.int32)
    folds = [np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.maximum]
    assert out[:, 7].tolist() == [int(fold.reduce(values)) for fold in folds]


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_only_active_lanes_take_part(order: str):
    """Both sides of a branch reduce over their own lanes, and a loop with another length in each lane over those that
    are still in it."""
    source = """
        out[i] = i % 4 == 0 ? 0.0f : -1.0f;
        if (i % 4 == 0) out[i] = simd_sum(1.0f); else out[i] = simd_sum(10.0f);
        float s = 0;
        for (uint j = 0; j <= i; j++) s += simd_sum(1.0f);
        out[32 + i] = s;
        s = 0;
        if (i < 7) { s += simd_sum(1.0f); s += simd_sum(1.0f); }
        s += simd_sum(100.0f);
        out[64 + i] = s;
    """
    with offmetal.options(order=order, seed=5):
        out = run(POSITION + source, threads=32, shape=(3, 32)).tolist()
    assert out[0] == [8.0, 240.0, 240.0, 240.0] * 8
    assert out[1] == [float(sum(32 - j for j in range(i + 1))) for i in range(32)]
    # lanes that skipped a branch wait for the others at the next operation
    assert out[2] == [3214.0] * 7 + [3200.0] * 25


def test_functions_called_from_two_places(mode: str):
    header = "inline float total(float v) { return simd_sum(v) + 1; }"
    source = "float r; if (i < 10) r = total(1.0f); else { r = total(2.0f); } out[i] = r;"
    out = run(POSITION + source, threads=32, shape=(32,), header=header)
    assert out.tolist() == [11.0] * 10 + [45.0] * 22


VECTORS = """
    float4 v = float4(1, 2, 3, 4), w(float2(5, 6), 7, 8);
    v.xy = w.zw;             // 7 8 3 4
    v.zx += 10;              // 17 8 13 4
    w *= 2; w = w + v;       // 27 20 27 20
    float3 c = w.xxy;
    int4 k = int4(w) / 4;    // 6 5 6 5
    half4 h = half4(w) * half(0.5);
    bool4 m = v > float4(9);
    vec<float, 2> q = vec<float, 2>(v.w, dot(v, w));
    uchar4 u = as_type<uchar4>(0x04030201u);
    packed_float3 p = c;
    auto chosen = select(v, w, m);
    float r[20] = {v.x, v.y, v.z, v.w, c.z, float(k.x), float(h.y), q.x, q.y, float(u.z), p[1], chosen.x, chosen.y,
                   float(any(m)), float(all(m)), max(v, w).y, length(float2(3, 4)), clamp(v, float4(1), float4(5)).x,
                   abs(-v).x, v[2]};
    for (int j = 0; j < 20; j++) out[j] = r[j];
"""


def test_vectors(mode: str):
    out = run(VECTORS, threads=1, shape=(20,))
    dot = 17 * 27 + 8 * 20 + 13 * 27 + 4 * 20
    assert out.tolist() == [17, 8, 13, 4, 20, 6, 10, 4, dot, 3, 27, 27, 8, 1, 0, 20, 5, 5, 17, 13]


def test_vector_loads_and_conditionals(mode: str):
    a = mx.random.normal((64,)).astype(mx.float16)
    source = """
        const device half4* p = (const device half4*)a;
        half4 v = i < 8 ? p[i] : half4(0);
        half4 w = i % 2 // the conditional goes on
            ? v
            : v * half4(2);  // here
        ((device float4*)out)[i] = float4(w);
    """
    expected = np.array(a).astype(np.float32).reshape(16, 4)
    expected[8:] = 0
    expected[0::2] *= 2
    assert np.array_equal(np.array(run(POSITION + source, {"a": a}, threads=16)).reshape(16, 4), expected)


def test_half_rounds_after_each_operation(mode: str):
    a = mx.random.normal((256,)).astype(mx.float16)
    source = "half x = a[i]; half y = x * x; half z = y + x; out[i] = z - half(0.1f);"
    out = run(POSITION + source, {"a": a}, threads=256, shape=(256,), dtype=mx.float16)
    x = np.array(a)
    assert np.array_equal(np.array(out), x * x + x - np.float16(0.1))


def test_bfloat_rounds_after_each_operation(mode: str):
    def rounded(x: mx.array) -> mx.array:
        return x.astype(mx.bfloat16)

    a = rounded(mx.random.normal((256,)))
    source = "T x = a[i]; out[i] = x * x + x; float f = x; out[i] = T(f + 1.0bf) * out[i];"
    out = run(
        POSITION + source,
        {"a": a},
        threads=256,
        shape=(256,),
        dtype=mx.bfloat16,
        template=[("T", mx.bfloat16)],
    )
    first, second = rounded(rounded(a * a) + a), rounded(a.astype(mx.float32) + 1)
    assert mx.array_equal(out, rounded(second.astype(mx.float32) * first.astype(mx.float32)))


STRUCTS = """
constant float TABLE[4] = {0.5f, 1.5f, 2.5f, 3.5f};
struct Pair { uchar a; half b; };
struct Sum {
    float s = 0;
    void add(float v) thread { s += v; }
    thread float& ref() thread { return s; }
};
template <int N, typename T> METAL_FUNC void fill(thread T (&v)[N], T x) { for (int j = 0; j < N; j++) v[j] = x; }
inline float first(const device Pair* p) { Pair q = p[0]; return float(q.b) + q.a; }
"""


def test_structs_references_and_constants(mode: str):
    packed = np.zeros(4, np.uint8)
    packed[0], packed[2:] = 3, np.frombuffer(np.float16(1.25).tobytes(), np.uint8)
    source = """
        float v[3]; fill(v, TABLE[i % 4]);
        Sum sum; sum.add(v[2]); sum.ref() += 1;
        out[i] = sum.s + first((const device Pair*)p);
    """
    out = run(POSITION + source, {"p": mx.array(np.tile(packed, 8))}, threads=32, shape=(32,), header=STRUCTS)
    assert out.tolist() == [value + 4.25 for value in [1.5, 2.5, 3.5, 4.5] * 8]


def test_threadgroups_at_the_edge_of_the_grid_are_smaller(mode: str):
    source = """
        out[i * 4 + 0] = threads_per_threadgroup.x;
        out[i * 4 + 1] = dispatch_threads_per_threadgroup.x;
        out[i * 4 + 2] = simdgroup_index_in_threadgroup * 100 + thread_index_in_simdgroup;
        out[i * 4 + 3] = threadgroup_position_in_grid.x * 100 + threadgroups_per_grid.x;
    """
    out = run(POSITION + source, threads=100, threadgroup=48, shape=(100, 4), dtype=mx.uint32).tolist()
    assert out[0] == [48, 48, 0, 3]
    assert out[47] == [48, 48, 115, 3]
    assert out[99] == [4, 48, 3, 203]


def test_inputs_and_their_descriptions(mode: str):
    """Strided inputs, scalars by reference, less than eight elements in constant memory."""
    a = mx.arange(24).reshape(4, 6).astype(mx.int32).T[::2]
    source = """
        uint row = i / 4, column = i % 4;
        out[i] = a[row * a_strides[0] + column * a_strides[1]] * scale + few[column % few_shape[0]] + a_ndim;
    """
    inputs = {"a": a, "scale": mx.array(100), "few": mx.array([10, 20, 30])}
    out = run(
        POSITION + source, inputs, threads=12, shape=(3, 4), dtype=mx.int32, ensure_row_contiguous=False
    )
    expected = a * 100 + mx.array([10, 20, 30, 10]) + 2
    assert mx.array_equal(out, expected)


def test_math_functions(mode: str):
    x = mx.random.uniform(0.1, 2.0, (64,))
    functions = {
        "exp": mx.exp,
        "log": mx.log,
        "sqrt": mx.sqrt,
        "rsqrt": mx.rsqrt,
        "tanh": mx.tanh,
        "sin": mx.sin,
        "exp2": lambda v: mx.power(2.0, v),
        "floor": mx.floor,
    }
    spaces = ("metal::", "fast::", "precise::", "")
    calls = [f"{space}{name}" for name in functions for space in spaces]
    source = POSITION + "\n".join(f"out[{k * 64} + i] = {call}(x[i]);" for k, call in enumerate(calls))
    out = run(source, {"x": x}, shape=(len(calls), 64))
    # one rounding of another library
    close(out, mx.stack([f(x) for f in functions.values() for _ in spaces]), 1e-6)


def test_simdgroup_matrices(mode: str):
    a = mx.random.normal((8, 8))
    source = """
        simdgroup_float8x8 x, d(2.0f), c;
        simdgroup_load(x, a, 8, ulong2(0, 0), true);
        simdgroup_multiply(c, x, d);
        c.thread_elements()[0] += 1; c.thread_elements()[1] += 1;
        threadgroup float t[64];
        simdgroup_store(c, t, 8);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (uint j = thread_index_in_simdgroup; j < 64; j += 32) out[j] = t[j];
    """
    assert mx.array_equal(run(source, {"a": a}, threads=32, shape=(8, 8)), 2 * a.T + 1)


def test_one_rounding_or_two():
    """Metal may round a * b + c once; both ways can be tried."""
    inputs = {"a": mx.array([1 + 2.0**-12] * 32), "b": mx.array([-(1 + 2.0**-11)] * 32)}
    source = POSITION + "float x = a[i]; out[i] = x * x + b[i];"
    assert run(source, inputs, threads=32, shape=(32,))[0].item() == 0
    with offmetal.options(fma=True):
        assert run(source, inputs, threads=32, shape=(32,))[0].item() == 2.0**-24


def test_traffic():
    source = POSITION + "out[i] = a[i] + a[0] + (i % 2 ? a[63] : 0.0f);"
    run(source, {"a": mx.ones((64,))})
    traffic = offmetal.last_result.traffic
    assert traffic["a"] == {"read": 64 * 4 + 64 * 4 + 32 * 4, "written": 0, "touched": 256}
    assert traffic["out"] == {"read": 0, "written": 256, "touched": 256}


def test_launches_are_counted_and_recorded():
    before = offmetal.launches()
    with offmetal.recording() as records:
        run("out[0] = N;", threads=1, shape=(1,), template=[("N", 3)], name="counted")
        run("out[0] = N;", threads=1, shape=(1,), template=[("N", 4)], name="counted")
    run("out[0] = 1;", threads=1, shape=(1,), name="counted")
    assert offmetal.launches() - before == {"counted": 3}
    assert [record.template for record in records] == [(("N", 3),), (("N", 4),)]
    assert records[0].buffers == {"out": ("mlx.core.float32", (1,), 4)}
    assert "template <int N>" in records[0].signature.metal


def test_kernels_that_are_built_at_import():
    with offmetal.installed():
        assert mx.metal.is_available()
        kernel = mx.fast.metal_kernel("k", [], ["out"], "out[0] = 5;")
    out = kernel(
        inputs=[], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)], output_dtypes=[mx.int32]
    )
    assert out[0].item() == 5
