"""Binds kernels/*.metal through `mx.fast.metal_kernel`, on first use; the only place that knows the binding.

A `.metal` file holds templated functions. What MLX wraps around them is one call line, given with the `Kernel`. Where
there is no Metal, tests put an executor of the same signature in the place of the device (`executing`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

import mlx.core as mx

Executor = Callable[..., Callable[..., Sequence[mx.array]]]
"""Called as `mx.fast.metal_kernel`; what it returns is called as what that returns."""

_HERE: Final = Path(__file__).parent
FOLDER: Final = _HERE / "kernels" if (_HERE / "kernels").is_dir() else _HERE.parents[1] / "kernels"
"""Where the `.metal` files are: in an installed package beside this file, in a checkout at its root."""

_INCLUDE: Final = re.compile(r'^#include "(\w+)\.metal"$')

_executor: Executor | None = None


def available() -> bool:
    """Whether kernels can run here: on a Metal device that MLX computes on, or through an executor."""
    return _executor is not None or (_on_metal() and bool(mx.default_device() == mx.gpu))


@cache
def _on_metal() -> bool:
    return bool(mx.metal.is_available())


def executor() -> Executor | None:
    """What runs kernels in the place of the device, or None."""
    return _executor


@contextmanager
def executing(executor: Executor) -> Iterator[None]:
    """Run kernels through `executor` inside the block."""
    global _executor
    before, _executor = _executor, executor
    try:
        yield
    finally:
        _executor = before


@cache
def text(file: str) -> str:
    """kernels/`file`.metal with its `#include "x.metal"` lines replaced by those files, each once.

    `#line` directives keep the compilers' messages on the lines of the files.
    """
    seen: set[str] = set()

    def expand(name: str) -> Iterator[str]:
        seen.add(name)
        yield f'#line 1 "{name}.metal"'
        for number, line in enumerate((FOLDER / f"{name}.metal").read_text("ascii").splitlines(), start=1):
            include = _INCLUDE.match(line)
            if include is None:
                # MLX hashes the whole text at every launch, so comments stay behind; their lines keep the count
                yield "" if line.lstrip().startswith("//") else line
            else:
                if include[1] not in seen:
                    yield from expand(include[1])
                yield f'#line {number + 1} "{name}.metal"'

    return "\n".join(expand(file)) + "\n"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function of kernels/`file`.metal with the names that its `call` line uses.

    The call line may declare threadgroup arrays, and names the thread attributes, the template parameters and
    `<input>_strides` and `<input>_shape` that it passes on; arrays with fewer than eight elements arrive in `constant`
    address space. `strided` inputs are handed over as they lie in memory, all others are made row-contiguous by MLX.
    """

    name: str
    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    call: str
    strided: bool = False
    _bound: dict[Executor, Callable[..., Sequence[mx.array]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Mapping[str, int | bool | mx.Dtype],
    ) -> Sequence[mx.array]:
        """Outputs of `shapes` and `dtypes`; `grid` counts threads, `threadgroup` those that share memory."""
        runner = _executor or cast(Executor, mx.fast.metal_kernel)
        bound = self._bound.get(runner)
        if bound is None:
            bound = runner(
                name=f"moelocal_{self.name}",
                input_names=list(self.inputs),
                output_names=list(self.outputs),
                source=self.call,
                header=text(self.file),
                ensure_row_contiguous=not self.strided,
            )
            self._bound[runner] = bound
        arguments: dict[str, Any] = {
            "inputs": list(inputs),
            "output_shapes": [tuple(shape) for shape in shapes],
            "output_dtypes": list(dtypes),
            "grid": grid,
            "threadgroup": threadgroup,
            "template": list(template.items()),
        }
        return bound(**arguments)
