"""`attend_packed` in the simulator against its reference: buffers of codes that are longer than what is used, with
scales that are NaN behind it; faults of its own kind planted in it; decode steps of the embedded model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offmetal
from kernels import quantized
from kernels.test_attend import close, near, traffic_of
from moelocal import metal
from moelocal.cache.layers import AttentionCache
from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.layers.attention import Attention
from moelocal.model import Decoder
from moelocal.ops.attend import attend
from moelocal.ops.attend_packed import attend_packed
from moelocal.ops.op import force

DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def kept(
    batch: int, heads: int, keys: int, size: int, form: QuantSpec, dtype: mx.Dtype, length: int
) -> list[QuantizedArray]:
    """Keys and values with room for `keys`, as halves of three buffers, with NaN in the groups behind `length`. The
    buffer of the biases is longer than the others, which no cache makes it and a kernel has to allow: they have strides
    of their own."""
    stored = mx.random.normal((2 * batch, heads, keys, size)).astype(dtype)
    codes, scales, biases = mx.quantize(stored, group_size=form.group, bits=form.bits)
    biases = mx.pad(biases, [(0, 0), (0, 0), (0, 3), (0, 0)])
    scales[:, :, length:], biases[:, :, length:] = math.nan, math.nan
    halves = [mx.split(part[:, :, :keys], 2) for part in (codes, scales, biases)]
    return [QuantizedArray(*(half[i] for half in halves), form) for i in range(2)]


def first(part: QuantizedArray, length: int) -> QuantizedArray:
    """`length` positions: views."""
    return QuantizedArray(*(a[:, :, :length] for a in part.arrays), part.spec)


def inputs(
    batch: int,
    heads: int,
    ratio: int,
    queries: int,
    keys: int,
    size: int,
    form: QuantSpec,
    dtype: mx.Dtype,
    length: int | None = None,
    spread: float = 1.0,
) -> tuple[mx.array, QuantizedArray, QuantizedArray, mx.array]:
    """q; keys and values with room for `keys`, of which `length` or all are there; a gate that lies beside what the
    projection made of q."""
    q = (mx.random.normal((batch, heads * ratio, queries, size)) * spread).astype(dtype)
    beside = mx.random.normal((batch, queries, heads * ratio, 2 * size)).astype(dtype) * 3
    return q, *kept(batch, heads, keys, size, form, dtype, length or keys), beside[..., size:]


def compare(
    q: mx.array, k: QuantizedArray, v: QuantizedArray, gate: mx.array | None, length: int | None = None
) -> mx.array:
    """The kernel over the first `length` positions of all against the reference over no others."""
    scale, count = q.shape[3] ** -0.5, None if length is None else mx.array(length)
    arguments = (q, k, v, scale, None, gate, count)
    k, v = (first(part, length or part.weight.shape[2]) for part in (k, v))
    assert attend_packed.supports(*arguments)
    y = attend_packed(*arguments)
    close(y, attend_packed.reference(q, k, v, scale, None, gate), v.dequantize(mx.float32))
    return y


FORMS = [QuantSpec(bits, group) for bits in (8, 4) for group in (64, 32)]

MODES = {
    "flagship, 8 bits": (2, 8, 1, 300, 256, FORMS[0], mx.bfloat16),
    # nine rows, padded to sixteen
    "one column a lane, two lanes a byte": (1, 3, 3, 64, 96, FORMS[3], mx.float16),
}
MORE_MODES = {
    "flagship, 4 bits": (2, 8, 1, 65, 256, FORMS[2], mx.bfloat16),
    "two rows": (1, 1, 2, 63, 64, FORMS[1], mx.float32),
    "one key": (2, 3, 1, 1, 128, FORMS[3], mx.float32),
}


@pytest.mark.parametrize(
    "name", [*MODES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_MODES)]
)
def test_modes(mode: str, name: str):
    heads, ratio, queries, length, size, form, dtype = (MODES | MORE_MODES)[name]
    compare(*inputs(1, heads, ratio, queries, 320, size, form, dtype, length), length)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("form", [FORMS[3], pytest.param(FORMS[0], marks=pytest.mark.slow)], ids=str)
def test_lengths(form: QuantSpec, length: int):
    """Of a whole buffer and of one cut to them, for one and for three positions."""
    with offmetal.options(allow_unwritten=False):
        for queries in (1, 3) if length > 2 else (1,):
            q, k, v, gate = inputs(2, 2, 3, queries, 320, 64, form, mx.float32, length)
            whole = compare(q, k, v, gate, length)
            if length > 1:  # one position has too few scales
                cut = compare(q, first(k, length), first(v, length), gate)
                assert mx.max(mx.abs(whole - cut)).item() < 1e-5  # cut into other blocks


SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "heads": st.integers(1, 4),
        "ratio": st.sampled_from([1, 3, 8]),
        "queries": st.integers(1, 8),
        "keys": st.sampled_from([256, 320]),
        "size": st.sampled_from([64, 96, 128, 256]),
        "form": st.sampled_from(FORMS),
        "dtype": st.sampled_from(DTYPES),
        "spread": st.sampled_from([0.0, 1.0, 5.0]),
    }
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    length=st.sampled_from([1, 63, 64, 65, 300]),
    gated=st.booleans(),
    order=st.sampled_from(["ascending", "random"]),
    fma=st.booleans(),
)
def test_any_shape(shape, length, gated, order, fma):
    form, length = shape["form"], min(max(length, shape["queries"]), shape["keys"])
    if shape["size"] % form.group:
        form = replace(form, group=32)
    q, k, v, gate = inputs(**shape | {"form": form}, length=length)
    with offmetal.options(allow_unwritten=False, order=order, seed=5, fma=fma):
        compare(q, k, v, gate if gated else None, length)


@pytest.mark.parametrize("size", [32, 64, 96, 128, 160, 192, 224, 256])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.slow
def test_head_sizes(size: int, bits: int):
    compare(*inputs(1, 2, 4, 1, 150, size, QuantSpec(bits, 32), mx.float16, 130), 130)


def whole_numbers(part: QuantizedArray) -> QuantizedArray:
    """Other values with the same codes, none of which is rounded."""
    middle = mx.full(part.scales.shape, -(2.0 ** (part.spec.bits - 1))).astype(part.scales.dtype)
    return replace(part, scales=mx.ones_like(part.scales), biases=middle)


@pytest.mark.parametrize("fma", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("size", "form"),
    [
        (256, FORMS[2]),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in ((96, FORMS[3]), (64, FORMS[0]))),
    ],
    ids=str,
)
def test_values_that_codes_state_exactly_give_the_bits_of_the_kernel_for_values(size, form, fma):
    """The two read, and do everything else alike."""
    q, k, v, gate = inputs(1, 2, 4, 1, 150, size, form, mx.float32, spread=0.1)
    k, v = whole_numbers(k), whole_numbers(v)
    with offmetal.options(fma=fma):
        got = attend_packed(q, k, v, size**-0.5, None, gate)
        expected = attend(q, *(part.dequantize(mx.float32) for part in (k, v)), size**-0.5, None, gate)
    assert mx.array_equal(got, expected).item()


# --- planted faults ---

GENERAL, HALVES = (128, FORMS[3]), (96, FORMS[3])
FAULTS = {
    "bias left out": (GENERAL, " + bias;", ";"),
    "scale of the next group": (
        *(GENERAL, "scale_strides[2] + column / GROUP", "scale_strides[2] + (column / GROUP ^ 1)"),
    ),
    "next word": (GENERAL, "[column / HELD]", "[column / HELD ^ 1]"),
}
MORE_FAULTS = {
    "scale left out": (GENERAL, "scale * float(", "float("),
    "bias of the next group": (
        *(GENERAL, "bias_strides[2] + column / GROUP", "bias_strides[2] + (column / GROUP ^ 1)"),
    ),
    "groups of twice the size": (GENERAL, "column / GROUP", "column / (2 * GROUP)"),
    "codes from the highest on": (GENERAL, "codes >> c * BITS", "codes >> (COUNT - 1 - c) * BITS"),
    "a mask of one bit less": (GENERAL, "(1u << BITS) - 1", "(1u << (BITS - 1)) - 1"),
    "column of the lane forgotten": (GENERAL, "first += column;", ""),
    "column of the chunk forgotten": ((256, FORMS[3]), "column += first;", "column = first;"),
    "the first half of every byte": (HALVES, "codes >>= column % HELD * BITS;", ""),
    "the other half of every byte": (HALVES, "column % HELD * BITS", "(column + 1) % HELD * BITS"),
    "scales of the first head": (GENERAL, "head * scale_strides[1]", "0"),
    "biases of the first row": (GENERAL, "batch * bias_strides[0]", "0"),
    "strides of scales for biases": (GENERAL, "head * bias_strides[1]", "head * scale_strides[1]"),
    "keys of one place": (GENERAL, "words + key * word_strides[2]", "words"),
}


def planted(old: str, new: str) -> Callable[..., Any]:
    """Runs kernels with `old` in their text replaced by `new`."""

    def executor(**binding: Any) -> Callable[..., Any]:
        text = binding["header"].replace(old, new)
        assert (text != binding["header"]) == ("packed" in binding["name"])
        return offmetal.emulated_kernel(**{**binding, "header": text})

    return executor


@pytest.mark.parametrize(
    "name", [*FAULTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAULTS)]
)
def test_a_planted_fault_is_seen(name: str):
    (size, form), old, new = (FAULTS | MORE_FAULTS)[name]
    arguments = inputs(2, 2, 3, 1, 70, size, form, mx.float32)
    with offmetal.options(checked=False):
        compare(*arguments)
        with metal.executing(planted(old, new)), pytest.raises((AssertionError, offmetal.KernelError)):
            compare(*arguments)


# --- traffic ---


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("keys", "room"), [(1024, 1024), (300, 1024)])
def test_every_code_is_read_once_and_nothing_behind_the_length(bits: int, keys: int, room: int):
    size, heads, form = 256, 2, QuantSpec(bits, 64)
    q, k, v, gate = inputs(1, heads, 8, 1, room, size, form, mx.bfloat16)
    k, v = (replace(part, biases=mx.contiguous(part.biases)) for part in (k, v))  # whole lines
    block, _ = traffic_of(attend_packed, q, k, v, size**-0.5, None, gate, mx.array(keys))
    assert block["k"]["read"] == block["v"]["read"] == heads * keys * size * bits // 8
    # 8 lanes have keys of a group and go through them in two chunks; 32 lanes have values of a group
    scales = heads * keys * size // form.group * 2
    assert block["k_scales"]["read"] == block["k_biases"]["read"] == 8 * 2 * scales
    assert block["v_scales"]["read"] == block["v_biases"]["read"] == 32 * scales
    if keys == room:
        arrays = [f"{kind}{part}" for kind in "kv" for part in ("", "_scales", "_biases")]
        touched = sum(block[name]["touched"] for name in arrays)
        assert touched == keys * 2 * heads * (size * bits // 8 + size // form.group * 2 * 2)


# --- what the kernel is not for ---


@pytest.mark.falls_back
def test_other_arguments_go_to_the_portable_form():
    q, k, v, gate = inputs(1, 2, 2, 1, 20, 64, FORMS[1], mx.float16)
    nine = inputs(1, 2, 2, 9, 20, 64, FORMS[1], mx.float16)
    narrow = [
        QuantizedArray(*mx.quantize(part.dequantize(mx.float16), 32, 6), QuantSpec(6, 32)) for part in (k, v)
    ]
    wide = inputs(1, 2, 2, 1, 20, 288, FORMS[1], mx.float16)
    single = inputs(1, 1, 2, 1, 2, 64, FORMS[1], mx.float16)
    other = inputs(1, 2, 2, 1, 20, 64, FORMS[0], mx.float16)[2]
    for name, arguments in {
        "padding": (q, k, v, 0.2, mx.array([3]), gate),
        "nine queries": (*nine[:3], 0.2, None, nine[3]),
        "six bits": (q, *narrow, 0.2, None, gate),
        "D over 256": (*wide[:3], 0.2, None, wide[3]),
        "so few scales that they come in constant memory": (*single[:3], 0.2, None, single[3]),
        "values in other groups": (q, k, other, 0.2, None, gate),
        "scales of another dtype": (q, k.astype(mx.float32), v, 0.2, None, gate),
        "a gate of another dtype": (q, k, v, 0.2, None, gate.astype(mx.float32)),
    }.items():
        assert not attend_packed.supports(*arguments), name
        near(
            attend_packed(*arguments),
            attend_packed.reference(*arguments),
            arguments[2].dequantize(mx.float32),
        )


# --- the embedded model ---


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_a_layer_gives_what_the_portable_forms_give(bits: int, launched: Callable[[], Counter[str]]):
    """The last attention layer, past the first 256 positions. What is written is the same: the rest of the layer takes
    its portable form."""
    decoder = Decoder.open(quantized.EMBEDDED, mx.float32, kv_bits=bits)
    layer = [block.mixer for block in decoder.blocks if isinstance(block.mixer, Attention)][-1]
    caches, position = {form: AttentionCache(bits) for form in ("metal", "portable")}, 0
    for time in (250, 1, 3, 8, 1):
        x = mx.random.normal((1, time, decoder.config.hidden))
        with force("portable"):
            q, stored, gate = layer.prologue(x, position)
        outputs = []
        for form, cache in caches.items():
            with force(form), offmetal.options(allow_unwritten=False):
                outputs.append(layer.attend(q, stored, gate, cache, None))
        assert mx.max(mx.abs(outputs[0] - outputs[1])).item() < 1e-5 * mx.max(mx.abs(outputs[1])).item()
        position += time
    assert launched() == {"attend_packed_block": 4, "attend_combine": 4}


def greedy(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """Tokens that follow, each the likeliest."""
    cache, tokens = decoder.new_cache(), list(prompt)
    logits = decoder(mx.array([prompt]), cache)
    for _ in range(count):
        tokens.append(int(mx.argmax(logits[0, -1]).item()))
        logits = decoder(mx.array([tokens[-1:]]), cache)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("count", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_greedy_tokens_equal_the_portable_ones(
    count: int, tmp_path: Path, launched: Callable[[], Counter[str]]
):
    """Every kernel on, at the formats in which each has one."""
    quantized.write(tmp_path / "model")
    decoder = Decoder.open(tmp_path / "model", mx.float32, kv_bits=8)
    prompt = mx.random.randint(0, 256, (12,)).tolist()
    with force("portable"):
        expected = greedy(decoder, prompt, count)
    assert not launched() and len(set(expected)) > 1
    with offmetal.options(checked=False):
        assert greedy(decoder, prompt, count) == expected
    launches = launched()
    layers = sum(isinstance(block.mixer, Attention) for block in decoder.blocks)
    assert launches["attend_packed_block"] == launches["attend_combine"] == count * layers
    assert launches["attend_block"] == 0
    assert launches["experts_sum"] >= count * len(decoder.blocks)
