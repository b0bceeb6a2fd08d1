"""The text that `mx.fast.metal_kernel` hands to Metal for one call, and the function through which the simulator enters
it. Follows mlx/backend/metal/custom_kernel.cpp of MLX 0.32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import mlx.core as mx

TemplateValue = int | bool | mx.Dtype

DTYPES: Final[dict[mx.Dtype, str]] = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.complex64: "complex64_t",
}

# As in MLX: each of these names that occurs anywhere in the source becomes a parameter, in this order.
ATTRIBUTES: Final = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

SMALL: Final = 8
"""Inputs with fewer elements arrive in the constant address space."""
MAX_BUFFERS: Final = 31

# `Attributes` in runtime/machine.h: the vectors first.
_ATTRIBUTES_STRUCT: Final = "struct __msl_attributes {{ {} }};".format(
    " ".join(
        f"{kind} {name};" for kind in ("uint3", "uint") for name, own in ATTRIBUTES.items() if own == kind
    )
)


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer argument: an array itself, or MLX's description of an input. `expression` reads it in the entry."""

    what: Literal["input", "output", "shape", "strides", "ndim"]
    name: str
    expression: str


class Signature:
    """One specialisation of a kernel. `header`, `head` + `source` + "}" are what Metal compiles; `entry` calls it.

    Raises `ValueError` for more buffers than Metal has.
    """

    def __init__(
        self,
        name: str,
        header: str,
        source: str,
        inputs: dict[str, mx.array],
        outputs: dict[str, mx.Dtype],
        template: Sequence[tuple[str, TemplateValue]],
        atomic_outputs: bool,
    ) -> None:
        self.name, self.header, self.source = name, header, source
        self.buffers: list[Buffer] = []
        parameters: list[str] = []

        def add(
            what: Literal["input", "output", "shape", "strides", "ndim"], of: str, kind: str, by: str
        ) -> None:
            number = len(self.buffers)
            suffix = "" if what in ("input", "output") else f"_{what}"
            parameters.append(f"  {kind}{by} {of}{suffix} [[buffer({number})]]")
            pointer = f"({kind}*)a[{number}]"
            self.buffers.append(Buffer(what, of, f"*{pointer}" if by == "&" else pointer))

        for of, array in inputs.items():
            space = "constant" if array.size < SMALL else "device"
            add("input", of, f"const {space} {DTYPES[array.dtype]}", "*" if array.ndim else "&")
            if array.ndim:
                if f"{of}_shape" in source:
                    add("shape", of, "const constant int", "*")
                if f"{of}_strides" in source:
                    add("strides", of, "const constant int64_t", "*")
                if f"{of}_ndim" in source:
                    add("ndim", of, "const constant int", "&")
        for of, dtype in outputs.items():
            add(
                "output",
                of,
                f"device atomic<{DTYPES[dtype]}>" if atomic_outputs else f"device {DTYPES[dtype]}",
                "*",
            )
        if len(self.buffers) > MAX_BUFFERS:
            raise ValueError(
                f"kernel {name}: {len(self.buffers)} buffers (shapes, strides and ndim count), but Metal has "
                f"{MAX_BUFFERS}"
            )
        attributes = [attribute for attribute in ATTRIBUTES if attribute in source]
        parameters += [f"  {ATTRIBUTES[attribute]} {attribute} [[{attribute}]]" for attribute in attributes]

        arguments = f"<{', '.join(_value(value) for _, value in template)}>" if template else ""
        declared = ", ".join(f"{_kind(value)} {parameter}" for parameter, value in template)
        self.function = "_".join(
            [
                f"custom_kernel_{name}",
                *(_value(value) for _, value in template),
                *(
                    DTYPES[a.dtype] + ("s" if not a.ndim else "c" if a.size < SMALL else "")
                    for a in inputs.values()
                ),
                *(DTYPES[dtype] for dtype in outputs.values()),
            ]
        )
        self.head = (
            (f"template <{declared}>\n" if template else "")
            + f"[[kernel]] void {self.function}(\n"
            + ",\n".join(parameters)
            + ") {\n"
        )
        call = ", ".join(
            [buffer.expression for buffer in self.buffers] + [f"t->{name}" for name in attributes]
        )
        self.entry = (
            f'{_ATTRIBUTES_STRUCT}\nextern "C" __attribute__((visibility("default"))) void '
            "__msl_entry(const __global ulong* a, const __global __msl_attributes* t) {\n"
            f"  {self.function}{arguments}({call});\n}}\n"
        )
        special = f"{self.function}{arguments}"
        instance = f'\ntemplate [[host_name("{self.function}")]] [[kernel]] decltype({special}) {special};\n'
        self.tail = "\n}\n" + (instance if template else "")
        # What MLX hands to Metal, behind the text of its utils.h.
        self.metal = f"{header}{self.head}{source}{self.tail}"


def _value(value: TemplateValue) -> str:
    return DTYPES[value] if isinstance(value, mx.Dtype) else str(int(value))


def _kind(value: TemplateValue) -> str:
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "typename"
