"""`experts` in the simulator against its reference, over every packed format."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offmetal
from close import relative_error
from moelocal import metal
from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.ops import experts as module
from moelocal.ops.experts import SwiGLU, experts
from moelocal.ops.op import force

# Relative to the largest output, against the reference in float32. float32: sums of at most some thousand terms in
# another order, and scale * sum(q x) + bias * sum(x), two sums that cancel to a fraction; measured 7e-7. Else u is half
# a unit in the last place, 2^-11 and 2^-9 at worst: u for the rounding of y, and for that of inner a u per term of a
# sum, with random signs, which is about u again; twice that for the tail.
LIMIT = {mx.float32: 4e-6, mx.float16: 4 * 2**-11, mx.bfloat16: 4 * 2**-9}
DTYPES = list(LIMIT)
FORMATS = [QuantSpec(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


def packed(spec: QuantSpec, dtype: mx.Dtype, *shape: int) -> QuantizedArray:
    weight = mx.random.normal(shape) * shape[-1] ** -0.5
    parts = mx.quantize(weight, group_size=spec.group, bits=spec.bits, mode=spec.mode)
    return QuantizedArray(parts[0], parts[1], parts[2] if len(parts) > 2 else None, spec).astype(dtype)


def block(
    gate_up: QuantSpec, down: QuantSpec, dtype: mx.Dtype, lead: tuple[int, ...], width: int, hidden: int
):
    return SwiGLU(
        (packed(gate_up, dtype, *lead, 2 * width, hidden),), packed(down, dtype, *lead, hidden, width)
    )


def case(
    spec: QuantSpec,
    dtype: mx.Dtype = mx.float32,
    *,
    tokens: int = 1,
    count: int = 4,
    per_token: int = 2,
    hidden: int = 128,
    width: int = 128,
    down: QuantSpec | None = None,
    shared: tuple[QuantSpec, int] | None = None,
    residual: bool = True,
    scale: float = 1.0,
) -> tuple[Any, ...]:
    """Arguments of `experts`. `down`: format of the way down if another; `shared`: format and width."""
    x, h = ((mx.random.normal((tokens, hidden)) * scale).astype(dtype) for _ in range(2))
    order = mx.argsort(mx.random.uniform(shape=(tokens, count)), axis=-1)
    return (
        x,
        block(spec, down or spec, dtype, (count,), width, hidden),
        order[:, :per_token].astype(mx.uint32),
        mx.softmax(mx.random.normal((tokens, per_token))),
        None if shared is None else block(shared[0], shared[0], dtype, (), shared[1], hidden),
        None if shared is None else mx.sigmoid(mx.random.normal((tokens, 1))),
        h if residual else None,
    )


def compare(arguments: tuple[Any, ...]) -> mx.array:
    x, *others, residual = arguments
    assert experts.supports(*arguments)
    got = experts(*arguments)
    assert got.dtype == x.dtype
    wide = None if residual is None else residual.astype(mx.float32)
    expected = experts.reference(x.astype(mx.float32), *others, wide)  # float32 out of it, not rounded
    error = relative_error(got, expected)
    assert error < LIMIT[x.dtype], error
    return got


CASES = [
    (spec, DTYPES[(i // 3 + i) % 3]) for i, spec in enumerate(FORMATS)
]  # each bits and group with each dtype
OTHERS = [(spec, dtype) for spec in FORMATS for dtype in DTYPES if (spec, dtype) not in CASES]
SLOW = [pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS]


@pytest.mark.parametrize(("spec", "dtype"), [*CASES, *SLOW])
def test_every_format(spec: QuantSpec, dtype: mx.Dtype):
    # 640 columns: a full step of all lanes and a part of one; the formats of the others are one further down the list
    other = FORMATS[(FORMATS.index(spec) + 4) % len(FORMATS)]
    down = FORMATS[(FORMATS.index(spec) + 8) % len(FORMATS)]
    with offmetal.options(allow_unwritten=False):
        compare(case(spec, dtype, tokens=2, hidden=640, down=down, shared=(other, 256)))


@pytest.mark.parametrize("tokens", [1, 3])
def test_modes(mode: str, tokens: int):
    spec = QuantSpec(5, 32)
    compare(case(spec, mx.bfloat16, tokens=tokens, hidden=544, width=96, shared=(QuantSpec(8, 32), 32)))


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(1, 8),
    count=st.integers(1, 20),
    per_token=st.integers(1, 16),
    hidden=st.integers(1, 20),
    width=st.integers(1, 20),
    shared_width=st.integers(0, 20),
    residual=st.booleans(),
    dtype=st.sampled_from([mx.float32, mx.bfloat16]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_any_shape(tokens, count, per_token, hidden, width, shared_width, residual, dtype, scale):
    shared = (QuantSpec(6, 32), shared_width * 32) if shared_width else None
    with offmetal.options(allow_unwritten=False):
        compare(
            case(
                QuantSpec(4, 32), dtype, tokens=tokens, count=count, per_token=min(per_token, count),
                hidden=hidden * 32, width=width * 32, shared=shared, residual=residual, scale=scale,
            )
        )  # fmt: skip


@pytest.mark.parametrize("spec", [QuantSpec(4, 64), QuantSpec(8, 32)])
def test_the_embedded_models_block(spec: QuantSpec):
    # chosen, weights and share have fewer than eight elements
    compare(case(spec, mx.bfloat16, count=16, per_token=4, hidden=128, width=64, shared=(spec, 128)))


def test_tokens_may_choose_the_same_expert_and_do_not_depend_on_each_other():
    x, routed, chosen, weights, shared, share, residual = case(
        QuantSpec(4, 32), mx.float16, tokens=8, hidden=96, width=64, shared=(QuantSpec(3, 32), 64)
    )
    chosen = mx.broadcast_to(chosen[:1], chosen.shape)
    together = compare((x, routed, chosen, weights, shared, share, residual))
    for i in range(8):
        row = slice(i, i + 1)
        alone = experts(x[row], routed, chosen[row], weights[row], shared, share[row], residual[row])
        assert mx.array_equal(alone, together[row])


def test_nothing_in_gives_the_residual():
    x, *others, residual = case(QuantSpec(4, 64), mx.bfloat16, shared=(QuantSpec(4, 64), 64))
    assert mx.array_equal(experts(mx.zeros_like(x), *others, residual), residual)
    assert not mx.any(experts(mx.zeros_like(x), *others, None)).item()


def constant(*shape: int) -> QuantizedArray:
    """A matrix of 1/32."""
    spec = QuantSpec(4, 32)
    *lead, cols = shape
    biases = mx.full((*lead, cols // 32), 1 / 32, mx.bfloat16)
    return QuantizedArray(mx.zeros((*lead, cols // 8), mx.uint32), mx.zeros_like(biases), biases, spec)


def test_the_sum_is_rounded_once():
    # An expert that gives silu(1) of ones, in bfloat16. After 256 comes 258: 256 + 1.003 is 258, but 256 if the
    # expert's part is rounded to 1 beforehand.
    routed = SwiGLU((constant(1, 64, 32),), constant(1, 32, 32))
    x, chosen = mx.ones((1, 32), mx.bfloat16), mx.zeros((1, 1), mx.uint32)
    part = experts(x, routed, chosen, mx.ones((1, 1)), None, None, None).astype(mx.float32)
    assert mx.all(part == mx.sigmoid(mx.array(1.0)).astype(mx.bfloat16)).item()
    y = experts(x, routed, chosen, 1.003 / part[:, :1], None, None, mx.full((1, 32), 256, mx.bfloat16))
    assert mx.all(y == 258).item()


@pytest.mark.parametrize(("rows", "simdgroups"), [(1, 1), (3, 4), (4, 2)])
def test_geometry_changes_no_bit(monkeypatch: pytest.MonkeyPatch, rows: int, simdgroups: int):
    arguments = case(
        QuantSpec(4, 32), mx.bfloat16, tokens=2, hidden=160, width=96, shared=(QuantSpec(8, 32), 32)
    )
    expected = compare(arguments)
    for name, value in (("INNER_ROWS", rows), ("SUM_ROWS", rows), ("SIMDGROUPS", simdgroups)):
        monkeypatch.setattr(module, name, value)
    with offmetal.options(allow_unwritten=False):
        assert mx.array_equal(experts(*arguments), expected)


def test_flagship_traffic():
    """Two launches; each weight that is needed is read once, everything else is kilobytes."""
    hidden, width, per_token = 2048, 512, 8
    spec = QuantSpec(4, 64)
    arguments = case(
        spec, mx.bfloat16, count=16, per_token=per_token, hidden=hidden, width=width, shared=(spec, width)
    )
    launches: list[dict[str, dict[str, int]]] = []

    def recording(**binding: Any) -> Any:
        kernel = offmetal.emulated_kernel(**binding)

        def run(**call: Any) -> Any:
            outputs = kernel(**call)
            launches.append(offmetal.last_result.traffic)
            return outputs

        return run

    with metal.executing(recording):
        compare(arguments)
    inside, down = launches
    matrix, groups = (
        hidden * width * 4 // 8,
        hidden * width // spec.group * 2,
    )  # bytes of codes; of scales, of biases
    for launch, matrices in ((inside, 2), (down, 1)):
        for name, count in (("", per_token), ("shared_", 1)):
            assert (
                launch[f"{name}packed"]["read"]
                == launch[f"{name}packed"]["touched"]
                == count * matrices * matrix
            )
            for kind in ("scales", "biases"):
                assert launch[name + kind]["touched"] == count * matrices * groups
                assert (
                    launch[name + kind]["read"] == 4 * count * matrices * groups
                )  # the four lanes of a group
    between = (per_token + 1) * width * 2
    assert inside["x"]["touched"] == down["residual"]["read"] == down["y"]["written"] == hidden * 2
    assert inside["inner"]["written"] == down["inner"]["touched"] == between
    # from caches: a row of x for 2 rows of gate and of up, and inner for 2 rows of y
    assert inside["x"]["read"] == (per_token + 1) * width // 2 * hidden * 2
    assert down["inner"]["read"] == hidden // 2 * between


@pytest.mark.falls_back
def test_what_the_kernel_does_not_take_goes_elsewhere():
    spec = QuantSpec(4, 32)
    x, routed, chosen, weights, _, _, residual = case(spec, hidden=64, width=32)
    gate_up = routed.gate_up[0]
    plain = gate_up.dequantize(mx.float32)

    def half(part: int) -> QuantizedArray:
        return QuantizedArray(*(mx.split(a, 2, axis=1)[part] for a in gate_up.arrays), spec)

    mxfp4 = packed(QuantSpec(4, 32, "mxfp4"), mx.float32, 4, 64, 32)
    for other in (
        SwiGLU((plain,), routed.down.dequantize(mx.float32)),
        SwiGLU((gate_up,), mxfp4),
        SwiGLU((half(0), half(1)), routed.down),
    ):
        assert not experts.supports(x, other, chosen, weights, None, None, residual)
        assert experts(x, other, chosen, weights, None, None, residual).shape == x.shape
    many = case(spec, tokens=9, hidden=64, width=32)
    assert not experts.supports(*many)
    with force("portable"):
        expected = experts(*many)
    assert mx.array_equal(experts(*many), expected)
