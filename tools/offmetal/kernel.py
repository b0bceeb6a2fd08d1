"""`metal_kernel`: arrays in, arrays out, and how a launch is checked."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from offmetal import arrays, machine
from offmetal.compiler import MetalCompileError, compile_kernel
from offmetal.machine import Buffer, Result
from offmetal.signature import SMALL, Signature, TemplateValue

_MAX_THREADS: Final = 1024
_INT: Final = range(-(2**31), 2**31)
"""What MLX's binding takes for an `int`."""
_MATH_MODES: Final = ("safe", "relaxed", "fast")

_mlx_metal_kernel: Final[Callable[..., Any]] = mx.fast.metal_kernel


class KernelError(RuntimeError):
    """The kernel did something that Metal does not define. `problems` has one text for each finding."""

    def __init__(self, name: str, problems: list[str]) -> None:
        super().__init__("\n  ".join([f"kernel {name}:", *problems]))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Options:
    checked: bool = True
    """Look for accesses out of bounds, races and uninitialised memory. Off is three times as fast."""
    fma: bool = False
    """Let a * b + c be rounded once, as Metal's compiler may."""
    lint: bool = True
    """In checked mode: what clang accepts and Metal's compiler does not."""
    order: str = "ascending"
    """Of lanes and SIMD-groups: ascending, descending or random."""
    seed: int = 0
    """Of the random order."""
    timeout: float = 60.0
    """Seconds for a launch."""
    allow_unwritten: bool = True
    """Outputs may have elements that no thread wrote (floats are NaN there)."""
    allow_races: bool = False
    allow_divergent_simd: bool = True
    """SIMD operations may run without some lanes."""
    max_reports: int = 8
    """A launch ends with so many findings, at most 16."""

    def __post_init__(self) -> None:
        if self.order not in machine.ORDERS:
            raise ValueError(f"order: expected one of {', '.join(machine.ORDERS)}, got {self.order!r}")


@dataclass(frozen=True, slots=True)
class Launch:
    """A finished launch, for `recording`."""

    signature: Signature
    template: tuple[tuple[str, TemplateValue], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    buffers: dict[str, tuple[str, tuple[int, ...], int]]
    """Of each input and output: dtype, shape, bytes."""
    result: Result


_options = Options()
_counts: Counter[str] = Counter()
_records: list[list[Launch]] = []
last: Result | None = None
"""Of the launch that ended last."""


@contextmanager
def options(**changes: Any) -> Iterator[Options]:
    """Change how kernels run inside the block; the names are those of `Options`."""
    global _options
    before, _options = _options, replace(_options, **changes)
    try:
        yield _options
    finally:
        _options = before


def launches() -> Counter[str]:
    """How often each kernel was launched in this process, by its name."""
    return _counts.copy()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """A list that each launch inside the block is added to."""
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: Any = None,
) -> Callable[..., list[mx.array]]:
    """As `mx.fast.metal_kernel`, and where MLX has Metal, that."""
    arguments = (name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs)
    if not mx.metal.is_available():
        return emulated_kernel(*arguments, compile_options)
    # not every MLX has compile_options
    newer = {"compile_options": compile_options} if compile_options else {}
    kernel: Callable[..., list[mx.array]] = _mlx_metal_kernel(*arguments, **newer)
    return kernel


def emulated_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: Any = None,
) -> Callable[..., list[mx.array]]:
    """As `mx.fast.metal_kernel`, in the simulator. Its kernels raise `MetalCompileError`, `KernelError`, and
    `ToolMissing` where there is no clang. `compile_options` are checked and change nothing."""
    if not output_names:
        raise ValueError("[metal_kernel] Must specify at least one output.")
    _check_options(compile_options)
    for what, text in (("source", source), ("header", header)):
        if not text.isascii():
            bad = next(character for character in text if not character.isascii())
            raise MetalCompileError(
                f"kernel {name}: the {what} has the character {bad!r}; MLX gives Metal ASCII only"
            )
    return _Kernel(
        name, list(input_names), list(output_names), source, header, ensure_row_contiguous, atomic_outputs
    )


@contextmanager
def installed() -> Iterator[None]:
    """Inside the block `mx.fast.metal_kernel` is simulated and `mx.metal.is_available()` is true: for code that builds
    its kernels when it is imported."""
    before = mx.fast.metal_kernel, mx.metal.is_available
    mx.fast.metal_kernel, mx.metal.is_available = emulated_kernel, lambda: True
    try:
        yield
    finally:
        mx.fast.metal_kernel, mx.metal.is_available = before


class _Kernel:
    def __init__(
        self,
        name: str,
        inputs: list[str],
        outputs: list[str],
        source: str,
        header: str,
        ensure_row_contiguous: bool,
        atomic_outputs: bool,
    ) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.source, self.header = source, header
        self.ensure_row_contiguous, self.atomic_outputs = ensure_row_contiguous, atomic_outputs
        self._compiled: dict[tuple[Any, ...], tuple[Signature, Path]] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, TemplateValue]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        for what, got, names in (
            ("inputs", inputs, self.inputs),
            ("output_shapes", output_shapes, self.outputs),
            ("output_dtypes", output_dtypes, self.outputs),
        ):
            if len(got) != len(names):
                raise ValueError(
                    f"[metal_kernel] Expected `{what}` to have size {len(names)} but got size {len(got)}."
                )
        size, group = _geometry(grid, threadgroup)
        given = dict(zip(self.inputs, self._arrays(inputs), strict=True))
        dtypes = dict(zip(self.outputs, output_dtypes, strict=True))
        special = _special(template or ())
        signature, library = self._specialised(given, dtypes, special)
        if verbose:
            print(f"Generated source code for `{self.name}`:\n```\n{signature.metal}\n```")

        made = {
            name: arrays.output(shape, dtypes[name], init_value)
            for name, shape in zip(self.outputs, output_shapes, strict=True)
        }
        descriptions, buffers = [], []  # the former keep memory alive that the latter point to
        for argument in signature.buffers:
            if argument.what == "output":
                buffers.append(
                    arrays.of_numpy(
                        argument.name, made[argument.name], output=True, initialised=init_value is not None
                    )
                )
            elif argument.what == "input":
                buffers.append(arrays.of_input(argument.name, given[argument.name]))
            else:
                descriptions.append(arrays.description(given[argument.name], argument.what))
                buffers.append(arrays.of_numpy(f"{argument.name}_{argument.what}", descriptions[-1]))
        result = self._launched(library, buffers, size, group)
        seen = {name: (str(a.dtype), tuple(a.shape), a.nbytes) for name, a in given.items()}
        seen |= {name: (str(dtypes[name]), a.shape, a.nbytes) for name, a in made.items()}
        for record in _records:
            record.append(Launch(signature, special, size, group, seen, result))
        problems = _problems(result)
        if problems:
            raise KernelError(self.name, problems)
        return [arrays.to_mlx(made[name], dtypes[name]) for name in self.outputs]

    def _arrays(self, inputs: Sequence[Any]) -> list[mx.array]:
        found = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        arrays.evaluate(found)
        if self.ensure_row_contiguous:
            found = [arrays.contiguous(x) for x in found]
            arrays.evaluate(found)
        return found

    def _specialised(
        self,
        inputs: dict[str, mx.array],
        outputs: dict[str, mx.Dtype],
        template: tuple[tuple[str, TemplateValue], ...],
    ) -> tuple[Signature, Path]:
        key = (
            *(_options.checked, _options.fma, _options.lint, template, tuple(outputs.values())),
            *((x.dtype, x.ndim == 0, x.size < SMALL) for x in inputs.values()),
        )
        if key not in self._compiled:
            signature = Signature(
                self.name, self.header, self.source, inputs, outputs, template, self.atomic_outputs
            )
            library = compile_kernel(
                signature, checked=_options.checked, fused=_options.fma, linted=_options.lint
            )
            self._compiled[key] = signature, library
        return self._compiled[key]

    def _launched(
        self,
        library: Path,
        buffers: list[Buffer],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
    ) -> Result:
        global last
        last = machine.launch(
            library,
            buffers,
            grid,
            threadgroup,
            checked=_options.checked,
            races=not _options.allow_races,
            order=_options.order,
            seed=_options.seed,
            timeout=_options.timeout,
            max_reports=_options.max_reports,
        )
        _counts[self.name] += 1
        return last


def _geometry(
    grid: Sequence[int], threadgroup: Sequence[int]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Both with three positive sizes; a threadgroup is no larger than the grid. Raises `TypeError`, as MLX's binding
    does, for what is not three ints of 32 bits."""
    size, group = _sizes("grid", grid), _sizes("threadgroup", threadgroup)
    if min(*size, *group) < 1:
        raise ValueError(
            f"[metal_kernel] grid {size} and threadgroup {group} must be three positive numbers each"
        )
    if math.prod(group) > _MAX_THREADS:
        raise ValueError(
            f"Thread group size ({math.prod(group)}) is greater than the maximum allowed threads per threadgroup "
            f"({_MAX_THREADS})."
        )
    return (size[0], size[1], size[2]), (
        min(group[0], size[0]),
        min(group[1], size[1]),
        min(group[2], size[2]),
    )


def _sizes(what: str, given: Sequence[int]) -> tuple[int, int, int]:
    sizes = tuple(operator.index(x) for x in given)
    if len(sizes) != 3 or any(size not in _INT for size in sizes):
        raise TypeError(f"[metal_kernel] {what} must be three ints of 32 bits, got {sizes}")
    return sizes[0], sizes[1], sizes[2]


def _special(template: Sequence[tuple[str, TemplateValue]]) -> tuple[tuple[str, TemplateValue], ...]:
    """Raises `ValueError`, as MLX's binding does."""
    for parameter, value in template:
        if not isinstance(value, mx.Dtype) and not (isinstance(value, int) and value in _INT):
            raise ValueError(
                "[metal_kernel] Invalid template argument. Must be `mlx.core.Dtype`, `int` or `bool`. "
                f"{parameter} is {value!r} (ints have 32 bits)"
            )
    return tuple((parameter, value) for parameter, value in template)


def _check_options(given: Any) -> None:
    """Raises `ValueError`, as MLX's binding does."""
    if not isinstance(given, dict | None):
        raise ValueError("[metal_kernel] Expected `compile_options` to be a dict.")
    for option, value in (given or {}).items():
        if option != "math_mode":
            raise ValueError(f"[metal_kernel] Unknown compile option `{option}`.")
        if value not in _MATH_MODES:
            raise ValueError("[metal_kernel] Expected math_mode to be 'safe', 'relaxed', or 'fast'.")


def _problems(result: Result) -> list[str]:
    problems = list(result.problems)
    if result.unwritten and not problems and not _options.allow_unwritten:
        name, index = result.unwritten_at
        problems.append(f"{result.unwritten} output elements were never written, first `{name}`[{index}]")
    if result.divergent_ops and not _options.allow_divergent_simd:
        problems.append(
            f"{result.divergent_ops} of {result.simd_ops} SIMD operations ran without all lanes of the SIMD-group"
        )
    return problems
