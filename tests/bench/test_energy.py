"""Joules, where a system tells them: with counters of the test's own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moelocal.bench.energy import Apple, Meter, Rapl, _apple


class Monitor:
    """As zeus-apple-silicon's: windows by label, each ended once."""

    def __init__(self, **millijoules: int | None) -> None:
        self.told, self.open = millijoules, set[str]()

    def begin_window(self, label: str) -> None:
        assert label not in self.open
        self.open.add(label)

    def end_window(self, label: str) -> SimpleNamespace:
        self.open.remove(label)
        return SimpleNamespace(**self.told)


def test_apple_adds_the_parts_that_do_not_overlap():
    told = {"cpu_total_mj": 1500, "gpu_mj": 8000, "gpu_sram_mj": 20, "dram_mj": 480, "ane_mj": 0}
    monitor = Monitor(**told, performance_cores_mj=[700], performance_cluster_mj=[900])
    meter = Meter(Apple(monitor))
    assert meter.name == "zeus-apple-silicon"
    outer = meter.begin()
    inner = meter.begin()
    assert meter.joules(inner) == 10.0
    assert meter.joules(outer) == 10.0
    assert not monitor.open


def one_window(source: Apple) -> float | None:
    return source.joules(source.begin())


def test_what_a_chip_does_not_tell_is_not_in_the_sum():
    assert one_window(Apple(Monitor(cpu_total_mj=1500, gpu_mj=500, dram_mj=None, ane_mj=None))) == 2.0
    assert one_window(Apple(Monitor(cpu_total_mj=None, gpu_mj=None))) is None


@pytest.mark.parametrize("monitor", [None, "raises"])
def test_without_the_library_or_its_counters_there_is_no_meter(monitor, monkeypatch):
    def unreadable() -> None:
        raise RuntimeError("no IOReport channels")

    module = None if monitor is None else SimpleNamespace(AppleEnergyMonitor=unreadable)
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", module)
    assert _apple() is None


def test_with_the_library_there_is_one(monkeypatch):
    module = SimpleNamespace(AppleEnergyMonitor=lambda: Monitor(gpu_mj=3000))
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", module)
    found = _apple()
    assert found is not None and one_window(found) == 3.0


def zone(root: Path, number: str, name: str, energy: int) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    for file, text in (("name", name), ("energy_uj", str(energy)), ("max_energy_range_uj", "1000000")):
        (folder / file).write_text(f"{text}\n")
    return folder


def test_rapl_adds_packages_and_memory_and_knows_that_counters_wrap(tmp_path):
    first, second = zone(tmp_path, "0", "package-0", 100_000), zone(tmp_path, "1", "package-1", 900_000)
    zone(tmp_path, "0:0", "core", 5)
    memory = zone(tmp_path, "0:1", "dram", 0)
    meter = Meter(Rapl.open(tmp_path))
    mark = meter.begin()
    (first / "energy_uj").write_text("350000\n")
    (second / "energy_uj").write_text("50000\n")
    (memory / "energy_uj").write_text("100000\n")
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("999\n")
    assert meter.joules(mark) == pytest.approx(0.25 + 0.15 + 0.1, abs=1e-12)


def test_rapl_that_cannot_be_read_is_none(tmp_path):
    assert Rapl.open(tmp_path) is None
    (zone(tmp_path, "0", "package-0", 0) / "energy_uj").write_text("")
    assert Rapl.open(tmp_path) is None
    assert Rapl.open(tmp_path / "missing") is None


def test_a_machine_that_tells_nothing():
    meter = Meter(None)
    assert meter.joules(meter.begin()) is None
    assert meter.name == ""
