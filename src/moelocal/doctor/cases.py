"""What is measured: one row per op and shape, as a decode step of a model calls it, on random values.

A `Case` gives the arguments of the calls of a chain. Each call reads what the one before wrote, as in a model, so that
kernels cannot overlap. Experts, routers, recurrent states and caches are other ones with every call, as they are with
every layer. At the sizes of the flagship a chain has 570 MB of experts, 134 MB of states, 36 MB of routers, and as much
of keys and values as `BEYOND_CACHES` says: all but routers and short contexts are more than the caches of a chip hold,
and come from memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx

from moelocal.cache.layers import STEP, group_of, kv_nbytes
from moelocal.config import AttentionSpec, DeltaNetSpec, MoESpec
from moelocal.doctor.shapes import QUANTIZED, Experts, Shapes, random_block, random_router
from moelocal.formats import QuantizedArray, QuantSpec, Weight
from moelocal.layers.rope import frequencies
from moelocal.ops.add_norm import add_norm
from moelocal.ops.attend import attend
from moelocal.ops.attend_packed import attend_packed
from moelocal.ops.choice import words
from moelocal.ops.delta_net import DeltaNetWeights, delta_net, delta_net_states
from moelocal.ops.experts import SwiGLU, experts
from moelocal.ops.group_search import group_search
from moelocal.ops.norm import rms_norm
from moelocal.ops.op import Op
from moelocal.ops.prologue import PrologueWeights, prologue
from moelocal.ops.route import route
from moelocal.ops.router import RouterWeights, router
from moelocal.ops.sample import noise_size, sample

LENGTH: Final = 64
"""Calls in a chain: enough that starting and waiting for the device weighs little."""

CONTEXTS: Final = tuple(1 << bits for bits in range(8, 19))
"""Keys that the buffer of a cache has room for when attention is measured: the size classes of 256 to 262,144."""

KEPT: Final = (None, 8, 4)
"""Bits of the codes that keys and values are kept in; None: as they are."""

BEYOND_CACHES: Final = 1 << 28
"""Bytes of keys and values after which a chain starts over: more than the caches of a chip hold. A short context does
not get there: every call has its own, and all of them (32 MB for 256 keys of the flagship) may stay near the chip."""

DRAFT: Final = 4
"""Positions that a speculative step verifies at once."""

SAMPLING: Final = ((20, 0.95), (0, 0.95), (0, 1.0))
"""top_k and top_p of a draw; the first are those that the checkpoints of the family recommend."""


@dataclass(frozen=True, slots=True)
class Case:
    """`step(i, previous)` gives the arguments of call i of a chain of `length`; `previous` is the result of call i - 1,
    None for the first. `unread` counts bytes of the arguments that a call has no need to read.

    `lazy`: the stock form evaluates nothing, so that a chain can be compiled. `expected` gives what the first call has
    to give, where the reference would take too long or too much memory for all of its arguments.
    """

    op: Op[..., Any]
    name: str
    step: Callable[[int, Any], tuple[Any, ...]]
    length: int
    unread: int = 0
    lazy: bool = True
    expected: Callable[[], Any] | None = None


def cases(shapes: Shapes, length: int = LENGTH) -> Iterator[Case]:
    """One after the other, so that the weights of one are gone when the next is built."""
    config, dtype = shapes.config, shapes.dtype
    yield from _norms(config.hidden, config.norm_eps, dtype, length)
    for mixer in dict.fromkeys(layer.mixer for layer in config.layers):
        if isinstance(mixer, DeltaNetSpec):
            yield _delta_net(delta_net, mixer, 1, config.norm_eps, dtype, length)
            yield _delta_net(delta_net_states, mixer, DRAFT, config.norm_eps, dtype, length)
        else:
            yield _prologue(mixer, config.norm_eps, dtype, length)
            contexts = [keys for keys in CONTEXTS if keys <= config.context]
            for bits in KEPT if mixer.head_dim % 32 == 0 else KEPT[:1]:
                yield from (_attend(mixer, dtype, keys, bits, length) for keys in contexts)
    for mlp in dict.fromkeys(layer.mlp for layer in config.layers):
        if isinstance(mlp, MoESpec):
            yield _route(mlp, length)
            for kind in shapes.experts:
                yield _router(kind.router, config.hidden, dtype, length)
                yield _experts(mlp, kind, config.hidden, dtype, length)
    yield from (_sample(config.vocab, *limits, length) for limits in SAMPLING)
    if config.hidden % QUANTIZED.group == 0:
        yield _group_search(config.layers[0].mlp.width, config.hidden, dtype)


def _normal(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape).astype(dtype)


def _norms(hidden: int, eps: float, dtype: mx.Dtype, length: int) -> Iterator[Case]:
    x, r = _normal(1, 1, hidden, dtype=dtype), _normal(1, 1, hidden, dtype=dtype)
    weight = mx.random.uniform(0.5, 1.5, (hidden,))
    yield Case(rms_norm, "1 token", lambda i, last: (x if last is None else last, weight, eps), length)
    yield Case(add_norm, "1 token", lambda i, last: (*(last or (x, r)), weight, eps), length)


def _delta_net(
    op: Op[..., Any], spec: DeltaNetSpec, time: int, eps: float, dtype: mx.Dtype, length: int
) -> Case:
    heads, values, channels = spec.value_heads, spec.value_heads * spec.value_dim, spec.conv_channels
    weights = DeltaNetWeights.build(
        spec,
        conv=_normal(channels, spec.conv_width, 1) / spec.conv_width,
        a_log=mx.random.uniform(-2, 2, (heads,)),
        dt_bias=_normal(heads),
        norm=mx.random.uniform(0.5, 1.5, (spec.value_dim,)),
        eps=eps,
    )
    calls = [
        (
            *(_normal(1, time, size, dtype=dtype) for size in (channels, values, heads, heads)),
            _normal(1, spec.conv_width - 1, channels, dtype=dtype),
            _normal(1, heads, spec.value_dim, spec.key_dim),
        )
        for _ in range(length)
    ]

    def step(i: int, last: Any) -> tuple[Any, ...]:
        u, z, b, a, conv, state = calls[i]
        return u, last[0] if last else z, b, a, conv, state, None, weights

    return Case(op, _tokens(time), step, length)


def _tokens(count: int) -> str:
    return f"{count} token" + "s" * (count > 1)


def _prologue(spec: AttentionSpec, eps: float, dtype: mx.Dtype, length: int) -> Case:
    turns = frequencies(spec)
    q_norm, k_norm = (mx.random.uniform(0.5, 1.5, (spec.head_dim,)) for _ in range(2))
    weights = PrologueWeights(spec, eps, q_norm, k_norm, frequencies=turns, periods=1.0 / turns)
    parts = (spec.heads * (1 + spec.gated), spec.kv_heads, spec.kv_heads)
    start = [_normal(1, 1, heads * spec.head_dim, dtype=dtype) for heads in parts]

    def step(i: int, last: Any) -> tuple[Any, ...]:
        q, k, v = start
        if last:  # the new keys as values and the values as keys
            v, k = (part.reshape(k.shape) for part in mx.split(last[1], 2))
        return q, k, v, mx.array(1000 + i), weights

    return Case(prologue, "1 token", step, length)


def _attend(spec: AttentionSpec, dtype: mx.Dtype, keys: int, bits: int | None, length: int) -> Case:
    q = _normal(1, spec.heads, 1, spec.head_dim, dtype=dtype)
    gate = _normal(1, 1, spec.heads, spec.head_dim, dtype=dtype) if spec.gated else None
    form = None if bits is None else QuantSpec(bits, group_of(spec.head_dim))
    nbytes = keys * kv_nbytes(spec, dtype.size, bits)
    # as a step gets them: the whole buffers of a cache, filled but for half of what it grows by
    buffers = [
        [stored] if form is None else mx.quantize(stored, group_size=form.group, bits=form.bits)
        for stored in (
            _normal(2, spec.kv_heads, keys, spec.head_dim, dtype=dtype)
            for _ in range(min(length, -(-BEYOND_CACHES // nbytes)))
        )
    ]
    room = STEP // 2
    filled, scale = mx.array(keys - room), 1 / math.sqrt(spec.head_dim)

    def step(i: int, last: Any) -> tuple[Any, ...]:
        k, v = _halves(buffers[i % len(buffers)], form)
        return q if last is None else last.reshape(q.shape), k, v, scale, None, gate, filled

    def expected() -> Any:
        (k, v), parts, ratio = _halves(buffers[0], form), [], spec.heads // spec.kv_heads
        for head in range(spec.heads):  # the reference has every key in float32 for every head
            own, its = slice(head, head + 1), head // ratio
            gated = None if gate is None else gate[:, :, own]
            parts.append(op.reference(q[:, own], _head(k, its), _head(v, its), scale, None, gated, filled))
            mx.eval(parts[-1])
        return mx.concatenate(parts, axis=-1)

    op: Op[..., Any] = attend if bits is None else attend_packed
    name = f"1 token, {keys} keys" + ("" if bits is None else f", {bits} bits")
    return Case(op, name, step, length, nbytes * room // keys, expected=expected)


def _halves(parts: Sequence[mx.array], form: QuantSpec | None) -> list[Any]:
    """Keys and values of the buffers of a cache, as `Attention` hands them to its op."""
    halves = [mx.split(part, 2) for part in parts]
    if form is None:
        return list(halves[0])
    codes, scales, biases = halves
    return [QuantizedArray(*each, form) for each in zip(codes, scales, biases, strict=True)]


def _head(kept: Any, head: int) -> Any:
    """One head of keys or values, and its axis."""
    if isinstance(kept, mx.array):
        return kept[:, head : head + 1]
    weight, scales, biases = (part[:, head : head + 1] for part in kept.arrays)
    return QuantizedArray(weight, scales, biases, kept.spec)


def _route(spec: MoESpec, length: int) -> Case:
    shared = bool(spec.shared_width)
    calls = [_normal(1, 1, spec.experts + shared) for _ in range(length)]

    def step(i: int, last: Any) -> tuple[Any, ...]:
        logits = calls[i] + last[1][..., :1] if last else calls[i]
        return logits, spec.per_token, spec.normalize, shared

    return Case(route, "1 token", step, length)


def _router(kind: RouterWeights, hidden: int, dtype: mx.Dtype, length: int) -> Case:
    x = _normal(1, 1, hidden, dtype=dtype)
    weights = [random_router(kind) for _ in range(length)]

    def step(i: int, last: Any) -> tuple[Any, ...]:
        return x if last is None else x + last[..., :1].astype(dtype), weights[i]

    form = _format(kind.wide[0] if kind.stored is None else kind.stored)
    return Case(router, f"1 token, {form}", step, length)


def _format(weight: Weight) -> str:
    return f"{weight.spec.bits} bits" if isinstance(weight, QuantizedArray) else words(weight.dtype)


def _experts(spec: MoESpec, kind: Experts, hidden: int, dtype: mx.Dtype, length: int) -> Case:
    x, residual = _normal(1, 1, hidden, dtype=dtype), _normal(1, 1, hidden, dtype=dtype)
    routed = random_block(kind.routed)
    # every call another shared expert and other routed ones, until all were used
    calls = [
        (
            (mx.arange(i * spec.per_token, (i + 1) * spec.per_token)[None, None] % spec.experts).astype(
                mx.uint32
            ),
            mx.softmax(_normal(1, 1, spec.per_token), axis=-1),
            None if kind.shared is None else random_block(kind.shared),
            None if kind.shared is None else mx.sigmoid(_normal(1, 1, 1)),
        )
        for i in range(length)
    ]

    def step(i: int, last: Any) -> tuple[Any, ...]:
        chosen, weights, shared, share = calls[i]
        return x if last is None else last, routed, chosen, weights, shared, share, residual

    def expected() -> Any:
        first = mx.arange(
            spec.per_token
        )  # what the first call chooses; the reference unpacks all that it is given
        few = SwiGLU(tuple(_only(w, first) for w in routed.gate_up), _only(routed.down, first))
        return experts.reference(x, few, *step(0, None)[2:])

    nbytes = sum(array.nbytes for array in routed.arrays)
    unread = nbytes - nbytes * spec.per_token // spec.experts
    return Case(experts, f"1 token, {_format(routed.down)}", step, length, unread, expected=expected)


def _only(weight: Weight, experts: mx.array) -> Weight:
    return weight.rows(experts) if isinstance(weight, QuantizedArray) else weight[experts]


def _sample(vocab: int, top_k: int, top_p: float, length: int) -> Case:
    logits = _normal(vocab) * 3
    logits = logits - mx.max(logits)
    noise = [
        -mx.log(-mx.log(mx.random.uniform(1e-6, 1 - 1e-6, (noise_size(vocab, top_k),))))
        for _ in range(length)
    ]

    def step(i: int, last: Any) -> tuple[Any, ...]:
        return logits if last is None else logits - mx.minimum(last, 0), noise[i], top_k, top_p, 0.0

    return Case(sample, f"top_k {top_k}, top_p {top_p:g}", step, length)


def _group_search(rows: int, cols: int, dtype: mx.Dtype) -> Case:
    """The quantizer: no part of a decode step. Its reference goes through the groups one by one in Python; the stock
    form gives the same bits, and tests hold the two equal."""
    weights = _normal(rows, cols, dtype=dtype)
    name = f"{rows} x {cols}, {QUANTIZED.bits} bits"
    return Case(
        *(group_search, name, lambda i, last: (weights, QUANTIZED, None, dtype), 1),
        lazy=False,
        expected=lambda: group_search.portable(weights, QUANTIZED, None, dtype),
    )
