"""What a figure depends on besides the program: the machine, its state, the versions, the model."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

import moelocal
from moelocal import machine
from moelocal.bench import bandwidth
from moelocal.checkpoint.files import weight_files
from moelocal.quantize.sizes import stored_sizes
from moelocal.survey import survey
from moelocal.units import memory_size

_POWER_MODES: Final = {"0": "automatic", "1": "low power", "2": "high power"}
_SAMPLES: Final = 64
_PIECE: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Header:
    """A machine and the programs on it, at one moment.

    `machine`: chip, cores and memory as a name for files; `memory` in bytes; `bandwidth`: bytes per second that it
    copies, measured; `power`: mode and source, as far as the system tells; `device`: where MLX computes; `moelocal`:
    the commit, or the version where the package is not in its repository; `date`: UTC, ISO 8601.
    """

    machine: str
    chip: str
    cores: int
    memory: int
    bandwidth: float
    power: str
    system: str
    python: str
    mlx: str
    device: str
    moelocal: str
    date: str
    command: str

    @classmethod
    def now(cls, command: str) -> Header:
        """This machine, now. Measures the bandwidth when it is first called: about a second."""
        chip, cores, memory = _machine()
        return cls(
            machine=machine_name(),
            chip=chip,
            cores=cores,
            memory=memory,
            bandwidth=round(bandwidth.measured()),
            power=power(),
            system=_system(),
            python=platform.python_version(),
            mlx=version("mlx"),
            device=_device(),
            moelocal=commit(Path(moelocal.__file__).parent) or moelocal.__version__,
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=command,
        )

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)

    @property
    def words(self) -> str:
        """The machine: "Apple M4 Max, 16 cores, 64 GB"."""
        return _words(self.chip, self.cores, self.memory)

    def as_lines(self) -> list[str]:
        """It, for people."""
        return [
            f"machine    {self.words}, {self.system}",
            f"power      {self.power}",
            f"bandwidth  {self.bandwidth / 1e9:.1f} GB/s copied (measured)",
            f"programs   moelocal {self.moelocal}, MLX {self.mlx} on {self.device}, Python {self.python}",
            f"date       {self.date}",
            f"command    {self.command}",
        ]


@dataclass(frozen=True, slots=True)
class Identity:
    """Which weights. `nbytes`: of the text model in its files; `hash`: changes with any of the weights (twelve digits;
    of a file its name, size, header and samples are read, as for snapshots)."""

    name: str
    quantization: str
    nbytes: int
    hash: str

    @classmethod
    def of(cls, folder: Path, name: str) -> Identity:
        """The checkpoint in `folder`. Raises `ConfigError`, `CheckpointError`."""
        found = survey(folder)
        most = found.formats[0][0] if found.formats else "no matrices"
        bits = stored_sizes(found).bits_per_weight
        # written by benchmarks/synthetic.py; `moelocal cost` does not take its speed for a model's
        random = ", random weights" if (folder / "synthetic.json").is_file() else ""
        return cls(
            name, f"{bits:.2f} bits per weight, most in {most}{random}", found.nbytes, weights_hash(folder)
        )

    def as_dict(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)


def weights_hash(folder: Path) -> str:
    """Twelve hex digits that name the weights and config.json in `folder`, whatever runs them."""
    digest = hashlib.blake2b(digest_size=6)
    digest.update((folder / "config.json").read_bytes() + b"\0")
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode() + b"\0")
        with file.open("rb") as stream:
            for piece in range(_SAMPLES + 1):
                stream.seek(max(0, size - _PIECE) * piece // _SAMPLES)
                digest.update(stream.read(_PIECE))
    return digest.hexdigest()


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command that runs, as a person would type it: without the folder of the program, the home folder as ~."""
    program, *rest = sys.argv if arguments is None else arguments
    place = Path(program)
    name = place.name
    if name == "__main__.py":
        name = f"python -m {place.parent.name}"
    elif name.endswith(".py"):
        name = f"python {'/'.join(place.parts[-2:])}"
    home = str(Path.home())
    # quoted by hand, so that ~ stays what a shell expands
    quoted = (
        f"~{shlex.quote(word.removeprefix(home))}" if word.startswith(f"{home}/") else shlex.quote(word)
        for word in rest
    )
    return " ".join((name, *quoted))


def machine_name() -> str:
    """This machine as a name for files, by what its buyer chose: apple-m4-max-16-cores-64-gb."""
    return slug(_words(*_machine()))


def slug(words: str) -> str:
    """Words as the name of a file: "Apple M4 Max" is apple-m4-max."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", words.lower())).strip("-") or "unknown"


def _machine() -> tuple[str, int, int]:
    return machine.chip() or "unknown chip", os.cpu_count() or 0, machine.memory()


def _words(chip: str, cores: int, memory: int) -> str:
    return f"{chip}, {cores} cores, " + (memory_size(memory) if memory else "unknown memory")


def commit(package: Path) -> str:
    """The commit of the repository that holds `package`, with "+changes" if files of it differ; empty if the package is
    in no repository, or in one of somebody else."""

    def git(*arguments: str) -> str | None:
        return _output("git", "-C", str(package), *arguments)

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    found = (git("rev-parse", "--short=12", "HEAD") or "").strip()
    changed = git("status", "--porcelain", "--untracked-files=no", ".")
    return f"{found}+changes" if found and changed else found


def power() -> str:
    """Mode and source: "high power, AC power"; "unknown" for what the system does not say."""
    if sys.platform == "darwin":
        return power_of_mac(_output("pmset", "-g") or "", _output("pmset", "-g", "batt") or "")
    return power_of_linux(Path("/sys"))


def power_of_mac(settings: str, battery: str) -> str:
    """What `pmset -g` and `pmset -g batt` printed."""
    found = re.search(r"^\s*(powermode|lowpowermode)\s+(\d)", settings, re.MULTILINE)
    mode = _POWER_MODES.get(found[2], f"mode {found[2]}") if found else "unknown mode"
    source = re.search(r"drawing from '([^']+)'", battery)
    return f"{mode}, {source[1] if source else 'unknown source'}"


def power_of_linux(system: Path) -> str:
    """The governor of the processor's frequency and whether a charger is connected, from /sys."""
    words = []
    governor = _text(system / "devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor:
        words.append(f"governor {governor}")
    for supply in sorted(system.glob("class/power_supply/*")):
        if _text(supply / "type") == "Mains":
            words.append("AC power" if _text(supply / "online") == "1" else "battery")
    return ", ".join(words) or "unknown"


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _output(*command: str) -> str | None:
    """What a program of the system prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {machine.macos()}"
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        name = platform.system()
    return f"{name}, kernel {platform.release()}"


def _device() -> str:
    kind = mx.default_device().type.name
    architecture = mx.device_info().get("architecture") or mx.device_info().get("device_name") or "unknown"
    return f"{kind} ({architecture})"
