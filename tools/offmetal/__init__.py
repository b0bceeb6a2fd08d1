"""Metal off the Mac: runs kernels of `mx.fast.metal_kernel` without Metal, and finds what is wrong in them.

`metal_kernel` has the signature of `mx.fast.metal_kernel` and, where MLX has Metal, is that function. Elsewhere the
same text is compiled for the host and run with the semantics of a Metal dispatch. See README.md.
"""

from typing import TYPE_CHECKING, Any

from offmetal import kernel
from offmetal.compiler import MetalCompileError
from offmetal.kernel import (
    KernelError,
    Options,
    emulated_kernel,
    installed,
    launches,
    metal_kernel,
    options,
    recording,
)
from offmetal.machine import Result
from offmetal.toolchain import ToolMissing

if TYPE_CHECKING:
    last_result: Result

__all__ = [
    "KernelError",
    "MetalCompileError",
    "Options",
    "Result",
    "ToolMissing",
    "emulated_kernel",
    "installed",
    "last_result",
    "launches",
    "metal_kernel",
    "options",
    "recording",
]


def __getattr__(name: str) -> Any:
    # it changes with every launch
    if name == "last_result":
        return kernel.last
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
