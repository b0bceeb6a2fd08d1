"""What MLX's Metal backend does with each primitive: which kernels it launches, and how the result lies in memory.

Rules as read in MLX 0.32.2 (github.com/ml-explore/mlx, commit 846d176, below mlx/backend/), with the file beside each.
Nothing here ran on a device. Memory layouts are followed because many launches are hidden: copies of arrays that do not
lie as a kernel wants them. Elementwise results keep the strides of their input, which a later kernel may not like.

Assumed, since it depends on when the device finishes: a key-value buffer that only the cache holds is donated, so that
writing a row does not copy the buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Final

from ledger.graph import Array, Graph, Node

Shape = tuple[int, ...]

# common/common.cpp, gpu/primitives.cpp: the result shares the buffer of the input
_VIEWS: Final = frozenset(
    """Squeeze ExpandDims Transpose Broadcast BroadcastAxes Slice Split StopGradient Copy Depends AsStrided
    NumberOfElements View Held""".split()  # Held: trace.py, an array of a cache
)
_RESHAPES: Final = frozenset(["Reshape", "Flatten", "Unflatten"])
_ELEMENTWISE: Final = frozenset(
    """Abs Add AsType BitwiseBinary Compiled Cos Divide Equal Erf Exp Expm1 Floor Greater GreaterEqual Less LessEqual
    Log Log1p LogAddExp LogicalAnd LogicalNot LogicalOr Maximum Minimum Multiply Negative NotEqual Power Remainder Round
    Select Sigmoid Sign Sin Sqrt Square Subtract Tanh""".split()
)
_KEPT_SLACK: Final = 16384  # gpu/primitives.cpp, Contiguous: bytes that a shared buffer may be larger
_ONE_GROUP: Final = 4 * 1024  # metal/reduce.cpp, all_reduce_dispatch: REDUCE_N_READS * 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """Strides in elements and the flags of mlx/array.h; `data_size` elements are reached, `buffer` are allocated."""

    strides: Shape
    row_contiguous: bool
    contiguous: bool
    data_size: int
    buffer: int


@dataclass(frozen=True, slots=True)
class Launch:
    """The kernels of one node by name; `steps` of them wait for each other."""

    node: Node
    kernels: list[str]
    steps: int


class Device:
    """Follows the layouts through a graph in the order of its nodes and collects the `launches`."""

    def __init__(self, graph: Graph) -> None:
        self._layouts: dict[int, Layout] = {}
        self._uses: dict[int, int] = {}
        for array in [*(a for node in graph.nodes for a in node.inputs), *graph.outputs, *graph.outputs]:
            # outputs count twice: they are held after the step
            self._uses[id(array)] = self._uses.get(id(array), 0) + 1
        self.launches: list[Launch] = []
        for node in graph.nodes:
            kernels = self._run(node)
            # the copies of a concatenation do not wait for each other (metal/slicing.cpp, start_concurrent)
            if kernels:
                steps = 1 if node.name == "Concatenate" else len(kernels)
                self.launches.append(Launch(node, kernels, steps))

    def layout(self, array: Array) -> Layout:
        return self._layouts.setdefault(id(array), _fresh(array.shape))

    def _run(self, node: Node) -> list[str]:
        """Set the layouts of the outputs; the kernels that are launched."""
        for output in node.outputs:
            self._layouts[id(output)] = _fresh(output.shape)
        if node.name in _VIEWS:
            for output in node.outputs if node.inputs else ():
                self._layouts[id(output)] = _view(node, output, self.layout(node.inputs[0]))
            return []
        if node.name in _RESHAPES or node.name == "Contiguous":
            reshaped = _reshaped if node.name in _RESHAPES else _kept
            shared = reshaped(node, self.layout(node.inputs[0]))
            if shared is None:
                return ["copy"]
            self._layouts[id(node.outputs[0])] = shared
            return []
        copies = self._copies(node)
        if node.name in _ELEMENTWISE:
            self._as_inputs(node)
        elif node.name in ("RMSNorm", "SliceUpdate") and not copies:
            self._layouts[id(node.outputs[0])] = self.layout(node.inputs[0])
        return ["copy"] * copies + self._kernels(node)

    def _as_inputs(self, node: Node) -> None:
        """common/unary.h, binary.h, compiled.cpp: inputs without holes hand their strides to the result."""
        full = [a for a in node.inputs if a.size > 1]
        layouts = [self.layout(a) for a in full]
        if not full or any(a.shape != node.outputs[0].shape for a in full):
            return
        if all(x.row_contiguous for x in layouts) or (len(full) == 1 and layouts[0].contiguous):
            for output in node.outputs:
                self._layouts[id(output)] = replace(layouts[0], buffer=layouts[0].data_size)

    def _donatable(self, array: Array) -> bool:
        """Whether nothing else holds the buffer (mlx/array.h, is_donatable)."""
        while self._uses.get(id(array), 0) == 1 and array.source is not None:
            source = array.source
            if source.name == "Held":
                return True  # the cache takes the result for it
            if source.name == "Split":
                return False  # its other parts hold it
            if source.name not in _VIEWS | _RESHAPES:
                return True
            array = source.inputs[0]
        return False

    def _copies(self, node: Node) -> int:
        """Copies of inputs that go ahead of the kernel."""
        inputs = [(a, self.layout(a)) for a in node.inputs]
        if (
            node.name == "RoPE"
        ):  # metal/rope.cpp: what does not rotate is copied with the rest, unless in place
            array, lay = inputs[0]
            if node.facts["dims"] < array.shape[-1]:
                return not (lay.row_contiguous and self._donatable(array))
            return not lay.row_contiguous and sum(n != 1 for n in array.shape[:-2]) > 1
        if node.name in ("SliceUpdate", "DynamicSliceUpdate"):  # metal/indexing.cpp, gpu/primitives.cpp
            return not self._donatable(node.inputs[0])
        if node.name in ("Scatter", "ScatterAxis"):  # metal/indexing.cpp: into a copy
            return 1
        if node.name == "CustomKernel" and not node.facts[9]:  # the exporter's place of ensure_row_contiguous
            return 0
        fits = _FITS.get(node.name, (_any,))
        fits += fits[-1:] * (len(inputs) - len(fits))
        return sum(not fit(array.shape, lay) for fit, (array, lay) in zip(fits, inputs, strict=False))

    def _kernels(self, node: Node) -> list[str]:
        name = node.name
        if name == "Concatenate":  # metal/slicing.cpp: one copy per input
            return ["copy"] * len(node.inputs)
        if name == "ScaledDotProductAttention":
            # two passes from 1,024 keys on a Max or Ultra; elsewhere from 4,096 with grouped heads
            return [name] * (1 + (node.inputs[1].shape[2] >= 1024))
        if name in ("DynamicSlice", "DynamicSliceUpdate"):  # gpu/primitives.cpp, compute_dynamic_offset
            return ["offset", name]
        if name == "Pad":  # gpu/slicing.cpp
            return ["fill", "copy"]
        if name in ("Sort", "ArgSort", "Partition", "ArgPartition"):
            return [name] * _sort_launches(max(node.inputs[0].shape))
        if name == "Reduce":  # metal/reduce.cpp: a large array to one value takes two passes
            array = node.inputs[0]
            whole = node.outputs[0].size == 1 and self.layout(array).contiguous
            return [name] * (1 + (whole and array.size > _ONE_GROUP))
        if name == "CustomKernel":
            return [node.facts[0].removeprefix("custom_kernel_")]
        return [name + "".join(part.name for part in node.parts)]


def _fresh(shape: Shape) -> Layout:
    """Row by row in a buffer of its own."""
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return Layout(strides, True, True, prod(shape), prod(shape))


def _in_rows(shape: Shape, strides: Shape) -> bool:
    """Whether elements follow each other without a gap; axes of size 1 do not count."""
    wanted = _fresh(shape).strides
    return all(n == 1 or s == w for n, s, w in zip(shape, strides, wanted, strict=True))


def _view(node: Node, output: Array, old: Layout) -> Layout:
    """common/common.cpp, slicing.cpp, broadcasting.cpp."""
    source, shape = node.inputs[0], output.shape
    if node.name in ("Squeeze", "ExpandDims"):  # a new axis has stride 1
        rest = iter([s for s, n in zip(old.strides, source.shape, strict=True) if n != 1])
        return replace(old, strides=tuple(next(rest) if n != 1 else 1 for n in shape))
    if node.name == "Broadcast":
        new = len(shape) - len(source.shape)
        inner = (0 if n == 1 else s for n, s in zip(source.shape, old.strides, strict=True))
        packed = old.row_contiguous and output.size <= source.size
        return replace(old, strides=(0,) * new + tuple(inner), row_contiguous=packed)
    if node.name == "Transpose":
        strides = tuple(old.strides[axis] for axis in node.facts[0])
        whole = old.contiguous and old.data_size == source.size
        packed = _in_rows(shape, strides) if whole else old.row_contiguous
        return replace(old, strides=strides, row_contiguous=packed)
    if node.name in ("Split", "Slice"):
        steps = node.facts[2] if node.name == "Slice" else (1,) * len(shape)
        strides = tuple(s * n for s, n in zip(old.strides, steps, strict=True))
        extent = 1 + sum(s * (n - 1) for s, n in zip(strides, shape, strict=True))
        reached = prod(n for n, s in zip(shape, strides, strict=True) if s)
        return Layout(strides, _in_rows(shape, strides), reached == extent, extent, old.buffer)
    if node.name in ("StopGradient", "Copy", "Depends"):
        return old
    return _fresh(shape)


def _reshaped(node: Node, old: Layout) -> Layout | None:
    """common/common.cpp, prepare_reshape: None where the new shape does not fit the runs of the input."""
    source, shape = node.inputs[0], node.outputs[0].shape
    if old.row_contiguous:
        return replace(old, strides=_fresh(shape).strides)
    sizes: list[int] = []
    runs: list[int] = []
    for size, stride in zip(source.shape, old.strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1] == size * stride:
            sizes[-1], runs[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            runs.append(stride)
    strides: list[int] = []
    run = 0
    for size in shape:
        if run < len(sizes) and sizes[run] % size == 0:
            sizes[run] //= size
            strides.append(sizes[run] * runs[run])
            run += sizes[run] == 1
        elif size == 1:
            strides.append(strides[-1])
        else:
            return None
    return replace(old, strides=tuple(strides))


def _kept(node: Node, old: Layout) -> Layout | None:
    """gpu/primitives.cpp, Contiguous: shared if it lies in rows of a buffer that is hardly larger."""
    output = node.outputs[0]
    fits = old.row_contiguous and old.buffer * output.dtype.size <= output.nbytes + _KEPT_SLACK
    return old if fits else None


Fit = Callable[[Shape, Layout], bool]


def _rows(shape: Shape, lay: Layout) -> bool:
    return lay.row_contiguous


def _any(shape: Shape, lay: Layout) -> bool:
    return True


def _last_axis(shape: Shape, lay: Layout) -> bool:
    """metal/softmax.cpp, logsumexp.cpp."""
    return lay.contiguous and lay.strides[-1] == 1


def _norm(shape: Shape, lay: Layout) -> bool:
    """metal/normalization.cpp."""
    return _last_axis(shape, lay) and (len(shape) == 1 or shape[-2] == 1 or lay.strides[-2] in (0, shape[-1]))


def _matrix(shape: Shape, lay: Layout) -> bool:
    """metal/quantized.cpp, ensure_row_contiguous_matrix: also where there is but one row."""
    return lay.strides[-1] == 1 and (len(shape) < 2 or lay.strides[-2] == shape[-1])


def _factor(line: int) -> Fit:
    """metal/matmul.cpp, check_transpose: rows or columns in one piece each; a vector, with one `line`, as a whole."""

    def fit(shape: Shape, lay: Layout) -> bool:
        down, along = lay.strides[-2:]
        one = shape[line] == 1
        return (along == 1 and (not one or down == shape[-1])) or (
            down == 1 and (not one or along == shape[-2])
        )

    return fit


def _query(shape: Shape, lay: Layout) -> bool:
    """metal/scaled_dot_product_attention.cpp, one query: heads and time may be swapped."""
    axis = 1 if shape[0] == 1 else 0
    swapped = (lay.strides[3], lay.strides[2], lay.strides[axis]) == (1, shape[3] * shape[axis], shape[3])
    return lay.row_contiguous or (1 in shape[:2] and swapped)


def _keys(shape: Shape, lay: Layout) -> bool:
    return lay.strides[-1] == 1 and (1 in shape[:2] or lay.strides[0] == lay.strides[1] * shape[1])


_FITS: Final[dict[str, tuple[Fit, ...]]] = {
    "RMSNorm": (_norm, _any),
    "Softmax": (_last_axis,),
    "LogSumExp": (_last_axis,),
    "ScaledDotProductAttention": (_query, _keys, _keys, _any),
    "QuantizedMatmul": (_matrix,),
    "GatherQMM": (_matrix, _matrix, _matrix, _matrix, _any, _any),
    "Matmul": (_factor(-2), _factor(-1)),
    "CustomKernel": (_rows,),  # metal/custom_kernel.cpp
    "Convolution": (_rows,),  # metal/conv.cpp
    "Quantize": (_rows,),  # metal/quantized.cpp
    "GatedDelta": (_rows,),
}
"""How the inputs of a kernel have to lie; the last entry holds for the rest. Others take any layout."""


def _sort_launches(size: int) -> int:
    """metal/sort.cpp: blocks of 4 · 32 to 4 · 512 values; then a search and a merge per round, and a copy."""
    block = next((4 * n for n in (32, 64, 128, 256) if size <= 4 * n), 4 * 512)
    rounds = (-(-size // block) - 1).bit_length()
    return 2 + 2 * rounds if rounds else 1
