"""Kernels that others wrote and run: those of mlx-lm, against its own ops."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import mlx.core as mx
import mlx.nn
import pytest

import offmetal
from offmetal.tests.support import close

pytestmark = pytest.mark.parity

# the ops round after each step where the kernels keep float32, or the other way round
TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float16", "bfloat16"])


@cache
def load(name: str) -> ModuleType:
    """A module of mlx-lm, whose kernels are built when it is imported: a copy, since others may have imported it
    without the simulator, and have none."""
    spec = importlib.util.find_spec(f"mlx_lm.{name}")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with offmetal.installed():
        spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


def delta_inputs(dtype, B, T, Hk, Hv, Dk, Dv, vector_gate=False):
    n = mx.random.normal
    q, k = n((B, T, Hk, Dk)) * Dk**-0.5, n((B, T, Hk, Dk)) * Dk**-0.5
    g = mx.random.uniform(0.8, 1.0, (B, T, Hv) + ((Dk,) if vector_gate else ()))
    beta = mx.random.uniform(0, 1, (B, T, Hv))
    return (
        q.astype(dtype),
        k.astype(dtype),
        n((B, T, Hv, Dv)).astype(dtype),
        g,
        beta.astype(dtype),
        n((B, Hv, Dv, Dk)),
    )


@DTYPES
@pytest.mark.parametrize("vector_gate", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gated_delta(mode: str, dtype: mx.Dtype, vector_gate: bool, masked: bool):
    gated_delta = load("models.gated_delta")
    x = delta_inputs(dtype, 2, 5, 2, 4, 64, 8, vector_gate)
    mask = mx.random.uniform(shape=(2, 5)) > 0.3 if masked else None
    y, s = gated_delta.gated_delta_kernel_unpacked(*x, mask)
    y_ref, s_ref = gated_delta.gated_delta_ops(*x, mask)
    if masked:
        y_ref = mx.where(mask[:, :, None, None], y_ref, 0)
    close(y, y_ref, TOLERANCE[dtype])
    close(s, s_ref, TOLERANCE[dtype])


@DTYPES
def test_gated_delta_packed_is_bitwise_the_explicit_tree(mode: str, dtype: mx.Dtype):
    """The property that mlx_lm claims for real GPUs: packed, explicit tree and
    simd_sum kernels give the same bits."""
    gated_delta = load("models.gated_delta")
    x = delta_inputs(dtype, 1, 4, 2, 2, 128, 16)
    x = (*x[:3], x[3].astype(mx.float32), *x[4:])
    packed = gated_delta.gated_delta_kernel(*x)
    tree = gated_delta.gated_delta_kernel_xtree(*x)
    simd = gated_delta.gated_delta_kernel_unpacked(*x)
    for a, b, c in zip(packed, tree, simd, strict=True):
        assert mx.array_equal(a, b) and mx.array_equal(b, c)
    close(packed[0], gated_delta.gated_delta_ops(*x)[0], TOLERANCE[dtype])


@DTYPES
def test_ssm(mode: str, dtype: mx.Dtype):
    ssm = load("models.ssm")
    n, h, d, ds, hb = 2, 4, 8, 64, 4
    x = mx.random.normal((n, 1, h, d)).astype(dtype)
    A_log, D, dt_bias = (mx.random.normal((h,)) for _ in range(3))
    B, C = (mx.random.normal((n, 1, hb, ds)).astype(dtype) for _ in range(2))
    dt = mx.random.normal((n, 1, h))
    state = mx.random.normal((n, h, d, ds))
    args = (x, A_log, B, C, D, dt, dt_bias, state, (0.001, 100.0))
    y, s = ssm.ssm_update_kernel(*args)
    y_ref, s_ref = ssm.ssm_attn(*args)
    close(y, y_ref, TOLERANCE[dtype])
    close(s, s_ref, TOLERANCE[dtype])


def test_rwkv7(mode: str):
    rwkv7 = load("models.rwkv7")
    B, T, H, D = 1, 3, 2, 64
    r, w, k, v, a, b = (mx.random.normal((B, T, H, D)) * D**-0.5 for _ in range(6))
    state = mx.random.normal((B, H, D, D))
    y, s = rwkv7.wkv7_kernel(r, w, k, v, a, b, state)
    ref, st = [], state
    for t in range(T):
        o, st = rwkv7._wkv7_step_ops(*(z[:, t] for z in (r, w, k, v, a, b)), st)
        ref.append(o)
    close(y, mx.stack(ref, 1).squeeze(-1), 2e-5)
    close(s, st, 2e-5)


@DTYPES
@pytest.mark.parametrize("invert", [False, True])
def test_bitlinear(mode: str, dtype: mx.Dtype, invert: bool):
    bitlinear = load("models.bitlinear_layers")
    layer = bitlinear.BitLinear(256, 16, bias=False, invert_weight_scales=invert)
    layer.weight = mx.random.randint(0, 256, layer.weight.shape).astype(mx.uint8)
    layer.weight = layer.weight & 0b10101010 & ~(layer.weight << 1) | (layer.weight & 0b01010101)
    layer.weight_scale = mx.array([1.7], dtype)
    x = mx.random.normal((3, 256)).astype(dtype)
    w = mx.concatenate([((layer.weight >> (2 * i)) & 3).astype(mx.float32) - 1 for i in range(4)])
    ref = (x.astype(mx.float32) @ w.T) * ((1 / 1.7) if invert else 1.7)
    close(layer(x), ref, TOLERANCE[dtype])


@DTYPES
def test_kimi_attn_res(mode: str, dtype: mx.Dtype):
    kimi = load("models.kimi_k3")
    K, N, D = 3, 4, 640
    blocks = kimi.ResidualBlocks(1e-5)
    for _ in range(K):
        blocks.append(mx.random.normal((1, N, D)).astype(dtype))
    partial, w = mx.random.normal((1, N, D)).astype(dtype), mx.random.normal((D,)) * D**-0.5
    out = kimi._attn_res_kernel(
        inputs=[blocks.raw, blocks.inv_rms, partial, w, mx.array([1e-5]), N],
        template=[("InT", dtype), ("K", K), ("D", D), ("THREADS", 512)],
        grid=(512, N, 1),
        threadgroup=(512, 1, 1),
        output_shapes=[partial.shape],
        output_dtypes=[dtype],
    )[0]
    close(out, kimi._attn_res_combine(blocks.raw, blocks.inv_rms, partial, w, 1e-5), TOLERANCE[dtype])


def test_deepseek_sinkhorn(mode: str):
    deepseek = load("models.deepseek_v41")
    comb = mx.random.uniform(0.1, 1, (7, 4, 4))
    eps = mx.array([1e-6])
    out = deepseek._sinkhorn_kernel(
        inputs=[comb, eps],
        template=[("HC", 4), ("ITERS", 5)],
        grid=(7, 1, 1),
        threadgroup=(7, 1, 1),
        output_shapes=[comb.shape],
        output_dtypes=[mx.float32],
    )[0]
    ref = comb / (comb.sum(-2, keepdims=True) + eps)
    for _ in range(4):
        ref = ref / (ref.sum(-1, keepdims=True) + eps)
        ref = ref / (ref.sum(-2, keepdims=True) + eps)
    close(out, ref, 1e-6)


@pytest.mark.parametrize("E,K", [(48, 4), (128, 8)])
def test_expert_routing(mode: str, E: int, K: int):
    kernels = load("kernels")
    logits, bias = mx.random.normal((5, E)), mx.random.normal((E,)) * 0.1
    inds, w = kernels.expert_routing(logits, bias, top_k=K, multiplier=1.3, score_eps=1e-6, route_scale=2.5)
    score = mx.sigmoid(logits * 1.3)
    order = mx.argsort(-(score + bias), axis=-1)[:, :K]
    assert mx.array_equal(inds, order.astype(mx.uint32))
    s = mx.take_along_axis(score, order, axis=-1)
    close(w, s / (s.sum(-1, keepdims=True) + 1e-6) * 2.5, 1e-5)


@DTYPES
@pytest.mark.parametrize("D", [96, 1536])
def test_norm_add_norm(mode: str, dtype: mx.Dtype, D: int):
    kernels = load("kernels")
    n = mx.random.normal
    branch, stream = n((3, D)).astype(dtype), n((3, D))
    alpha, beta = n((D,)), n((D,))
    post = n((D,)).astype(dtype)
    norm = mlx.nn.RMSNorm(D, 1e-5)
    norm.weight = n((D,))
    new, normed = kernels.norm_add_norm(
        branch, stream, alpha=alpha, beta=beta, post_weight=post, post_eps=1e-6, next_norm=norm
    )
    x = (branch * post).astype(mx.float32)
    ref = alpha * stream + beta * mx.fast.rms_norm(x, None, 1e-6).astype(dtype).astype(mx.float32)
    close(new, ref, TOLERANCE[dtype])
    close(normed, norm(ref), TOLERANCE[dtype])
    assert mx.array_equal(kernels.pre_norm(new, norm, dtype=dtype), normed)


@DTYPES
def test_post_expert_norm_combine(mode: str, dtype: mx.Dtype):
    kernels = load("kernels")
    experts, weights, w = (
        mx.random.normal((2, 4, 512)).astype(dtype),
        mx.random.uniform(shape=(2, 4)),
        mx.random.normal((512,)),
    )
    out = kernels.post_expert_norm_combine(experts, weights, norm_weight=w, eps=1e-6)
    y = mx.fast.rms_norm(experts.astype(mx.float32) * w, None, 1e-6)
    close(out, (y * weights[..., None]).sum(1), TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("D", [64, 80])
def test_qk_norm_and_rope(mode: str, dtype: mx.Dtype, D: int):
    kernels = load("kernels")
    HQ, HK, B, L = 4, 2, 2, 3
    x = mx.random.normal((B, L, 2 * (HQ + HK) * D)).astype(dtype)
    common = {"n_heads": HQ, "n_kv_heads": HK, "head_dim": D, "eps": 1e-6, "query_scale": 0.3}
    q, k = kernels.qk_norm(x, **common)
    heads = mx.fast.rms_norm(x[..., : (HQ + HK) * D].reshape(B, L, HQ + HK, D), None, 1e-6)
    q_ref, k_ref = heads[:, :, :HQ] * 0.3, heads[:, :, HQ:]
    close(q, q_ref, TOLERANCE[dtype])
    close(k, k_ref, TOLERANCE[dtype])
    q, k = kernels.qk_norm_rope(x, **common, rope_base=1e4, offset=mx.array([5, 9]))
    for got, ref in ((q, q_ref), (k, k_ref)):
        r = [
            mx.fast.rope(
                ref[i : i + 1].transpose(0, 2, 1, 3), D, traditional=True, base=1e4, scale=1.0, offset=o
            )
            for i, o in ((0, 5), (1, 9))
        ]
        close(got, mx.concatenate(r).transpose(0, 2, 1, 3), TOLERANCE[dtype])


@DTYPES
def test_rms_norm_sigmoid_gate_strided(mode: str, dtype: mx.Dtype):
    """Inputs that are not contiguous, read through their strides."""
    kernels = load("kernels")
    B, H, L, D = 2, 3, 4, 72
    x = mx.random.normal((B, L, H, D)).astype(dtype).transpose(0, 2, 1, 3)
    gate = mx.random.normal((B, L, 2 * H * D)).astype(dtype)[..., : H * D]
    out = kernels.rms_norm_sigmoid_gate(x, gate, eps=1e-6)
    ref = mx.fast.rms_norm(x.astype(mx.float32), None, 1e-6).transpose(0, 2, 1, 3).reshape(
        B, L, H * D
    ) * mx.sigmoid(gate.astype(mx.float32))
    close(out, ref, TOLERANCE[dtype])
