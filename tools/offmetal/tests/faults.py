"""Kernels with planted faults. `python -m offmetal.tests.faults` says how many of them are caught.

In a text, `// FAULT` marks a line that the report must name, and `// RIGHT: code` gives what repairs the kernel, in the
place of its line.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from typing import Any, Final

import mlx.core as mx

import offmetal
from offmetal.tests.support import run

FILE: Final = "fault.metal"

HEAD: Final = """template <typename T>
METAL_FUNC void fault(
    const device T* a, const constant float* small, device T* out, threadgroup float* s, uint i, uint t) {
"""
CALL: Final = """threadgroup float s[64];
fault<T>(a, small, out, s, thread_position_in_grid.x, thread_position_in_threadgroup.x);"""
"""a and out have 64 elements, small has 4."""

BARRIER: Final = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Fault:
    name: str
    message: str
    """Regular expression of what the report says, before the places."""
    body: str = ""
    """Of the function `fault`."""
    before: str = ""
    """Text of the file before that function."""
    call: str = CALL
    launch: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    dtype: mx.Dtype = mx.float32
    modes: tuple[str, ...] = ("checked",)
    """Where it is caught."""

    @property
    def header(self) -> str:
        return f"{self.before}{HEAD}{self.body}\n}}\n"

    def places(self) -> list[str]:
        """What a report must name."""
        texts = ((FILE, self.header), ("k.source", self.call))
        return [
            f"{file}:{number}"
            for file, text in texts
            for number, line in enumerate(text.split("\n"), start=1)
            if "// FAULT" in line
        ]

    def run(self, *, repaired: bool = False) -> None:
        """Raises `KernelError` or `MetalCompileError`, unless repaired."""
        header, call = self.header, self.call
        if repaired:
            header, call = (re.sub(r"(?m)^.*// RIGHT: ?", "", text) for text in (header, call))
        given: dict[str, Any] = {"template": [("T", self.dtype)], "dtype": self.dtype, **self.launch}
        inputs = {"a": mx.ones((64,), self.dtype), "small": mx.ones((4,))}
        with offmetal.options(**{"max_reports": 16, **self.options}):
            run(call, inputs, header=f'#line 1 "{FILE}"\n{header}', **given)


def race(
    name: str, body: str, message: str = r"data race on `s`.*two threads of a threadgroup", **rest: Any
) -> Fault:
    return Fault(name, message, body, **rest)


RUN: Final = [
    # --- bounds ---
    Fault(
        "read past the end of an input",
        r"access on `a`.*byte 256 of 256",
        "out[i] = a[i + 1];  // FAULT // RIGHT: out[i] = a[i];",
        modes=("checked", "fast"),
    ),
    Fault(
        "write past the end of an output",
        r"access on `out`.*byte 256 of 256",
        "out[i] = 0;\nout[i + 1] = 1;  // FAULT // RIGHT:",
        launch={"threadgroup": 32},
        options={"allow_races": True},
        modes=("checked", "fast"),
    ),
    Fault(
        "read before the start of an input",
        r"out-of-bounds access on `a`: 4-byte read at byte -4 of 256",
        "int j = i;\nout[i] = a[j - 1];  // FAULT // RIGHT: out[i] = a[j];",
    ),
    Fault(
        "write before the start of an output",
        r"out-of-bounds access on `out`: 4-byte write at byte -4 of 256",
        "int j = i;\nout[j - 1] = 1;  // FAULT // RIGHT: out[j] = 1;",
    ),
    Fault(
        "read a gigabyte behind an input",
        r"access on `a`.*byte 1073741824 of 256",
        "out[i] = a[i + (1 << 28)];  // FAULT // RIGHT: out[i] = a[i];",
        modes=("checked", "fast"),
    ),
    Fault(
        "read a gigabyte before an input",
        r"access on `a`.*byte -1073741824 of 256",
        "out[i] = a[int(i) - (1 << 28)];  // FAULT // RIGHT: out[i] = a[i];",
        modes=("checked", "fast"),
    ),
    Fault(
        "read past the end of a vector of an input",
        r"access on `a`.*byte 256 of 256",
        "out[i] = ((const device float4*)a)[i].x;  // FAULT // RIGHT: out[i] = ((const device float4*)a)[i / 4].x;",
        modes=("checked", "fast"),
    ),
    Fault(
        "read past the end of an input in constant memory",
        r"access on `small`.*byte 16 of 16",
        "out[i] = small[i];  // FAULT // RIGHT: out[i] = small[i % 4];",
        modes=("checked", "fast"),
    ),
    Fault(
        "read through a pointer that is none",
        r"memory that is no buffer",
        "out[i] = ((const device T*)64)[i];  // FAULT // RIGHT: out[i] = a[i];",
    ),
    Fault(
        "read past the end of threadgroup memory",
        r"out-of-bounds access on `s`: 4-byte read at byte 256 of 256",
        f"s[t] = t;\n{BARRIER}\nout[i] = s[t + 1];  // FAULT // RIGHT: out[i] = s[t];",
    ),
    Fault(
        "write past the end of threadgroup memory",
        r"out-of-bounds access on `s`: 4-byte write at byte 256 of 256",
        "s[t + 1] = t;  // FAULT // RIGHT: s[t] = t;\nout[i] = 1;",
    ),
    Fault(
        "write before the start of threadgroup memory",
        r"out-of-bounds access on `s`: 4-byte write at byte -4 of 256",
        "s[int(t) - 1] = t;  // FAULT // RIGHT: s[t] = t;\nout[i] = 1;",
    ),
    Fault(
        "threadgroup array too small in the call",
        r"access on `s`|index outside",
        "s[t] = t;  // FAULT\nout[i] = 1;",
        call=CALL.replace("s[64];", "s[63];  // RIGHT: threadgroup float s[64];", 1),
    ),
    Fault(
        "index outside of a private array",
        r"index outside of a private or threadgroup array",
        "int v[4] = {0, 1, 2, 3};\nout[i] = v[t % 5];  // FAULT // RIGHT: out[i] = v[t % 4];",
    ),
    Fault(
        "too much private memory",
        r"stack overflow: a thread uses more than 256 KB",
        "volatile float v[1 << 20];  // RIGHT: volatile float v[1 << 10];\nv[i] = 1;\nout[i] = v[i];",
        modes=("checked", "fast"),
    ),
    # --- races ---
    race(
        "no barrier between a write and a read",
        f"s[t] = t;  // FAULT\n// RIGHT: {BARRIER}\nout[i] = s[63 - t];  // FAULT",
    ),
    race(
        "barrier that orders no memory",
        "s[t] = t;  // FAULT\nthreadgroup_barrier(mem_flags::mem_none); // RIGHT: "
        f"{BARRIER}\nout[i] = s[63 - t];  // FAULT",
    ),
    race(
        "barrier that orders device memory only",
        "s[t] = t;  // FAULT\nthreadgroup_barrier(mem_flags::mem_device); // RIGHT: "
        f"{BARRIER}\nout[i] = s[63 - t];  // FAULT",
    ),
    race(
        "simdgroup barrier between two SIMD-groups",
        "s[t] = t;  // FAULT\nsimdgroup_barrier(mem_flags::mem_threadgroup); // RIGHT: "
        f"{BARRIER}\nout[i] = s[63 - t];  // FAULT",
    ),
    race(
        "simdgroup barrier that orders no memory",
        "s[t] = t;  // FAULT\nsimdgroup_barrier(mem_flags::mem_none); // RIGHT: "
        "simdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = s[t ^ 1];  // FAULT",
    ),
    race(
        "a SIMD operation is no barrier",
        "s[t] = t;  // FAULT\nfloat sum = simd_sum(1.0f); // RIGHT: "
        "float sum = simd_sum(1.0f); simdgroup_barrier(mem_flags::mem_threadgroup);\n"
        "out[i] = s[t ^ 1] + sum;  // FAULT",
    ),
    race(
        "written again before all have read",
        f"if (t == 0) s[0] = 7;\n{BARRIER}\nout[i] = s[0];  // FAULT\n"
        f"// RIGHT: {BARRIER}\nif (t == 63) s[0] = 9;  // FAULT",
    ),
    race(
        "all write one place of threadgroup memory",
        "s[0] = t;  // FAULT // RIGHT: s[t] = t;\nout[i] = 1;",
    ),
    race(
        "all write one place of an output",
        "out[i] = 0;\nout[0] = i;  // FAULT // RIGHT:",
        r"data race on `out` at byte 0: two threads of a threadgroup",
    ),
    race(
        "handed over through device memory without mem_device",
        f"out[i] = i;  // FAULT\n{BARRIER} // RIGHT: threadgroup_barrier(mem_flags::mem_device);\n"
        "if (t < 32) out[i] += out[i + 32];  // FAULT",
        r"data race on `out`.*two threads of a threadgroup",
    ),
    race(
        "two threadgroups write one place",
        "out[i] = 0;\nif (t == 0) out[0] = 1 + i;  // FAULT // RIGHT:",
        r"data race on `out` at byte 0: two threadgroups",
        launch={"threadgroup": 32},
    ),
    race(
        "a threadgroup reads what another writes",
        "out[i] = i;  // FAULT\nif (i == 40) out[i] += out[0];  // FAULT // RIGHT:",
        r"data race on `out` at byte 0: two threadgroups",
        launch={"threadgroup": 32},
    ),
    race(
        "an atomic beside a plain access",
        f"if (t == 0) s[0] = 0;\n{BARRIER}\n"
        "atomic_fetch_add_explicit((threadgroup atomic_uint*)s, 1u, memory_order_relaxed);  // FAULT\n"
        f"// RIGHT: {BARRIER}\nout[i] = s[0];  // FAULT",
    ),
    # --- barriers and SIMD operations ---
    Fault(
        "some threads return before a barrier",
        r"threadgroup_barrier is reached by 32 of 64 threads; the others have returned",
        f"if (t >= 32) return;  // RIGHT:\n{BARRIER}  // FAULT\nout[i] = 1;",
        modes=("checked", "fast"),
    ),
    Fault(
        "a barrier in both branches",
        r"threads of a threadgroup wait at different threadgroup_barrier calls",
        f"if (t < 32) {{\n{BARRIER}  // FAULT // RIGHT:\nout[i] = 1;\n}} else {{\nout[i] = 2;\n"
        f"{BARRIER}  // FAULT // RIGHT:\n}}",
        modes=("checked", "fast"),
    ),
    Fault(
        "a barrier in a loop of unequal length",
        r"threadgroup_barrier is reached by 32 of 64 threads",
        f"for (uint j = 0; j <= t / 32; j++)  // RIGHT: for (uint j = 0; j < 2; j++)\n{BARRIER}  // FAULT\nout[i] = 1;",
        modes=("checked", "fast"),
    ),
    Fault(
        "simdgroup barrier in a branch",
        r"simdgroup_barrier is not reached by all lanes",
        "if (t % 2)  // RIGHT:\nsimdgroup_barrier(mem_flags::mem_threadgroup);  // FAULT\nout[i] = 1;",
        modes=("checked", "fast"),
    ),
    Fault(
        "matrix product in a branch",
        r"simdgroup matrix operation without all 32 lanes",
        "simdgroup_float8x8 x(1.0f), y(1.0f), z(0.0f);\nif (t % 2)  // RIGHT:\n"
        "simdgroup_multiply_accumulate(z, x, y, z);  // FAULT\nout[i] = z.thread_elements()[0];",
        modes=("checked", "fast"),
    ),
    Fault(
        "shuffle from a lane in the other branch",
        r"reads lane 1, which is inactive here",
        "out[i] = 0;\nif (t % 2 == 0) out[i] = simd_shuffle_xor(float(t), 1);  // FAULT // RIGHT: out[i] = "
        "simd_shuffle_xor(float(t), 1);",
        modes=("checked", "fast"),
    ),
    Fault(
        "shuffle from a lane that does not exist",
        r"reads lane 16, which is inactive here",
        "out[i] = simd_shuffle_xor(float(t), 16);  // FAULT // RIGHT: out[i] = simd_shuffle_xor(float(t), 1);",
        launch={"threads": 48, "shape": (48,)},
        modes=("checked", "fast"),
    ),
    Fault(
        "broadcast from lane 32",
        r"lane index outside the SIMD-group",
        "out[i] = simd_broadcast(float(t), 32);  // FAULT // RIGHT: out[i] = simd_broadcast(float(t), 31);",
        modes=("checked", "fast"),
    ),
    Fault(
        "SIMD operation without some lanes, where none may be missing",
        r"1 of 3 SIMD operations ran without all lanes",
        "float x = 1;\nif (t < 16)  // RIGHT: if (t < 32)\nx = simd_sum(1.0f);\nout[i] = simd_sum(x);",
        options={"allow_divergent_simd": False},
        modes=("checked", "fast"),
    ),
    # --- values that nobody made ---
    Fault(
        "threadgroup memory read before it is written",
        r"uninitialised read on `s`: threadgroup memory is read before",
        f"if (t < 32) s[t] = 1;  // RIGHT: s[t] = 1;\n{BARRIER}\nout[i] = s[t];  // FAULT",
    ),
    Fault(
        "threadgroup memory of the threadgroup before",
        r"uninitialised read on `s`: threadgroup memory is read before",
        f"if (i < 32) s[t] = 1;  // RIGHT: s[t] = 1;\n{BARRIER}\nout[i] = s[t];  // FAULT",
        launch={"threadgroup": 32},
    ),
    Fault(
        "output read before it is written",
        r"uninitialised read on `out`: an output is read before",
        "out[i] += 1;  // FAULT // RIGHT: out[i] = 1;",
    ),
    Fault(
        "element of an output never written",
        r"1 output elements were never written, first `out`\[5\]",
        "if (i != 5)  // RIGHT:\nout[i] = 1;",
        options={"allow_unwritten": False},
    ),
    # --- alignment ---
    Fault(
        "vector of an input at an odd index",
        r"access to an address that is not a multiple",
        "const device T* p = a + t % 8;\n"
        "float4 v = *(const device float4*)p;  // FAULT // RIGHT: float4 v = *(const device packed_float4*)p;\n"
        "out[i] = v.w;",
    ),
    Fault(
        "component of a vector of threadgroup memory at an odd index",
        r"access to an address that is not a multiple",
        f"s[t] = t;\n{BARRIER}\n"
        "out[i] = ((threadgroup float2*)(s + t % 8))->y;  // FAULT // RIGHT: out[i] = s[t % 8 + 1];",
    ),
    Fault(
        "float at an odd byte",
        r"access to an address that is not a multiple",
        "out[i] = *(const device float*)((const device uchar*)a + t % 8);  // FAULT // RIGHT: out[i] = a[t % 8];",
    ),
    # --- arithmetic, resources ---
    Fault(
        "integer division by zero",
        r"integer division by zero",
        "out[i] = 5 / (int(i) - 3);  // FAULT // RIGHT: out[i] = 5 / (int(i) + 3);",
    ),
    Fault(
        "remainder of a division by zero",
        r"integer division by zero",
        "out[i] = 5u % (i / 8);  // FAULT // RIGHT: out[i] = 5u % (i / 8 + 1);",
    ),
    Fault(
        "too much threadgroup memory",
        r"threadgroup memory: 33024 bytes with s, but the limit is 32768",
        "out[i] = 1;\ns[t] = 1;",
        call="threadgroup float more[8192];  // RIGHT: threadgroup float more[8128];\nmore[0] = 1;\n"
        + CALL.replace("s[64];", "s[64];  // FAULT"),
        options={"allow_races": True},
        modes=("checked", "fast"),
    ),
    Fault(
        "endless loop",
        r"the kernel did not finish in time",
        "volatile int n = 0;\nwhile (n < 1) {\n// RIGHT: n = 1;\n}\nout[i] = 1;",
        options={"timeout": 0.2},
        modes=("checked", "fast"),
    ),
]


def compiled(name: str, message: str, body: str = "out[i] = a[i];", **rest: Any) -> Fault:
    return Fault(name, message, body, **{"dtype": mx.bfloat16, **rest})


SAY_SPACE: Final = "`p`: a pointer or reference must say device, constant, threadgroup or thread"
PLAIN: Final = {"dtype": mx.float32}

COMPILE: Final = [
    # --- address spaces ---
    compiled("pointer without an address space, in a header", SAY_SPACE,
             before="float f(float* p) {  // FAULT // RIGHT: float f(const thread float* p) {\n  return p[0];\n}\n"),
    compiled("pointer without an address space, in a template", SAY_SPACE,
             before="template <typename T>\nT f(T* p) {  // FAULT // RIGHT: T f(device T* p) {\n  return p[0];\n}\n"),
    compiled("reference without an address space", SAY_SPACE,
             before="float f(float& p) {  // FAULT // RIGHT: float f(thread float& p) {\n  return p;\n}\n"),
    compiled("pointer member without an address space", SAY_SPACE,
             before="struct S {\n  float* p;  // FAULT // RIGHT: const device float* p;\n};\n"),
    compiled("pointer variable without an address space", SAY_SPACE,
             "float v[2];\nfloat* p = v;  // FAULT // RIGHT: thread float* p = v;\np[0] = 1;\nout[i] = T(p[0]);"),
    compiled("cast to a pointer without an address space", "a cast to a pointer must say device",
             "auto r = (float*)out;  // FAULT // RIGHT: auto r = (device float*)out;\nout[i] = a[i];"),
    compiled("threadgroup memory as device memory", "cannot initialize",
             "device float* p = s;  // FAULT // RIGHT: threadgroup float* p = s;\nout[i] = a[i];"),
    compiled("an input of less than eight elements as device memory", "no matching function|changes address space",
             "out[i] = T(get(small));  // FAULT // RIGHT: out[i] = T(get(a));",
             before="template <typename U> float get(const device U* p) { return float(p[0]); }\n"),
    compiled("write to an input", "no viable overloaded|read-only|const-qualified",
             "a[i] = 1;  // FAULT // RIGHT: out[i] = 1;"),
    compiled("variable outside of functions", "`N`: a variable outside of functions must be in the constant address",
             before="constexpr int N = 3;  // FAULT // RIGHT: constant constexpr int N = 3;\n"),
    compiled("member function of an object in device memory", "a member function of an object in device",
             before="struct S {\n  int a;\n  int get() const { return a; }  // RIGHT:"
             " int get() const device { return a; }\n};\n"
             "int f(const device S* q) {\n  return q->get();  // FAULT\n}\n"),
    compiled("threadgroup variable in a function", "can be declared in the kernel itself only",
             before="inline void f() {\n  threadgroup float b[4];  // FAULT // RIGHT: float b[4];\n  b[0] = 1;\n}\n"),
    # --- types ---
    compiled("float assigned to bfloat", "bfloat",
             "T v = a[i];\nout[i] = v * 2.0f;  // FAULT // RIGHT: out[i] = T(v * 2.0f);"),
    compiled("half assigned to bfloat", "bfloat",
             "half v = 1;\nout[i] = v;  // FAULT // RIGHT: out[i] = T(v);"),
    compiled("double", "double", "double d = 1;  // FAULT // RIGHT: float d = 1;\nout[i] = T(float(d));"),
    compiled("vectors of two types", "no viable conversion|no matching",
             "float4 v = int4(1);  // FAULT // RIGHT: float4 v = float4(int4(1));\nout[i] = T(v.x);"),
    compiled("vector from too many components", "number of components",
             "float2 v(1, 2, 3);  // RIGHT: float2 v(1, 2);\nout[i] = T(v.x);"),
    compiled("component that a vector does not have", "no member",
             "float2 v(1, 2);\nout[i] = T(v.z);  // FAULT // RIGHT: out[i] = T(v.y);"),
    compiled("swizzle that a vector does not have", "no such component",
             "float2 v(1, 2);\nout[i] = T(v.xz.x);  // FAULT // RIGHT: out[i] = T(v.xy.x);"),
    compiled("max of a float and an int", "ambiguous",
             "out[i] = T(max(2.0f, 1));  // FAULT // RIGHT: out[i] = T(max(2.0f, 1.0f));"),
    compiled("SIMD sum of 64-bit integers", "no matching|ambiguous",
             "out[i] = T(float(simd_sum(1ul)));  // FAULT // RIGHT: out[i] = T(float(simd_sum(1u)));"),
    compiled("SIMD sum of bool", "deleted function",
             "out[i] = T(float(simd_sum(true)));  // FAULT // RIGHT: out[i] = T(float(simd_sum(1u)));"),
    compiled("atomic float in threadgroup memory", "device memory only",
             "auto p = (threadgroup atomic_float*)s;  // RIGHT: auto p = (device atomic_float*)out;\n"
             "atomic_fetch_add_explicit(p, 1.0f, memory_order_relaxed);  // FAULT", dtype=mx.float32,
             launch={"init_value": 0}),
    compiled("largest of atomic floats", "add, sub and exchange only",
             "auto p = (device atomic_float*)out;\natomic_fetch_max_explicit(p, 1.0f, memory_order_relaxed);  // FAULT"
             " // RIGHT: atomic_fetch_add_explicit(p, 1.0f, memory_order_relaxed);", dtype=mx.float32,
             launch={"init_value": 0}),
    # --- what Metal leaves out of C++ ---
    compiled("goto", "Metal does not have goto",
             "goto end;  // FAULT // RIGHT:\nend: out[i] = a[i];  // RIGHT: out[i] = a[i];"),
    compiled("lambda expression", "not every version of Metal has lambda expressions",
             "auto f = [](T v) { return v; };  // FAULT // RIGHT:\nout[i] = f(a[i]);  // RIGHT: out[i] = a[i];"),
    compiled("operator noexcept", "Metal does not have the operator noexcept",
             "out[i] = noexcept(a[i]) ? a[i] : a[0];  // FAULT // RIGHT: out[i] = a[i];"),
    compiled("inline assembly", "Metal does not have inline assembly",
             'asm("");  // FAULT // RIGHT:\nout[i] = a[i];'),
    compiled("static variable", "`n`: a static variable must be in the constant address space",
             "static int n = 3;  // FAULT // RIGHT: static constant int n = 3;\nout[i] = a[i * n / 3];"),
    compiled("exceptions", "exceptions", "try {  // FAULT // RIGHT: {\nout[i] = a[i];\n} catch (...) {}  // RIGHT: }"),
    compiled("pointer to a function", "pointers to functions",
             "int (*f)(int) = nullptr;  // FAULT // RIGHT:\nout[i] = a[i];"),
    compiled("virtual function", "virtual",
             before="struct S {\n  virtual int f() const { return 1; }  // FAULT // RIGHT: int f() const "
             "{ return 1; }\n};\n"),
    compiled("the C++ standard library", r"Metal does not have the C\+\+ standard library",
             "out[i] = a[i];\n// the word alone is enough",
             before="namespace std {}  // FAULT // RIGHT:\n"),
    # --- names ---
    compiled("name that nobody declared", "undeclared", "out[i] = undeclared;  // FAULT // RIGHT: out[i] = a[i];"),
    compiled("name that MLX's utils.h has", "redefinition",
             before="template <typename T>\nstruct Limits {};  // FAULT // RIGHT: struct OwnLimits {};\n"),
    compiled("undeclared name in the call", "undeclared", call=f"{CALL}\nuint n = undeclared;  // FAULT // RIGHT:"),
]  # fmt: skip
"""Two kinds have no line: MLX's text is ASCII only, and clang names the library for a wrong number of components."""

ALL: Final = [*RUN, *COMPILE]


def missed(fault: Fault, mode: str = "checked") -> str:
    """What the simulator did not see or see rightly in the kernel, or "" if all is as planted."""
    with offmetal.options(checked=mode != "fast"):
        try:
            fault.run()
            return "not caught"
        except (offmetal.KernelError, offmetal.MetalCompileError) as error:
            said = str(error)
        if not re.search(fault.message, said, re.S):
            return f"another message: {said}"
        absent = [place for place in fault.places() if not re.search(rf"{re.escape(place)}\b", said)]
        if absent:
            return f"{', '.join(absent)} not named: {said}"
        try:
            fault.run(repaired=True)
        except (offmetal.KernelError, offmetal.MetalCompileError) as error:
            return f"repaired, but: {error}"
    return ""


def main() -> int:
    wrong = {fault.name: text for fault in ALL if (text := missed(fault))}
    for name, text in wrong.items():
        print(f"{name}: {text}\n")
    print(
        f"{len(ALL) - len(wrong)} of {len(ALL)} planted faults caught, each at its line, and none once repaired"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
