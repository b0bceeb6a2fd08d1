"""Runs a compiled kernel over a grid (the Python side of runtime/) and words what the runtime reports."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from offmetal import toolchain
from offmetal.places import source_lines

_u32, _u64, _i32 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32

ORDERS: Final = {"ascending": 0, "descending": 1, "random": 2}
"""In which order lanes and SIMD-groups go on."""

_MAX_REPORTS: Final = 16
_RACE: Final = 2
_KINDS: Final = {
    1: "out-of-bounds access",
    _RACE: "data race",
    3: "uninitialised read",
    4: "barrier divergence",
    5: "inactive lane",
    6: "threadgroup memory",
    7: "invalid access",
    8: "timeout",
    9: "undefined behaviour",
}

# The structures below are those of runtime/machine.h.


class _Report(ctypes.Structure):
    _fields_ = [
        ("kind", _i32),
        ("write", _i32),
        ("pc", _u64),
        ("other_pc", _u64),
        ("thread", _u32 * 3),
        ("group", _u32 * 3),
        ("other_thread", _u32 * 3),
        ("other_group", _u32),
        ("offset", _u64),
        ("name", ctypes.c_char * 64),
        ("text", ctypes.c_char * 128),
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("host", ctypes.c_void_p),
        ("bytes", _u64),
        ("origin", _u64),
        ("element", _u32),
        ("flags", _u32),
        ("name", ctypes.c_char_p),
        ("read_bytes", _u64),
        ("written_bytes", _u64),
        ("lines", _u64),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("n_buffers", _u32),
        ("checks", _u32),
        ("grid", _u32 * 3),
        ("threadgroup", _u32 * 3),
        ("order", _u32),
        ("seed", _u32),
        ("timeout_ms", _u32),
        ("max_reports", _u32),
        ("n_reports", _u32),
        ("threadgroup_bytes", _u32),
        ("simd_ops", _u64),
        ("divergent_ops", _u64),
        ("barriers", _u64),
        ("threads", _u64),
        ("benign_writes", _u64),
        ("unwritten", _u64),
        ("unwritten_index", _u64),
        ("unwritten_name", ctypes.c_char * 64),
        ("base", _u64),
        ("reports", _Report * _MAX_REPORTS),
    ]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of the host that the kernel gets a copy of; its pointer points `origin` bytes behind the start."""

    name: str
    address: int
    nbytes: int
    origin: int
    itemsize: int
    output: bool = False
    initialised: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """What happened in a launch, besides the outputs. The counts below `problems` are of the whole grid."""

    problems: list[str]
    traffic: dict[str, dict[str, int]]
    """Of each buffer, in checked mode: bytes that all threads together `read` and had `written`, and the size of the
    128-byte lines that these lie in, `touched`: what a cache that forgets nothing would transfer."""
    threads: int
    simd_ops: int
    divergent_ops: int
    """SIMD operations that not all lanes took part in."""
    barriers: int
    """Threadgroup barriers, each counted once per threadgroup."""
    benign_writes: int
    """Writes of the value that another thread wrote, without a barrier in between."""
    tg_bytes: int
    """Threadgroup memory."""
    unwritten: int
    """Elements of outputs that no thread wrote; the first one is `unwritten_at`."""
    unwritten_at: tuple[str, int]


_lock: Final = threading.Lock()  # the runtime is one machine


@cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(toolchain.runtime()))
    library.msl_launch.argtypes = [ctypes.POINTER(_Launch)]
    library.msl_launch_size.restype = _u64
    assert library.msl_launch_size() == ctypes.sizeof(_Launch), "machine.py and machine.h differ"
    return library


@cache
def _loaded(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def launch(
    library: Path,
    buffers: Sequence[Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    *,
    checked: bool,
    races: bool,
    order: str,
    seed: int,
    timeout: float,
    max_reports: int,
) -> Result:
    """`checked` for a library compiled so; `races`: look for them too. `timeout` in seconds."""
    call = _Launch()
    call.entry = ctypes.cast(_loaded(library).__msl_entry, ctypes.c_void_p)
    call.n_buffers = len(buffers)
    call.buffers = (_Buffer * len(buffers))(
        *(
            _Buffer(b.address, b.nbytes, b.origin, b.itemsize, b.output | b.initialised << 1, b.name.encode())
            for b in buffers
        )
    )
    call.checks = (5 | races << 1) if checked else 0
    call.grid[:], call.threadgroup[:] = grid, threadgroup
    call.order, call.seed, call.timeout_ms = ORDERS[order], seed, int(timeout * 1000)
    call.max_reports = min(max_reports, _MAX_REPORTS)
    with _lock:
        _runtime().msl_launch(ctypes.byref(call))
    groups = [-(-size // part) for size, part in zip(grid, threadgroup, strict=True)]
    return Result(
        problems=[_worded(call.reports[i], library, call.base, groups) for i in range(call.n_reports)],
        traffic={
            b.name.decode(): {
                "read": b.read_bytes,
                "written": b.written_bytes,
                "touched": min(b.lines * 128, -(-b.bytes // 128) * 128),
            }
            for b in call.buffers[: call.n_buffers]
        },
        threads=call.threads,
        simd_ops=call.simd_ops,
        divergent_ops=call.divergent_ops,
        barriers=call.barriers,
        benign_writes=call.benign_writes,
        tg_bytes=call.threadgroup_bytes,
        unwritten=call.unwritten,
        unwritten_at=(call.unwritten_name.decode(), call.unwritten_index),
    )


def _worded(report: _Report, library: Path, base: int, groups: list[int]) -> str:
    """A report as text, its first line saying what, the others who and where."""
    where, other = source_lines(library, [pc - base if pc else 0 for pc in (report.pc, report.other_pc)])
    kind, name, text = _KINDS[report.kind], report.name.decode(), report.text.decode()
    who = f"thread {_xyz(report.thread)} of threadgroup {_xyz(report.group)}"
    if report.kind == _RACE:
        serial = report.other_group
        group = (serial % groups[0], serial // groups[0] % groups[1], serial // groups[0] // groups[1])
        return (
            f"{kind} on `{name}` at byte {report.offset}: {text}\n"
            f"    {who} {_verb(report.write)} it at {where}\n"
            f"    thread {_xyz(report.other_thread)} of threadgroup {_xyz(group)} "
            f"{_verb(report.write >> 1)} it at {other}"
        )
    worded = f"{kind}{f' on `{name}`' if name else ''}: {text}"
    if where != "?":
        worded += f"\n    {who} at {where}"
    if report.other_pc:
        worded += f"\n    thread {_xyz(report.other_thread)} at {other}"
    return worded


def _verb(write: int) -> str:
    return "writes" if write & 1 else "reads"


def _xyz(vector: Sequence[int]) -> str:
    return f"({vector[0]}, {vector[1]}, {vector[2]})"
