"""Finds clang and prepares what all kernels share, in a cache on disk: the runtime, the Metal library, MLX's own
headers and their precompiled form."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

import mlx.core as mx

from offmetal.rewrite import rewrite

_HERE: Final = Path(__file__).parent
_LIBRARY: Final = _HERE / "include"
_RUNTIME: Final = _HERE / "runtime"
_OLDEST, _NEWEST = 16, 24
"""Versions of clang: 14 reports variables as uninitialised that are not; newer ones are looked for by name."""

# The headers into which Apple's compiler splits its library; here they are all of it.
_METAL_HEADERS: Final = (
    *("metal_atomic", "metal_common", "metal_compute", "metal_geometric", "metal_integer", "metal_limits"),
    *("metal_math", "metal_matrix", "metal_pack", "metal_relational", "metal_simdgroup"),
    *("metal_simdgroup_matrix", "metal_stdlib", "metal_type_traits", "metal_types"),
)

_LANGUAGE: Final = (
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-nostdinc"),
    *("-Xclang", "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64", "-cl-single-precision-constant"),
    *("-fPIC", "-fvisibility=hidden", "-gline-tables-only"),
    *("-Wno-unknown-attributes", "-Wno-unknown-pragmas", "-Wno-c++20-extensions", "-Wno-c++17-extensions"),
    # the runtime tells call sites apart by the return addresses on the stack
    *("-fno-omit-frame-pointer", "-fno-optimize-sibling-calls"),
    # locals that nobody wrote are NaN or 0xAA…, where the optimiser would often make them zero
    "-ftrivial-auto-var-init=pattern",
    # a large frame touches the page below its stack, and not only what lies beyond
    "-fstack-clash-protection",
    # code in the order of the source: the runtime lets the lanes that are behind catch up
    *("-mllvm", "-disable-block-placement", "-fno-unroll-loops"),
)
_CHECKED: Final = (
    # every access keeps its own line
    *("-O1", "-mllvm", "-simplifycfg-sink-common=false", "-mllvm", "-simplifycfg-hoist-common=false"),
    *("-fsanitize=thread", "-mllvm", "-tsan-instrument-func-entry-exit=0"),
    *("-mllvm", "-tsan-instrument-read-before-write=1"),
    # given to the compiler itself, as the driver does not combine these with -fsanitize=thread
    *("-Xclang", "-fsanitize=alignment,array-bounds,local-bounds,integer-divide-by-zero"),
    *("-Xclang", "-fsanitize-recover=alignment,array-bounds,local-bounds,integer-divide-by-zero"),
    *("-Xclang", "-fsanitize-minimal-runtime"),
)


class ToolMissing(RuntimeError):
    """This machine lacks what the simulator needs."""


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


@cache
def clang() -> tuple[str, str]:
    """A clang that knows the language, and what it says about its version. Raises `ToolMissing`, with one line."""
    if platform.system() != "Linux":
        raise ToolMissing("offmetal: the simulator runs on Linux; on a Mac the device runs the kernels")
    named = os.environ.get("OFFMETAL_CLANG")
    names = (
        [named] if named else [*(f"clang-{number}" for number in range(_NEWEST, _OLDEST - 1, -1)), "clang"]
    )
    for name in names:
        if shutil.which(name):
            says = run([name, "--version"]).stdout
            number = re.search(r"clang version (\d+)", says)
            if number and int(number[1]) >= _OLDEST:
                return name, says
    where = f"{named} (OFFMETAL_CLANG) is not" if named else "there is no"
    raise ToolMissing(
        f"offmetal: {where} clang {_OLDEST} or later: apt install clang-19 or set OFFMETAL_CLANG"
    )


@cache
def _instruction_set() -> tuple[str, ...]:
    """Half precision is slow without its instructions, which nearly every x86-64 machine has."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    if platform.machine() == "x86_64" and all(f" {name}" in flags for name in ("f16c", "avx2", "fma")):
        return ("-march=x86-64-v3",)
    return ()


@cache
def folder() -> Path:
    """Where everything for this state of the simulator, clang and MLX is cached."""
    name, says = clang()
    state = hashlib.sha256()
    parts = [_HERE / f"{name}.py" for name in ("signature", "rewrite", "lint", "toolchain", "compiler")]
    for file in sorted([*_LIBRARY.iterdir(), *_RUNTIME.iterdir(), *parts]):
        state.update(file.name.encode() + file.read_bytes())
    state.update(repr((name, says, _instruction_set(), version("mlx"))).encode())
    base = Path(os.environ.get("OFFMETAL_CACHE") or Path.home() / ".cache" / "offmetal")
    found = base / state.hexdigest()[:16]
    found.mkdir(parents=True, exist_ok=True)
    return found


def publish(target: Path, build: Callable[[Path], object]) -> Path:
    """`target`, which `build` makes under another name: other processes see all of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as workshop:
        made = Path(workshop) / target.name
        build(made)
        made.replace(target)
    return target


def publish_text(target: Path, text: str) -> Path:
    return publish(target, lambda out: out.write_text(text))


@contextmanager
def locked() -> Iterator[None]:
    """One process at a time: a precompiled header is void once a file in it was written again."""
    with (folder() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@cache
def headers() -> Path:
    """The Metal library and MLX's own kernels, which its wheel carries, as clang takes them. Copies, so that the cache
    outlives the checkout that filled it."""
    target = folder() / "include"
    with locked():
        if not (target / "complete").exists():
            for file in _LIBRARY.iterdir():
                publish_text(target / file.name, file.read_text())
            for name in _METAL_HEADERS:
                publish_text(target / name, '#include "msl.h"\n')
            wheel = Path(mx.__file__).parent / "include"
            for file in (wheel / "mlx/backend/metal/kernels").rglob("*.h"):
                publish_text(target / file.relative_to(wheel), rewrite(file.read_text()))
            # what MLX puts before every kernel
            publish_text(target / "prelude.h", '#include "mlx/backend/metal/kernels/utils.h"\n')
            (target / "complete").touch()
    return target


@cache
def runtime() -> Path:
    """The machine that kernels run on, as a shared library."""
    target = folder() / "libruntime.so"
    options = [
        *(
            "-x",
            "c++",
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-fno-omit-frame-pointer",
            "-fvisibility=hidden",
            "-shared",
        ),
        *("-fno-optimize-sibling-calls", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"),
    ]

    def build(out: Path) -> None:
        sources = [str(file) for file in sorted(_RUNTIME.glob("*.cpp"))]
        done = run([clang()[0], *options, *sources, "-o", str(out), "-lm"])
        if done.returncode:
            raise RuntimeError(f"offmetal: the runtime does not compile\n{done.stderr}")

    with locked():
        return target if target.exists() else publish(target, build)


def compiler(checked: bool, fused: bool) -> list[str]:
    """The command that compiles kernels; `fused` allows a * b + c to be rounded once, as Metal's compiler may."""
    return [
        clang()[0],
        *(*_LANGUAGE, *_instruction_set(), *(_CHECKED if checked else ("-O2",))),
        *(f"-ffp-contract={'fast' if fused else 'off'}", "-I", str(headers())),
    ]


@cache
def prelude(checked: bool, fused: bool) -> Path:
    """The precompiled header for `compiler` with the same arguments."""
    target = folder() / f"prelude-{'checked' if checked else 'fast'}{'-fused' if fused else ''}.pch"
    source = headers() / "prelude.h"

    def build(out: Path) -> None:
        options = ["-Xclang", "-emit-pch", "-Xclang", "-fno-pch-timestamp", "-c", str(source), "-o", str(out)]
        done = run([*compiler(checked, fused), *options])
        if done.returncode:
            raise RuntimeError(f"offmetal: MLX's utils.h does not compile\n{done.stderr}")

    with locked():
        return target if target.exists() else publish(target, build)
