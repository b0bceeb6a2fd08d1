"""`Meter`: the energy that this machine takes while something runs, where the system tells a program without rights."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

_APPLE_PARTS: Final = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")
"""Of what zeus-apple-silicon reports: millijoules of the parts of the chip and its memory that do not overlap. What a
chip does not tell (None; on older ones the memory) is not in the sum."""

_POWERCAP: Final = Path("/sys/class/powercap")


class Source(Protocol):
    """Something that counts joules."""

    name: str

    def begin(self) -> Any:
        """A mark, for `joules`."""

    def joules(self, mark: Any) -> float | None:
        """Since the mark; None if it cannot be told."""


class Apple:
    """Apple's own counters (IOReport) through zeus-apple-silicon, which needs no administrator. Whole machine: cores,
    graphics, memory, but not the display or the power supply."""

    name = "zeus-apple-silicon"

    def __init__(self, monitor: Any) -> None:
        self._monitor, self._marks = monitor, 0

    def begin(self) -> str:
        self._marks += 1
        label = f"moelocal {self._marks}"
        self._monitor.begin_window(label)
        return label

    def joules(self, mark: str) -> float | None:
        found = self._monitor.end_window(mark)
        parts = [getattr(found, part, None) for part in _APPLE_PARTS]
        told = [part for part in parts if part is not None]
        return sum(told) / 1000 if told else None


class Rapl:
    """The counters of Intel and AMD processors, where Linux lets everybody read them. Whole packages, with memory where
    that is told apart."""

    name = "RAPL"

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones

    @classmethod
    def open(cls, root: Path = _POWERCAP) -> Rapl | None:
        """None where there is none, or it is for root alone."""
        zones = []
        for zone in sorted(root.glob("intel-rapl:*")):
            with suppress(OSError, ValueError):
                name = (zone / "name").read_text().strip()
                int((zone / "energy_uj").read_text())
                if name.startswith("package") or name == "dram":  # core and uncore are parts of the package
                    zones.append(zone)
        return cls(zones) if zones else None

    def begin(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]

    def joules(self, mark: list[int]) -> float | None:
        total = 0
        for zone, before, now in zip(self._zones, mark, self.begin(), strict=True):
            # the counter starts anew at its end
            total += now - before if now >= before else now - before + self._most(zone)
        return total / 1e6

    @staticmethod
    def _most(zone: Path) -> int:
        return int((zone / "max_energy_range_uj").read_text())


class Meter:
    """Joules between `begin` and `joules`; None for both where nothing tells them."""

    def __init__(self, source: Source | None) -> None:
        self._source = source

    @classmethod
    def here(cls) -> Meter:
        """The meter of this machine."""
        return cls(_apple() if sys.platform == "darwin" else Rapl.open())

    @property
    def name(self) -> str:
        """What tells the energy; empty for nothing."""
        return self._source.name if self._source else ""

    def begin(self) -> Any:
        """A mark, for `joules`."""
        return self._source.begin() if self._source else None

    def joules(self, mark: Any) -> float | None:
        """Since a mark, which then is used up."""
        return self._source.joules(mark) if self._source else None


def _apple() -> Apple | None:
    """None without zeus-apple-silicon (the extra `energy`), or where it cannot read the counters."""
    try:
        monitor = import_module("zeus_apple_silicon").AppleEnergyMonitor  # by name: it exists on macOS only
        return Apple(monitor())
    except (ImportError, RuntimeError):
        return None
