"""What `moelocal doctor` prints and writes."""

from __future__ import annotations

import argparse
import os
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import mlx.core as mx

import moelocal.ops
from moelocal import hub, machine, metal
from moelocal.doctor.cases import Case, cases
from moelocal.doctor.measure import Agreement, agreement, one_line, speed, supported, tune
from moelocal.doctor.shapes import Shapes, flagship, of_checkpoint
from moelocal.errors import ConfigError, NumericsError, RequestError
from moelocal.ops import choice
from moelocal.ops.choice import Entry, Stamp
from moelocal.ops.op import Op, forced, on_cpu
from moelocal.units import memory_size


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `doctor`."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--tune",
        nargs="?",
        const="",
        metavar="MODEL",
        help="time kernels against stock MLX at the shapes of MODEL (a folder, or a name that is on this machine; "
        "else the 35B-A3B) and keep those that win",
    )
    which.add_argument(
        "--kernels", action="store_true", help="run every kernel against its reference, with its speed"
    )


def doctor(parsed: argparse.Namespace) -> None:
    """Say what this machine is, and which form each operation takes here and why."""
    if parsed.tune is not None:
        tune_machine(_shapes(parsed.tune))
    elif parsed.kernels:
        check_kernels(flagship())
    else:
        explain()


def _shapes(model: str) -> Shapes:
    _require_metal("--tune")  # before a checkpoint is opened
    return of_checkpoint(hub.resolve(model, offline=True)) if model else flagship()


def _require_metal(flag: str) -> None:
    if not metal.available():
        raise RequestError(f"doctor {flag}: there is no Metal device here, so there is no kernel to run")


def all_ops() -> Iterator[Op[..., Any]]:
    """Every op of the library, by name."""
    modules = pkgutil.iter_modules(moelocal.ops.__path__, "moelocal.ops.")
    found = {
        value.name: value
        for module in modules
        for value in vars(import_module(module.name)).values()
        if isinstance(value, Op)
    }
    yield from (found[name] for name in sorted(found))


def explain() -> None:
    """Print machine, record, and the form of every op with the reason. Raises `RequestError` for a bad
    `MOELOCAL_OPS`, before anything is printed."""
    override, stamp, entries, trouble = forced(), Stamp.here(), None, ""
    try:
        entries = choice.read(stamp)
    except ConfigError as error:
        trouble = str(error)
    memory = f", {memory_size(machine.memory())}" if machine.memory() else ""
    device = mx.device_info().get("architecture", "unknown")
    print(f"machine   {stamp.chip or 'unknown chip'}{memory}")
    print(f"macOS     {stamp.macos or 'no'}")
    print(f"MLX       {stamp.mlx}, computes on the {mx.default_device().type.name} ({device})")
    print(f"Metal     {'yes' if metal.available() else 'no: stock MLX and host forms are used'}")
    print(f"buffers   {_buffers(stamp.chip)}")
    print(f"forms     MOELOCAL_OPS={override}")
    if trouble:
        print(f"record    ignored: {trouble}")
    elif entries is None and not metal.available():
        print("record    none")
    elif entries is None:
        old = stamp.file.exists()
        print(
            f"record    {'made with other kernels: ' if old else 'none: '}`moelocal doctor --tune` makes one"
        )
    else:
        print(f"record    {stamp.file}")
    print()
    chosen = choice.Choice(entries or ())
    for op in all_ops():
        form, why = _form(op, chosen)
        print(f"{op.name:<17} {form:<9} {why}")
        for entry in chosen.entries:
            if entry.op == op.name:
                print(f"  {entry.case:<23} {entry.form:<9} {_measured(entry)}")


def _buffers(chip: str) -> str:
    ours = machine.buffer_limits(chip)
    set_ones = {name: os.environ[name] for name in machine.BUFFER_LIMITS if name in os.environ}
    if not set_ones:
        return "MLX's own limits"
    whose = "set by moelocal for this chip" if set_ones == dict(ours) else "as set in the environment"
    return ", ".join(f"{name}={value}" for name, value in set_ones.items()) + f" ({whose})"


def _form(op: Op[..., Any], chosen: choice.Choice) -> tuple[str, str]:
    """What an op takes where no entry says otherwise, and why."""
    on_host = "; host for many rows of float32" if op.host is not None and on_cpu() else ""
    if forced() == "reference":
        return "reference", "MOELOCAL_OPS"
    if op.metal is None:
        return "portable", f"has no kernel{on_host}"
    if not metal.available():
        return "portable", f"no Metal device{on_host}"
    if forced() != "auto":
        return forced(), "MOELOCAL_OPS"
    if op.name in chosen.wrong:
        return "portable", "its kernel is WRONG on this machine:"
    if op.name in chosen.proven:
        return "metal", "proven kernel"
    return "portable", "kernel not proven" + (", but where it won here:" if op.name in chosen.ops else "")


def _measured(entry: Entry) -> str:
    if entry.ratio is None:
        return "wrong result"
    return f"{entry.ratio:.2f} times as fast as stock MLX"


def tune_machine(shapes: Shapes) -> None:
    """Measure, and write the record after every case: what was measured stays, whatever comes then. Raises
    `RequestError` without Metal, `ConfigError` if the record cannot be written; at the end, `NumericsError` if a kernel
    is wrong, `RequestError` if a case could not be measured. Of that one the record says what it said before."""
    _require_metal("--tune")
    stamp, written = Stamp.here(), False
    try:
        known = choice.read(stamp) or ()
    except ConfigError as error:
        print(f"{error}; replaced")
        known = ()
    entries, wrong, failed = {(entry.op, entry.shapes): entry for entry in known}, [], []
    print(f"{'op':<17} {'case':<24} {'portable':>10} {'metal':>10} {'ratio':>6}  kept")
    try:
        for case in filter(supported, cases(shapes)):
            row = f"{case.op.name:<17} {case.name:<24}"
            try:
                entry, found = tune(case)
            except (RuntimeError, MemoryError) as error:  # what MLX raises
                failed.append(case)
                print(f"{row} not measured: {one_line(error)}")
                continue
            entries[entry.op, entry.shapes] = entry
            choice.write(stamp, entries.values())
            written = True
            if entry.portable_seconds is None or entry.metal_seconds is None or entry.ratio is None:
                wrong.append(case)
                print(f"{row} WRONG: {_fault(found)}")
                continue
            times = f"{entry.portable_seconds * 1e6:>7.1f} us {entry.metal_seconds * 1e6:>7.1f} us"
            print(f"{row} {times} {entry.ratio:>6.2f}  {'yes' if entry.form == 'metal' else 'no'}")
    except KeyboardInterrupt:
        if written:
            print(f"\nstopped; what was measured is in {stamp.file}")
        raise
    if written:
        print(f"written to {stamp.file}")
    _refuse(wrong, failed)


def check_kernels(shapes: Shapes) -> None:
    """Run every kernel against its reference. Raises `RequestError` without Metal; at the end, `NumericsError` if a
    kernel is wrong, `RequestError` if a case could not be measured."""
    _require_metal("--kernels")
    wrong, failed = [], []
    print(f"{'op':<17} {'case':<24} {'':<5} {'error':>9} {'allowed':>9} {'GB/s':>7}")
    for case in filter(supported, cases(shapes)):
        row = f"{case.op.name:<17} {case.name:<24}"
        try:
            found = agreement(case)
            rate = speed(case).gigabytes_per_second if found.right else 0.0
        except (RuntimeError, MemoryError) as error:  # what MLX raises
            failed.append(case)
            print(f"{row} not measured: {one_line(error)}")
            continue
        if found.right:
            print(f"{row} pass  {found.error:>9.1e} {found.bound:>9.1e} {rate:>7.1f}")
        else:
            wrong.append(case)
            print(f"{row} FAIL  {_fault(found)}")
    _refuse(wrong, failed)


def _fault(found: Agreement) -> str:
    return found.problem or f"differs from the reference by {found.error:.1e}, allowed {found.bound:.1e}"


def _refuse(wrong: list[Case], failed: list[Case]) -> None:
    missing = f"could not be measured: {_names(failed)}"
    if wrong:
        text = f"wrong on this machine and not used: {_names(wrong)}; please report this"
        raise NumericsError(f"{text}; {missing}" if failed else text)
    if failed:
        raise RequestError(missing)


def _names(of: list[Case]) -> str:
    return ", ".join(f"{case.op.name} ({case.name})" for case in of)
