"""`delta_net` and `delta_net_states` in the simulator against their references."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moelocal
import offmetal
from moelocal import metal
from moelocal.config import DeltaNetSpec, ModelConfig
from moelocal.ops import delta_net as module
from moelocal.ops.delta_net import DeltaNetWeights, delta_net, delta_net_states

FLAGSHIP = DeltaNetSpec(16, 32, 128, 128, 4)
EMBEDDED = DeltaNetSpec(2, 4, 32, 32, 4)
ODD = DeltaNetSpec(2, 6, 33, 20, 3)
DATA = {*module.DELTA_NET.inputs, *module.DELTA_NET.outputs} - {"eps"}

# float32 inside, in another order, relative to the largest value. The worst of 3,660 random cases, scales from 1e-3 to
# 100: state 2e-6, y 3e-6. There is more room, as norms of vectors that nearly cancelled magnify rounding, with a
# probability of 1 / error. y is rounded once more, at worst to the other neighbour: one unit in the last place.
STATE_LIMIT, Y_LIMIT = 2e-5, 1e-4
UNIT = {mx.float32: 0.0, mx.float16: 2**-10, mx.bfloat16: 2**-7}
DTYPES = st.sampled_from(list(UNIT))


def weights(spec: DeltaNetSpec, taps: mx.Dtype) -> DeltaNetWeights:
    """Random, from heads that hardly forget to heads that forget at once."""
    return DeltaNetWeights.build(
        spec,
        conv=mx.random.normal((spec.conv_channels, spec.conv_width, 1)).astype(taps),
        a_log=mx.linspace(-6, 2, spec.value_heads),
        dt_bias=mx.random.normal((spec.value_heads,)),
        norm=mx.random.normal((spec.value_dim,)),
        eps=1e-6,
    )


def problem(
    spec: DeltaNetSpec,
    batch: int,
    time: int,
    dtype: mx.Dtype,
    scale: float = 1.0,
    taps: mx.Dtype | None = None,
) -> tuple[Any, ...]:
    """Arguments as a layer gives them: u, z, b, a are parts of one array; conv and state are not zero. The weights of
    the convolution are in `taps`, or in the dtype of the others."""
    channels, heads, values = spec.conv_channels, spec.value_heads, spec.value_heads * spec.value_dim
    cuts = [channels, channels + values, channels + values + heads]
    projected = (mx.random.normal((batch, time, cuts[-1] + heads)) * scale).astype(dtype)
    conv = (mx.random.normal((batch, spec.conv_width - 1, channels)) * scale).astype(dtype)
    state = mx.random.normal((batch, heads, spec.value_dim, spec.key_dim))
    return *mx.split(projected, cuts, axis=-1), conv, state, None, weights(spec, taps or dtype)


def check(got: Sequence[mx.array], expected: Sequence[mx.array], unit: float) -> None:
    (y, conv, state), (y_expected, conv_expected, state_expected) = got, expected
    assert y.dtype == conv.dtype == y_expected.dtype and state.dtype == mx.float32
    assert mx.array_equal(conv, conv_expected)
    compared = ("y", y, y_expected, unit, Y_LIMIT), ("state", state, state_expected, 0.0, STATE_LIMIT)
    for name, x, wanted, rounding, limit in compared:
        x, wanted = x.astype(mx.float32), wanted.astype(mx.float32)
        assert x.shape == wanted.shape, name
        size = mx.abs(wanted)
        excess = (mx.abs(x - wanted) - rounding * size) / mx.maximum(mx.max(size), 1e-6)
        assert mx.all(excess <= limit).item(), f"{name}: {mx.max(excess).item()}"  # NaN fails


def compare(op: Any, arguments: tuple[Any, ...]) -> None:
    assert op.supports(*arguments)
    check(op(*arguments), op.reference(*arguments), UNIT[arguments[0].dtype])


@pytest.mark.parametrize(
    ("spec", "batch", "time", "dtype"),
    [
        (EMBEDDED, 1, 1, mx.float32),
        (ODD, 2, 3, mx.bfloat16),
        (DeltaNetSpec(3, 9, 16, 40, 4), 1, 8, mx.float16),
    ],
)
def test_modes(mode: str, spec: DeltaNetSpec, batch: int, time: int, dtype: mx.Dtype):
    arguments = problem(spec, batch, time, dtype)
    compare(delta_net, arguments)
    compare(delta_net_states, arguments)


@settings(max_examples=20, deadline=None)
@given(
    op=st.sampled_from([delta_net, delta_net_states]), batch=st.integers(1, 3), time=st.integers(1, 8),
    key_heads=st.integers(1, 3), ratio=st.integers(1, 3), key_dim=st.integers(4, 80), value_dim=st.integers(8, 80),
    width=st.integers(2, 5), dtype=DTYPES, taps=DTYPES, seed=st.integers(0, 2**20),
)  # fmt: skip
def test_any_shape(op, batch, time, key_heads, ratio, key_dim, value_dim, width, dtype, taps, seed):
    mx.random.seed(seed)
    spec = DeltaNetSpec(key_heads, key_heads * ratio, key_dim, value_dim, width)
    with offmetal.options(allow_unwritten=False):
        compare(op, problem(spec, batch, time, dtype, taps=taps))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 128), (256, 64), (64, 256), (1, 8), (97, 65)])
def test_the_largest_and_smallest_heads(key_dim: int, value_dim: int):
    with offmetal.options(allow_unwritten=False):
        compare(delta_net_states, problem(DeltaNetSpec(1, 2, key_dim, value_dim, 4), 1, 8, mx.bfloat16))


@pytest.mark.parametrize(("lanes", "simdgroups"), [(1, 2), (4, 3), (16, 8), (32, 16)])
def test_any_geometry(monkeypatch: pytest.MonkeyPatch, lanes: int, simdgroups: int):
    monkeypatch.setattr(module, "LANES", lanes)
    monkeypatch.setattr(module, "SIMDGROUPS", simdgroups)
    monkeypatch.setattr(module, "OWNED", 1024)
    with offmetal.options(allow_unwritten=False):
        compare(delta_net, problem(ODD, 2, 3, mx.bfloat16))


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize("large", [80.0, -80.0, 120.0, -120.0])
def test_extreme_gates_and_activations(dtype: mx.Dtype, large: float):
    u, z, b, a, conv, state, _, w = problem(EMBEDDED, 1, 2, dtype, scale=100.0)
    a = mx.full(a.shape, large, dtype)
    compare(delta_net, (u, z, mx.full(b.shape, large, dtype), a, conv, state, None, w))
    compare(delta_net, (u, z, mx.full(b.shape, -large, dtype), a, conv, state, None, w))


def test_small_heads_have_epsilon_on_the_sum():
    u, z, b, a, conv, state, _, w = problem(EMBEDDED, 1, 2, mx.float32)
    compare(delta_net, (u * 1e-3, z, b, a, conv * 1e-3, state, None, w))


def test_zeros_give_zero_and_let_the_state_fade():
    u, z, b, a, conv, state, _, w = problem(EMBEDDED, 1, 2, mx.bfloat16)
    y, rows, faded = delta_net(mx.zeros_like(u), z, b, a, mx.zeros_like(conv), state, None, w)
    assert not mx.any(y).item() and not mx.any(rows).item()
    fade = mx.exp(w.decay * mx.logaddexp(a.astype(mx.float32) + w.dt_bias, 0.0)).prod(axis=1)[..., None, None]
    assert mx.allclose(faded, state * fade, rtol=1e-6, atol=0).item()


def test_positions_together_are_positions_alone_to_the_bit(mode: str):
    # every product that is added to something is an explicit fma: no compiler is free to round another way
    u, z, b, a, conv, state, _, w = problem(ODD, 2, 8, mx.bfloat16)
    outputs, windows, states = delta_net_states(u, z, b, a, conv, state, None, w)
    together = delta_net(u, z, b, a, conv, state, None, w)
    for got, expected in zip(together, (outputs, windows[:, -1], states[:, -1]), strict=True):
        assert mx.array_equal(got, expected)
    for t in range(8):
        y, conv, state = delta_net(*(x[:, t : t + 1] for x in (u, z, b, a)), conv, state, None, w)
        assert mx.array_equal(y, outputs[:, t : t + 1])
        assert mx.array_equal(conv, windows[:, t])
        assert mx.array_equal(state, states[:, t])


def test_any_strides():
    spec = DeltaNetSpec(2, 4, 32, 20, 4)
    u, z, b, a, conv, state, _, w = problem(spec, 2, 6, mx.float16)
    arguments = (
        u[:, ::-2],
        mx.repeat(z, 2, axis=-1)[:, ::2, ::-2],
        mx.broadcast_to(b[:, :1], (2, 3, 4)),
        mx.swapaxes(mx.contiguous(mx.swapaxes(a[:, :3], 0, 2)), 0, 2),
        mx.repeat(conv, 3, axis=1)[::-1, ::3, ::-1],
        mx.swapaxes(mx.contiguous(mx.swapaxes(state, 2, 3)), 2, 3)[::-1],
    )
    got = delta_net(*arguments, None, w)
    expected = delta_net(*(mx.contiguous(x) for x in arguments), None, w)
    assert all(mx.array_equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("spec", [EMBEDDED, DeltaNetSpec(1, 2, 128, 128, 4)])
def test_512_steps_in_bfloat16_do_not_drift(spec: DeltaNetSpec):
    # bfloat16 enters and leaves, all between and the state are float32: against a float32 run on the same inputs, y
    # differs by its one rounding, 2^-8 of itself, and 512 positions add no more to the limits than eight do, as the
    # delta rule overwrites what it learns anew; one head does not fade at all
    u, z, b, a, conv, state, _, w = problem(spec, 1, 512, mx.bfloat16)
    a[..., 0] = -80.0
    wide = (x.astype(mx.float32) for x in (u, z, b, a, conv))
    whole, rows, final = delta_net.reference(*wide, state, None, w)
    outputs = []
    with offmetal.options(checked=False):
        for t in range(512):
            y, conv, state = delta_net(*(x[:, t : t + 1] for x in (u, z, b, a)), conv, state, None, w)
            outputs.append(y.astype(mx.float32))
    check((mx.concatenate(outputs, axis=1), conv.astype(mx.float32), state), (whole, rows, final), 2**-8)


def test_flagship_traffic():
    arguments = problem(FLAGSHIP, 1, 1, mx.bfloat16)
    got = delta_net(*arguments)
    # without strides and eps, which every thread reads from the constant cache
    traffic = {name: t for name, t in offmetal.last_result.traffic.items() if name in DATA}
    assert {name: t["read"] for name, t in traffic.items() if t["read"]} == {
        "state": 2_097_152,  # 32 x 128 x 128 x 4: once
        "u": 24_576,  # 8,192 channels x 2 and once more the 4,096 of queries and keys, which two heads share
        "conv": 73_728,  # three rows of that
        "taps": 98_304,  # and four rows
        "z": 8_192,
        "b": 64,
        "a": 64,
        "decay": 128,
        "dt_bias": 128,
        "norm": 16_384,  # by each head
    }
    assert {name: t["written"] for name, t in traffic.items() if t["written"]} == {
        "state_after": 2_097_152,
        "conv_after": 49_152,
        "y": 8_192,
    }
    # every byte of inputs and outputs once, b and a in whole lines of 128: what caches cannot save
    assert sum(t["touched"] for t in traffic.values()) == 4_391_936
    check(got, delta_net.reference(*arguments), UNIT[mx.bfloat16])


def test_states_are_read_once_and_written_after_every_position():
    arguments = problem(EMBEDDED, 1, 8, mx.bfloat16)
    delta_net_states(*arguments)
    traffic = offmetal.last_result.traffic
    nbytes = 4 * 32 * 32 * 4
    assert traffic["state"]["read"] == nbytes and traffic["state_after"]["written"] == 8 * nbytes
    assert traffic["conv_after"]["written"] == 8 * 3 * EMBEDDED.conv_channels * 2


def test_one_launch_reads_the_parts_of_a_projection_where_they_are():
    arguments = problem(EMBEDDED, 1, 3, mx.bfloat16)
    launches = []

    def executor(**binding: Any) -> Any:
        assert not binding["ensure_row_contiguous"]
        kernel = offmetal.emulated_kernel(**binding)

        def call(**launch: Any) -> Any:
            launches.append(launch["inputs"])
            return kernel(**launch)

        return call

    with metal.executing(executor):
        delta_net(*arguments)
    (inputs,) = launches
    assert all(got is given for got, given in zip(inputs, arguments[:6], strict=False))


@pytest.mark.falls_back
def test_what_is_supported():
    read = ModelConfig.read(Path(moelocal.__file__).parent / "embedded")
    embedded = next(layer.mixer for layer in read.layers if isinstance(layer.mixer, DeltaNetSpec))
    for spec in (embedded, FLAGSHIP):
        for time in (1, 8):
            assert delta_net.supports(*problem(spec, 1, time, mx.bfloat16))
    long = problem(EMBEDDED, 1, 9, mx.bfloat16)
    u, z, b, a, conv, state, _, w = problem(EMBEDDED, 1, 2, mx.bfloat16)
    valid = mx.array([[False, True]])
    refused = [
        long,
        (u, z, b, a, conv, state, valid, w),
        (u, z.astype(mx.float32), b, a, conv, state, None, w),
        (u, z, b, a, conv, state.astype(mx.bfloat16), None, w),
        (*(x[:0] for x in (u, z, b, a, conv, state)), None, w),
        problem(DeltaNetSpec(1, 2, 32, 7, 4), 1, 1, mx.bfloat16),
        problem(DeltaNetSpec(1, 2, 132, 128, 4), 1, 1, mx.bfloat16),
        problem(DeltaNetSpec(1, 2, 8, 257, 4), 1, 1, mx.bfloat16),
    ]
    assert not any(delta_net.supports(*arguments) for arguments in refused)
    check(delta_net(*long), delta_net.reference(*long), UNIT[mx.bfloat16])


def test_states_end_in_the_last_state_in_every_form():
    *arrays, _, w = problem(ODD, 2, 7, mx.float32)
    expected = delta_net.reference(*arrays, None, w)
    for form in (delta_net_states, delta_net_states.reference, delta_net_states.portable):
        y, conv, state = form(*arrays, None, w)
        check((y, conv[:, -1], state[:, -1]), expected, 0.0)
    # with padding, which the kernel leaves to the portable form; what y holds there is nobody's business
    valid = mx.arange(7)[None] >= mx.array([[0], [3]])
    y_expected, *expected = delta_net.reference(*arrays, valid, w)
    for form in (delta_net_states, delta_net_states.reference):
        y, conv, state = form(*arrays, valid, w)
        got, wanted = (mx.where(valid[..., None], x, 0) for x in (y, y_expected))
        check((got, conv[:, -1], state[:, -1]), (wanted, *expected), 0.0)
