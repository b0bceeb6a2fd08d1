"""One decode step as a graph of primitives, recorded without a Metal device and without evaluating anything.

`mx.export_function` with a callback lists the primitives of a function, custom kernels included. Three things would
make its list differ from what a Mac runs, and are put right here:

- On the CPU device `mx.fast.*` unfold into their fallbacks, and `mx.contiguous` cannot be exported. In `as_on_metal`
  they are stand-ins: custom kernels with the right inputs and outputs whose call is remembered.
- `mx.compile` is transparent to the exporter. In `as_on_metal` its functions are regions between two stand-ins, whose
  elementwise primitives `fuse` joins.
- Who made a primitive is not recorded. Wrapped functions are regions, too, so that every node has a path of names.

The exporter also simplifies, as `mx.compile` does: `Graph.merged` counts what this took out besides broadcasts and
no-ops. Outside of compiled functions that would be launches which a device makes; of a decode step it is nothing.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from ledger.fuse import fuse
from ledger.graph import Array, Graph, Node, Path

_calls: list[Call] = []  # the stand-ins of the trace being made
_open: list[str] = []  # names of the regions being called


@dataclass(slots=True)
class Call:
    """A stand-in: an operation by its primitive's name, or one side of a region."""

    kind: str
    facts: dict[str, Any]
    path: Path = ()


def stand_in(
    kind: str, inputs: Sequence[mx.array], outputs: Sequence[tuple[Sequence[int], mx.Dtype]], **facts: Any
) -> list[mx.array]:
    """Arrays of the given shapes and dtypes, made by a primitive `kind` that exists in the trace only."""
    _calls.append(Call(kind, facts, tuple(_open)))
    kernel = mx.fast.metal_kernel(
        name=f"#{len(_calls) - 1}#",
        input_names=[f"i{i}" for i in range(len(inputs))],
        output_names=[f"o{i}" for i in range(len(outputs))],
        source="",
    )
    return list(
        kernel(
            inputs=list(inputs),
            output_shapes=[tuple(shape) for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, mx.array)


def _through(kind: str, tree: Any, **facts: Any) -> Any:
    """`tree` with its arrays passed through one stand-in."""
    arrays = [leaf for _, leaf in tree_flatten(tree) if _is_array(leaf)]
    if not arrays:
        return tree
    passed = iter(stand_in(kind, arrays, [(a.shape, a.dtype) for a in arrays], **facts))
    return tree_map(lambda leaf: next(passed) if _is_array(leaf) else leaf, tree)


def region(
    name: str, function: Callable[..., Any], compiled: bool = False, method: bool = False
) -> Callable[..., Any]:
    """`function` as a region of the trace; the first argument of a `method` is left alone."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _open.append(name)
        try:
            number, own, rest = len(_calls), args[:method], args[method:]
            rest, kwargs = _through("enter", (list(rest), kwargs), region=number, compiled=compiled)
            result = function(*own, *rest, **kwargs)
            return _through("leave", result, region=number, compiled=compiled)
        finally:
            _open.pop()

    return wrapper


def _compile(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    name = getattr(function, "__name__", "function")
    return region(f"compiled {name}", function, compiled=True) if function is not None else _compile


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    """With the casts of fast.cpp: the result of a bfloat16 x with a float32 weight is float32."""
    if weight is None:
        return stand_in("RMSNorm", [x], [(x.shape, x.dtype)])[0]
    dtype = mx.result_type(x, weight)
    return stand_in("RMSNorm", [x.astype(dtype), weight.astype(dtype)], [(x.shape, dtype)])[0]


def _rope(x: mx.array, dims: int, *, offset: Any, freqs: mx.array | None = None, **_: Any) -> mx.array:
    inputs = [x, mx.array(offset) if isinstance(offset, int) else offset]
    return stand_in("RoPE", inputs + ([] if freqs is None else [freqs]), [(x.shape, x.dtype)], dims=dims)[0]


# scaled_dot_product_attention.cpp, use_fallback: head sizes of the kernel for up to 8 queries
_VECTOR_HEADS = (64, 96, 128, 256)
_attention = mx.fast.scaled_dot_product_attention


def _sdpa(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **_: Any) -> mx.array:
    if q.shape[-1] not in _VECTOR_HEADS or q.shape[2] > 8:
        return _attention(q, k, v, scale=scale, mask=mask)
    inputs = [q, k, v] + ([mask] if _is_array(mask) else [])
    shape = (*q.shape[:-1], v.shape[-1])
    return stand_in("ScaledDotProductAttention", inputs, [(shape, q.dtype)])[0]


def _gated_delta(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, **_: Any
) -> tuple[mx.array, mx.array]:
    y, new = stand_in(
        "GatedDelta", [q, k, v, g, beta, state], [(v.shape, v.dtype), (state.shape, state.dtype)]
    )
    return y, new


def _dequantize(
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *_: Any,
    bits: int | None = None,
    **rest: Any,
) -> mx.array:
    shape = (*w.shape[:-1], w.shape[-1] * 32 // (bits or 4))
    dtype = rest.get("dtype") or scales.dtype
    inputs = [w, scales] + ([] if biases is None else [biases])
    return stand_in("Quantize", inputs, [(shape, dtype)])[0]


def _contiguous(x: mx.array, *_: Any, **__: Any) -> mx.array:
    return stand_in("Contiguous", [x], [(x.shape, x.dtype)])[0]


@contextmanager
def as_on_metal() -> Iterator[None]:
    """MLX says that it has a Metal device, and what would differ there are stand-ins. Import mlx-lm inside: it compiles
    functions and looks for the device as it is imported."""
    with ExitStack() as stack:
        for owner, name, new in (
            (mx, "compile", _compile),
            (mx, "contiguous", _contiguous),
            (mx, "dequantize", _dequantize),
            (mx, "default_device", lambda: mx.Device(mx.gpu)),
            (mx.metal, "is_available", lambda: True),
            (mx.fast, "rms_norm", _rms_norm),
            (mx.fast, "rope", _rope),
            (mx.fast, "scaled_dot_product_attention", _sdpa),
            (mx.fast, "gated_delta_update", _gated_delta),
        ):
            stack.enter_context(patch.object(owner, name, new))
        yield


@contextmanager
def named(methods: Iterable[tuple[type, str]]) -> Iterator[None]:
    """Calls of these methods are regions named after class and method."""
    with ExitStack() as stack:
        for owner, name in methods:
            label = owner.__name__ if name == "__call__" else f"{owner.__name__}.{name}"
            stack.enter_context(patch.object(owner, name, region(label, vars(owner)[name], method=True)))
        yield


def hold(arrays: Sequence[mx.array]) -> None:
    """As `forget`, but each stays recognisable in the trace: the arrays of a cache."""
    for array in arrays:
        array[:] = stand_in("Held", [], [(array.shape, array.dtype)])[0]


def forget(arrays: Sequence[mx.array]) -> None:
    """Put a constant of no memory in the place of each array, whatever it was going to be computed from."""
    for array in arrays:
        if array.ndim:
            array[:] = 0
    mx.eval(list(arrays))


_MERGED = {"Broadcast", "StopGradient", "Copy"}


def trace(step: Callable[[], tuple[Sequence[mx.array], Sequence[mx.array]]]) -> Graph:
    """The graph that `step` builds. Nothing in it may be evaluated but what `forget` was given."""
    _calls.clear()
    results = 0
    drawn = io.StringIO()

    def flat() -> list[mx.array]:
        nonlocal results
        first, kept = step()
        results = len(first)
        mx.export_to_dot(drawn, *first, *kept)
        return [*first, *kept]

    arrays: dict[str, Array] = {}
    records: list[dict[str, Any]] = []

    def note(record: dict[str, Any]) -> None:
        records.append(record)

    def array_of(entry: tuple[str, tuple[int, ...], mx.Dtype]) -> Array:
        name, shape, dtype = entry
        return arrays.setdefault(name, Array(tuple(shape), dtype))

    mx.export_function(note, flat)
    before = [name for name in re.findall(r'label ="(\w+)', drawn.getvalue()) if name not in _MERGED]
    after = [r for r in records if r["type"] == "primitive" and r["name"] not in _MERGED]
    nodes: list[Node] = []
    for record in records:
        if record["type"] != "primitive":
            continue
        facts: Any = record["arguments"]
        name, path = record["name"], Path()
        if name == "CustomKernel":
            own = re.match(r"custom_kernel_#(\d+)#", facts[0])
            if own:
                call = _calls[int(own[1])]
                name, facts, path = call.kind, call.facts, call.path
        node = Node(
            name,
            [array_of(a) for a in record["inputs"]],
            [array_of(a) for a in record["outputs"]],
            facts,
            path,
        )
        for output in node.outputs:
            output.source = node
        nodes.append(node)
    outputs = [array_of(a) for r in records if r["type"] == "outputs" for a in r["outputs"]]
    rest = _without_regions(nodes, outputs)
    return Graph(fuse(rest, outputs), outputs, results, len(before) - len(after))


def _without_regions(nodes: list[Node], outputs: list[Array]) -> list[Node]:
    """Give every node the longest path of a region that it is in, then take the sides of regions out."""
    own_path = {id(n): n.path for n in nodes}
    for node in nodes:
        if node.name not in ("enter", "leave"):
            node.path = ()
    entered = {n.facts["region"]: n for n in nodes if n.name == "enter"}
    for leave in nodes:
        if leave.name != "leave":
            continue
        number, path = leave.facts["region"], own_path[id(leave)]
        enter = entered.get(number)
        seen: set[int] = set()
        waiting = [a.source for a in leave.inputs]
        while waiting:
            inner = waiting.pop()
            if inner is None or id(inner) in seen or inner is enter:
                continue
            if inner.name == "leave" and inner.path[: len(path)] != path:
                continue  # of a region before this one
            if inner.name == "enter" and len(inner.path) <= len(path):
                continue
            seen.add(id(inner))
            if inner.name not in ("enter", "leave"):
                if len(path) > len(inner.path):
                    inner.path = path
                if leave.facts["compiled"]:
                    inner.region = number
            waiting.extend(a.source for a in inner.inputs)
    same: dict[int, Array] = {}

    def resolved(array: Array) -> Array:
        while id(array) in same:
            array = same[id(array)]
        return array

    for node in nodes:
        if node.name in ("enter", "leave"):
            for before, after in zip(node.inputs, node.outputs, strict=True):
                same[id(after)] = before
    rest = [n for n in nodes if n.name not in ("enter", "leave")]
    for node in rest:
        node.inputs = [resolved(a) for a in node.inputs]
        if not node.path:  # what only a cache keeps is nobody's result
            node.path = next((a.source.path for a in node.inputs if a.source), ())
    outputs[:] = [resolved(a) for a in outputs]
    return rest
