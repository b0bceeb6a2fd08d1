"""`python -m offmetal check|show|traffic KERNEL`: run the tests of a kernel and say what it did. See README.md."""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import NoReturn

import mlx.core as mx
import pytest

import offmetal
from offmetal import toolchain
from offmetal.compiler import compile_kernel
from offmetal.kernel import Launch
from offmetal.places import places
from offmetal.pytest_plugin import MODES
from offmetal.signature import Signature

_FOLDERS = ("tests/kernels", "../tests/kernels")


class UsageError(Exception):
    """What was asked for does not exist."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _OneMode:
    """Of the tests that run in each mode, those of one. All others run too, but not in fast mode, which knows no
    traffic."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self._is_wanted(item)]

    def _is_wanted(self, item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        mode = callspec.params.get("mode") if callspec else None
        return bool(mode == self.mode if mode else self.mode != "fast")


def main(arguments: list[str] | None = None) -> int:
    """0: all is well, 1: a test failed or a text does not compile, 2: bad arguments, or no clang here."""
    own, extra = list(sys.argv[1:] if arguments is None else arguments), []
    if "--" in own:
        own, extra = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = _Parser(prog="offmetal", description=__doc__, epilog="what follows -- goes to pytest")
    parser.add_argument("action", choices=("check", "show", "traffic"))
    parser.add_argument("kernel", help="its name, its .metal file, or tests as pytest takes them")
    parser.add_argument(
        "--tests", type=Path, help=f"folder of test_<name>.py; default {' or '.join(_FOLDERS)}"
    )
    parser.add_argument("--limit", type=int, default=8, help="launches to show, the largest first")
    try:
        given = parser.parse_args(own)
        toolchain.clang()
        if given.action == "check" and given.kernel.endswith(".metal"):
            return _check_text(Path(given.kernel))
        target = _target(given.kernel, given.tests)
        if given.action == "check":
            return max(_check(mode, target, extra) for mode in MODES)
        launches = _recorded(target, extra)
    except (UsageError, offmetal.ToolMissing) as error:
        print(f"offmetal: {str(error).removeprefix('offmetal: ')}", file=sys.stderr)
        return 2
    if launches is None:
        return 1
    print("\n\n".join((_texts if given.action == "show" else _tables)(launches, given.limit)))
    return 0


def _target(kernel: str, folder: Path | None) -> str:
    """The tests of a kernel, as an argument of pytest."""
    path = Path(kernel.split("::")[0])
    if path.suffix == ".metal":
        if not path.exists():
            raise UsageError(f"{kernel}: no such file")
        kernel = path.stem  # its text becomes a kernel where its tests launch it
    elif path.suffix == ".py" or "/" in kernel:
        if not path.exists():
            raise UsageError(f"{kernel}: no such test file")
        return kernel
    folders = [folder] if folder else [Path(name) for name in _FOLDERS]
    for candidate in folders:
        if (candidate / f"test_{kernel}.py").exists():
            return str(candidate / f"test_{kernel}.py")
    raise UsageError(f"{kernel}: there is no test_{kernel}.py in {' or '.join(map(str, folders))}")


def _run(target: str, extra: list[str], mode: str, *, quiet: bool) -> int:
    """0: passed, 1: a test failed. Raises `UsageError` where pytest could not run any."""
    said = io.StringIO()
    command = [target, "--no-header", "-p", "no:cacheprovider", *extra]
    with offmetal.options(**MODES[mode]), redirect_stdout(said) if quiet else nullcontext():
        code = int(pytest.main(command, plugins=["offmetal.pytest_plugin", _OneMode(mode)]))
    if quiet and code:
        print(said.getvalue())
    if code == pytest.ExitCode.NO_TESTS_COLLECTED and mode == "fast":
        return 0
    if code > 1:
        raise UsageError(f"{target}: pytest ran no tests (exit code {code})")
    return code


def _check(mode: str, target: str, extra: list[str]) -> int:
    print(f"--- {mode} ---", flush=True)
    return _run(target, extra, mode, quiet=False)


def _recorded(target: str, extra: list[str]) -> list[Launch] | None:
    """What the tests launch in checked mode, or None if one fails."""
    with offmetal.recording() as launches:
        return None if _run(target, extra, "checked", quiet=True) else launches


# --- check FILE.metal ---


def _expanded(file: Path, seen: set[Path]) -> Iterator[str]:
    """The lines of a file and, in the place of its `#include "x.metal"`, those of that file; each file once."""
    seen.add(file)
    yield f'#line 1 "{file.name}"'
    for number, line in enumerate(file.read_text("ascii").splitlines(), start=1):
        included = re.match(r'#include "([\w./]+\.metal)"$', line)
        if not included:
            yield line
            continue
        other = file.parent / included[1]
        if other not in seen:
            yield from _expanded(other, seen)
        yield f'#line {number + 1} "{file.name}"'


def _check_text(file: Path) -> int:
    try:
        text = "\n".join(_expanded(file, set())) + "\n"
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: {error}") from None
    signature = Signature(file.stem, text, "nothing[0] = 0;", {}, {"nothing": mx.int32}, (), False)
    try:
        compile_kernel(signature, checked=True, fused=False, linted=True)
    except offmetal.MetalCompileError as error:
        print(error)
        return 1
    print(f"{file}: compiles, as far as templates can without their arguments; nothing was run")
    return 0


# --- show ---


def _texts(launches: list[Launch], limit: int) -> Iterator[str]:
    """Each text once, its lines named as reports name them."""
    different = {launch.signature.metal: launch for launch in launches}
    for launch in list(different.values())[:limit]:
        signature = launch.signature
        rows = [
            *zip(
                places(signature.header, f"{signature.name}.header"),
                signature.header.split("\n"),
                strict=True,
            )
        ]
        rows = rows[:-1] if signature.header.endswith("\n") else rows
        rows += [(("", 0), line) for line in signature.head.splitlines()]
        rows += zip(
            places(signature.source, f"{signature.name}.source"), signature.source.split("\n"), strict=True
        )
        rows += [(("", 0), line) for line in signature.tail.strip("\n").splitlines()]
        names = [f"{file}:{number}" if file else "" for (file, number), _ in rows]
        width = max(map(len, names))
        yield "\n".join(
            [f"// {_title(launch)}"]
            + [f"{name:{width}} | {line}".rstrip() for name, (_, line) in zip(names, rows, strict=True)]
        )


def _title(launch: Launch) -> str:
    arguments = ", ".join(f"{name}={_short(value)}" for name, value in launch.template)
    return f"{launch.signature.name}<{arguments}>" if arguments else launch.signature.name


def _short(value: object) -> str:
    return str(value).removeprefix("mlx.core.")


# --- traffic ---


def _tables(launches: list[Launch], limit: int) -> Iterator[str]:
    """A table for each shape that a kernel was launched with, those that touch most memory first."""
    shapes: dict[str, list[Launch]] = {}
    for launch in launches:
        key = repr(
            (launch.signature.function, launch.template, launch.grid, launch.threadgroup, launch.buffers)
        )
        shapes.setdefault(key, []).append(launch)
    ordered = sorted(shapes.values(), key=lambda same: -_touched(same[-1]))
    for same in ordered[:limit]:
        yield _table(same[-1], len(same))
    if len(ordered) > limit:
        yield f"{len(ordered) - limit} smaller ones are left out (--limit)"


def _touched(launch: Launch) -> int:
    return sum(counts["touched"] for counts in launch.result.traffic.values())


def _table(launch: Launch, times: int) -> str:
    result = launch.result
    rows: list[tuple[str, ...]] = [
        ("buffer", "dtype", "shape", "bytes", "read", "written", "touched", "times read")
    ]
    total = [0, 0, 0]
    for name, counts in result.traffic.items():
        dtype, shape, nbytes = launch.buffers.get(name, ("", (), 0))
        row = [counts["read"], counts["written"], counts["touched"]]
        total = [a + b for a, b in zip(total, row, strict=True)]
        per = f"{counts['read'] / nbytes:.2f}" if nbytes and counts["read"] else ""
        size = f"{nbytes:,}" if name in launch.buffers else ""
        rows.append((name, _short(dtype), "x".join(map(str, shape)), size, *(f"{n:,}" for n in row), per))
    rows.append(("all", "", "", "", *(f"{n:,}" for n in total), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if k < 3 else cell.rjust(width) for k, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]
    grid, group = (" x ".join(map(str, size)) for size in (launch.grid, launch.threadgroup))
    return "\n".join(
        [
            f"{_title(launch)}: {times} launch{'es' if times > 1 else ''} of {grid} threads in groups of {group}",
            f"{result.simd_ops:,} SIMD operations ({result.divergent_ops:,} without all lanes), {result.barriers:,} "
            f"barriers, {result.tg_bytes:,} bytes of threadgroup memory",
            *(line.rstrip() for line in lines),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
