"""One layer while it is quantized for what it meets in the streams of `quantize.calibrate`.

In this order, each with those before it quantized: the mixer's inputs; its output; router, shared gate and up; the
routed experts, gate and up, then down; shared (or dense) down. A routed expert is fitted on the tokens that the
quantized router sends it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import mlx.core as mx
import numpy as np

from moelocal.cache import AttentionCache, RecurrentCache
from moelocal.checkpoint.scope import Checkpoint, Scope
from moelocal.formats import QuantizedArray, QuantSpec, Weight
from moelocal.layers.attention import Attention
from moelocal.layers.block import Block
from moelocal.layers.delta_net import DeltaNet
from moelocal.layers.mlp import Dense, MoE
from moelocal.ops.experts import experts, swiglu
from moelocal.ops.linear import linear
from moelocal.ops.norm import rms_norm
from moelocal.ops.op import Op, observing
from moelocal.ops.route import route
from moelocal.ops.router import router
from moelocal.quantize.gptq import Moments, calibrated, product
from moelocal.quantize.moments import Sums, float_rows, moments_of, shrunk, stack

EXPERT_BYTES: Final = 1 << 27
"""Of the second moments of the experts that are fitted at once."""

Plan = Mapping[str, QuantSpec | None]
Made = dict[str, QuantizedArray]


@dataclass(slots=True)
class Streams:
    """Hidden states [1, T, H] of every text, in the original model and in the quantized one."""

    original: list[mx.array]
    quantized: list[mx.array]

    def pairs(self) -> Iterator[tuple[mx.array, mx.array]]:
        return zip(self.original, self.quantized, strict=True)


def _missing(theirs: mx.array, ours: mx.array) -> mx.array:
    """What takes our state to theirs, float32."""
    return theirs.astype(mx.float32) - ours.astype(mx.float32)


def _plain(weight: Weight) -> mx.array:
    return weight if isinstance(weight, mx.array) else weight.dequantize(mx.float32)


@dataclass(frozen=True, slots=True)
class _Seen(Scope):
    """Notes the matrices that are asked for, as stored, by path."""

    weights: dict[str, Weight] = field(default_factory=dict)

    def at(self, name: str) -> _Seen:
        return _Seen(self.checkpoint, f"{self.prefix}{name}.", self.weights)

    def matrix(
        self, name: str, rows: int, cols: int, dtype: mx.Dtype | None, experts: int | None = None
    ) -> Weight:
        weight = self.weights[self.prefix + name] = Scope.matrix(self, name, rows, cols, None, experts)
        return weight


@dataclass(frozen=True, slots=True)
class _Partly(Scope):
    """Gives matrices that are quantized already in the place of the source's."""

    made: Mapping[str, QuantizedArray] = field(default_factory=dict)

    def at(self, name: str) -> _Partly:
        return _Partly(self.checkpoint, f"{self.prefix}{name}.", self.made)

    def matrix(
        self, name: str, rows: int, cols: int, dtype: mx.Dtype | None, experts: int | None = None
    ) -> Weight:
        packed = self.made.get(self.prefix + name)
        if packed is None:
            return Scope.matrix(self, name, rows, cols, dtype, experts)
        return packed if dtype is None else packed.astype(dtype)


def fit(weights: Mapping[str, Weight], plan: Plan, moments: Moments, dtype: mx.Dtype) -> Made:
    """Of matrices [rows, cols], or [B, rows, cols], that read the same inputs, those that the plan quantizes; the ones
    of one format together."""
    formats = {path: spec for path in weights if (spec := plan.get(path)) is not None}
    made: Made = {}
    for spec in dict.fromkeys(formats.values()):
        paths = [path for path in formats if formats[path] == spec]
        parts = [_plain(weights[path]) for path in paths]
        joined = mx.concatenate(parts, axis=-2)
        packed = calibrated(joined if joined.ndim == 3 else joined[None], moments, spec, dtype)
        cuts = list(itertools.accumulate(part.shape[-2] for part in parts))[:-1]
        for path, *arrays in zip(paths, *(mx.split(a, cuts, axis=1) for a in packed.arrays), strict=True):
            words, scales, biases = (mx.contiguous(a if joined.ndim == 3 else a[0]) for a in arrays)
            made[path] = QuantizedArray(words, scales, biases, spec)
    return made


class Layer:
    """One layer while it is quantized. The streams are moved through it on the way: from what goes into the layer to
    what comes out of the mixer, then to what comes out of the layer."""

    def __init__(self, index: int, source: Checkpoint, plan: Plan, dtype: mx.Dtype, streams: Streams) -> None:
        self.source, self.plan, self.dtype, self.streams = source, plan, dtype, streams
        self.config, self.spec = source.config, source.config.layers[index]
        self.place, self.where = f"layers.{index}", f"{source.folder}: layer {index}"
        self.made: Made = {}
        # lazy: a matrix is read when it is quantized
        self.weights: dict[str, Weight] = {}
        self._block(_Seen(self._fresh(), f"{self.place}.", self.weights))
        self.original = self._block(Scope(self._fresh(), f"{self.place}."))

    def _fresh(self) -> Checkpoint:
        """The source once more, which hands out each tensor once."""
        return Checkpoint.of(self.source.folder, self.config, self.source.entries)

    def _block(self, scope: Scope) -> Block:
        return Block(scope, self.spec, self.config.hidden, self.config.norm_eps, self.dtype)

    def _quantized(self) -> Block:
        """The layer with what is quantized so far; only what is used of it is read."""
        return self._block(_Partly(self._fresh(), f"{self.place}.", self.made))

    def quantize(self) -> Made:
        inner = "self_attn" if isinstance(self.original.mixer, Attention) else "linear_attn"
        out = f"{self.place}.{inner}.{'o_proj' if inner == 'self_attn' else 'out_proj'}"
        self._mixer(f"{self.place}.{inner}.", out)
        if isinstance(self.original.mlp, MoE):
            self._experts(self.original.mlp, f"{self.place}.mlp.")
        else:
            self._dense(f"{self.place}.mlp.")
        return self.made

    def _fit(self, paths: Iterable[str], moments: Moments) -> None:
        weights = {path: self.weights.pop(path) for path in list(paths)}
        self.made |= fit(weights, self.plan, moments, self.source.compute_dtype)

    def _before_mixer(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.original.before_mixer, self.config.norm_eps)

    def _before_mlp(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.original.before_mlp, self.config.norm_eps)

    def _mixer(self, inner: str, out: str) -> None:
        streams, sums = self.streams, Sums(self.where)
        for pair in streams.pairs():
            sums.add(*map(self._before_mixer, pair))
        self._fit([path for path in self.weights if path.startswith(inner) and path != out], sums.moments())
        sums, mixer = Sums(self.where), self._quantized().mixer
        for number, (theirs, ours) in enumerate(streams.pairs()):
            mixed, _ = _mixed(self.original.mixer, self._before_mixer(theirs))
            streams.original[number] = theirs + mixed
            _, heads = _mixed(mixer, self._before_mixer(ours))
            sums.add(_missing(streams.original[number], ours), heads)
        self._fit([out], sums.moments(outputs=True))
        mixer = self._quantized().mixer
        for number, ours in enumerate(streams.quantized):
            streams.quantized[number] = ours + _mixed(mixer, self._before_mixer(ours))[0]
            mx.eval(streams.quantized[number])

    def _dense(self, place: str) -> None:
        sums = Sums(self.where)
        for pair in self.streams.pairs():
            sums.add(*map(self._before_mlp, pair))
        self._fit([f"{place}gate_proj", f"{place}up_proj"], sums.moments())
        self._down(f"{place}down_proj")

    def _experts(self, mlp: MoE, place: str) -> None:
        """`place`: the path of the block of experts, with a dot."""
        sums = Sums(self.where)
        for pair in self.streams.pairs():
            sums.add(*map(self._before_mlp, pair))
        shared = ["shared_expert_gate", "shared_expert.gate_proj", "shared_expert.up_proj"]
        names = ["gate", *(shared if mlp.shared is not None else [])]
        moments = sums.moments()
        self._fit([place + name for name in names], moments)
        self._routed(place + "switch_mlp.", moments)
        self._down(f"{place}shared_expert.down_proj" if mlp.shared is not None else None)

    def _routed(self, place: str, everywhere: Moments) -> None:
        """The experts' matrices, batch by batch; `everywhere`: moments of what goes into gate and up, of all tokens."""
        mlp = self._quantized().mlp
        assert isinstance(mlp, MoE)
        theirs, ours = (
            mx.concatenate([self._before_mlp(x)[0] for x in states])
            for states in (self.streams.original, self.streams.quantized)
        )
        chosen, _, _ = route(
            router(ours, mlp.router), mlp.spec.per_token, mlp.spec.normalize, mlp.shared is not None
        )
        flat = np.array(chosen).reshape(-1)
        order = np.argsort(flat, kind="stable")
        starts = np.searchsorted(flat[order], np.arange(mlp.spec.experts + 1))
        tokens = [mx.array(order[a:b] // chosen.shape[-1]) for a, b in itertools.pairwise(starts)]
        gate, up, down = (place + name for name in ("gate_proj", "up_proj", "down_proj"))
        weights = {path: self.weights.pop(path) for path in (gate, up, down)}
        batches: dict[str, list[QuantizedArray]] = {}
        dtype = self.source.compute_dtype
        step = max(1, EXPERT_BYTES // (4 * self.config.hidden**2))
        for first in range(0, mlp.spec.experts, step):
            part = {path: _plain(_some(weight, first, first + step)) for path, weight in weights.items()}
            pairs = [
                (float_rows(theirs[rows]), float_rows(ours[rows])) for rows in tokens[first : first + step]
            ]
            moments = stack([shrunk(moments_of(*pair), len(pair[0]), everywhere) for pair in pairs])
            made = fit({path: part[path] for path in (gate, up)}, self.plan, moments, dtype)
            wide = {
                path: made[path].dequantize(mx.float32) if path in made else part[path] for path in (gate, up)
            }
            hidden = [
                (_inner(a, part[gate][i], part[up][i]), _inner(b, wide[gate][i], wide[up][i]))
                for i, (a, b) in enumerate(pairs)
            ]
            moments = stack([shrunk(moments_of(*pair), len(pair[0]), None) for pair in hidden])
            made |= fit({down: part[down]}, self.plan, moments, dtype)
            for path, packed in made.items():
                batches.setdefault(path, []).append(packed)
        for path, parts in batches.items():
            arrays = [mx.concatenate(list(each)) for each in zip(*(p.arrays for p in parts), strict=True)]
            mx.eval(arrays)
            self.made[path] = QuantizedArray(arrays[0], arrays[1], arrays[2], parts[0].spec)

    def _down(self, path: str | None) -> None:
        """The last matrix, and both streams to the end of the layer. It is to give what is missing to the original's
        state; None: there is no matrix that every token meets."""
        streams, sums, mlp = self.streams, Sums(self.where), self._quantized().mlp
        for number, (theirs, ours) in enumerate(streams.pairs()):
            streams.original[number] = self.original.mlp(self._before_mlp(theirs), theirs)
            mx.eval(streams.original[number])
            if path is not None:
                rest, inner = _before_down(mlp, self._before_mlp(ours), ours)
                sums.add(_missing(streams.original[number], rest), inner)
        if path is not None:
            self._fit([path], sums.moments(outputs=True))
            mlp = self._quantized().mlp
        for number, ours in enumerate(streams.quantized):
            streams.quantized[number] = mlp(self._before_mlp(ours), ours)
            mx.eval(streams.quantized[number])


def _mixed(mixer: Attention | DeltaNet, x: mx.array) -> tuple[mx.array, mx.array]:
    """What a mixer gives for a text, and what goes into its output projection."""
    heads: list[mx.array] = []

    def note(op: Op[..., object], args: tuple[object, ...]) -> None:
        if op is linear and args[1] is mixer.out:
            assert isinstance(args[0], mx.array)
            heads.append(args[0])

    with observing(note):
        if isinstance(mixer, Attention):
            y = mixer(x, AttentionCache(), 0, None)
        else:
            y = mixer(x, RecurrentCache(), None)
    mx.eval(y, heads)
    return y, heads[0]


def _before_down(mlp: MoE | Dense, x: mx.array, residual: mx.array) -> tuple[mx.array, mx.array]:
    """The state without the (shared) down projection, and what goes into that."""
    if isinstance(mlp, Dense):
        return residual, swiglu([linear(x, w) for w in mlp.weights.gate_up])
    assert mlp.shared is not None
    chosen, weights, share = route(router(x, mlp.router), mlp.spec.per_token, mlp.spec.normalize, True)
    rest = experts(x, mlp.routed, chosen, weights, None, None, residual)
    assert share is not None
    return rest, share * swiglu([linear(x, w) for w in mlp.shared.gate_up])


def _inner(x: mx.array, gate: mx.array, up: mx.array) -> mx.array:
    """What goes into the down projection of one expert: float32 [n, hidden] -> [n, width]."""
    return swiglu([product(x, mx.contiguous(w.astype(mx.float32).T)) for w in (gate, up)])


def _some(weight: Weight, first: int, last: int) -> Weight:
    """Experts first to last of a stack."""
    return (
        weight[first:last]
        if isinstance(weight, mx.array)
        else weight.rows(mx.arange(first, min(last, weight.weight.shape[0])))
    )
