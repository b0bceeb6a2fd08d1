"""What stands at the head of every figure."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import pytest

import moelocal
from moelocal.bench import bandwidth, header
from moelocal.bench.bandwidth import REPETITIONS, WARM_UP, measure
from moelocal.bench.header import (
    Header,
    Identity,
    command_line,
    commit,
    machine_name,
    power_of_linux,
    power_of_mac,
    slug,
)
from moelocal.hub import EMBEDDED

PMSET = """System-wide power settings:
Currently in use:
 standby              1
 powermode            {mode}
 displaysleep         10
"""
BATTERY = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t93%; discharging; present: true\n"


@pytest.mark.parametrize(
    ("chip", "name"),
    [
        ("Apple M4 Max", "apple-m4-max"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-xeon-cpu-2-20ghz"),
        ("AMD EPYC", "amd-epyc"),
        ("../../etc", "etc"),
        ("", "unknown"),
    ],
)
def test_a_chip_is_the_name_of_a_file(chip, name):
    assert slug(chip) == name


@pytest.mark.parametrize(
    ("settings", "battery", "words"),
    [
        (PMSET.format(mode=0), BATTERY, "automatic, Battery Power"),
        (PMSET.format(mode=1), "Now drawing from 'AC Power'\n", "low power, AC Power"),
        (PMSET.format(mode=2), "Now drawing from 'AC Power'\n", "high power, AC Power"),
        (PMSET.format(mode=7), "", "mode 7, unknown source"),
        (" lowpowermode         1\n", BATTERY, "low power, Battery Power"),
        ("", "", "unknown mode, unknown source"),
    ],
)
def test_power_mode_of_a_mac(settings, battery, words):
    assert power_of_mac(settings, battery) == words


def test_power_mode_of_linux(tmp_path):
    assert power_of_linux(tmp_path) == "unknown"
    governor = tmp_path / "devices/system/cpu/cpu0/cpufreq/scaling_governor"
    governor.parent.mkdir(parents=True)
    governor.write_text("powersave\n")
    for name, kind, online in (("ADP1", "Mains", "1"), ("BAT0", "Battery", "0")):
        supply = tmp_path / "class/power_supply" / name
        supply.mkdir(parents=True)
        (supply / "type").write_text(f"{kind}\n")
        (supply / "online").write_text(f"{online}\n")
    assert power_of_linux(tmp_path) == "governor powersave, AC power"
    (tmp_path / "class/power_supply/ADP1/online").write_text("0\n")
    assert power_of_linux(tmp_path) == "governor powersave, battery"


def test_the_command_hides_where_the_home_folder_is(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/Users/ada"))
    told = ["/opt/venv/bin/moelocal", "bench", "--model", "/Users/ada/my models/m", "--json"]
    assert command_line(told) == "moelocal bench --model ~'/my models/m' --json"
    assert (
        command_line(["/src/benchmarks/speed.py", "--rounds", "3"]) == "python benchmarks/speed.py --rounds 3"
    )
    assert command_line(["/src/moelocal/__main__.py", "bench", "--json"]) == "python -m moelocal bench --json"
    assert command_line(["x", "/Users/adams"]) == "x /Users/adams"


def repository(folder: Path) -> Path:
    """A repository with a package of ours in it."""
    package = folder / "src" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("1\n")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "first")):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)
    return package


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_the_commit_is_that_of_our_repository_alone(tmp_path):
    package = repository(tmp_path)
    found = subprocess.run(
        ["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert commit(package) == found.stdout[:12]
    (tmp_path / "notes.txt").write_text("not of the package")
    assert commit(package) == found.stdout[:12]
    (package / "__init__.py").write_text("2\n")
    assert commit(package) == f"{found.stdout[:12]}+changes"
    # an environment inside somebody's repository: its packages are not in it
    installed = tmp_path / ".venv" / "package"
    shutil.copytree(package, installed)
    assert commit(installed) == ""


def test_without_a_repository_the_version_says_which_program(monkeypatch):
    monkeypatch.setattr(header, "_output", lambda *command: None)
    monkeypatch.setattr(header.bandwidth, "measured", lambda: 123.4e9)
    assert Header.now("x").moelocal == moelocal.__version__


def test_a_header_says_all_that_a_figure_depends_on(monkeypatch):
    monkeypatch.setattr(header.bandwidth, "measured", lambda: 123.4e9)
    monkeypatch.setattr(header.machine, "chip", lambda: "Apple M4 Max")
    monkeypatch.setattr(header.machine, "memory", lambda: 64 << 30)
    monkeypatch.setattr(header.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(header, "power", lambda: "high power, AC Power")
    found = Header.now("moelocal bench")
    assert (found.bandwidth, found.command) == (123.4e9, "moelocal bench")
    lines = found.as_lines()
    assert lines[0].startswith("machine    Apple M4 Max, 16 cores, 64 GB, ")
    assert lines[1] == "power      high power, AC Power"
    assert lines[2] == "bandwidth  123.4 GB/s copied (measured)"
    assert lines[5] == "command    moelocal bench"
    assert found.as_dict()["memory"] == 64 << 30


def test_machines_with_the_same_chip_have_files_of_their_own(monkeypatch):
    monkeypatch.setattr(header.bandwidth, "measured", lambda: 123.4e9)
    monkeypatch.setattr(header.machine, "chip", lambda: "Apple M4 Max")
    names = []
    for cores, gigabytes in ((16, 64), (16, 128), (14, 36), (None, 0)):
        monkeypatch.setattr(header.os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(header.machine, "memory", lambda gigabytes=gigabytes: gigabytes << 30)
        names.append(machine_name())
        assert Header.now("x").machine == names[-1]
    assert names == [
        "apple-m4-max-16-cores-64-gb",
        "apple-m4-max-16-cores-128-gb",
        "apple-m4-max-14-cores-36-gb",
        "apple-m4-max-0-cores-unknown-memory",
    ]


def test_the_hash_changes_with_the_weights_and_not_with_the_place(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "copy")
    first, second = (Identity.of(folder, "m") for folder in (EMBEDDED, tmp_path / "copy"))
    assert first == second
    assert first.quantization == "16.00 bits per weight, most in bfloat16"
    assert len(first.hash) == 12
    weights = tmp_path / "copy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    third = Identity.of(tmp_path / "copy", "m")
    assert third.hash != first.hash
    assert third.nbytes == first.nbytes
    assert third.quantization == first.quantization
    (tmp_path / "copy" / "synthetic.json").write_text("{}")
    random = Identity.of(tmp_path / "copy", "m").quantization
    assert random == f"{first.quantization}, random weights"


def test_the_bandwidth_is_of_the_median_copy_behind_a_warm_up():
    times = iter(
        [0.0] * WARM_UP  # which are not timed
        + [t for i in range(REPETITIONS) for t in (100.0 * i, 100.0 * i + 0.1 + i)]
    )
    # the middle one of 0.1, 1.1, … takes (REPETITIONS - 1) / 2 + 0.1 seconds
    expected = 2 * (1 << 20) / ((REPETITIONS - 1) / 2 + 0.1)
    assert measure(1 << 20, clock=lambda: next(times)) == pytest.approx(expected, rel=1e-12)
    assert next(times, None) is None


def test_on_the_cpu_all_cores_copy_at_once_and_together_all_of_it(monkeypatch):
    together, copied = threading.Barrier(3, timeout=10), []

    def copy(target, source):
        together.wait()  # ends only if three threads are in here
        copied.append((target.size, source.size, int(source[0])))

    monkeypatch.setattr(bandwidth, "on_cpu", lambda: True)
    monkeypatch.setattr(bandwidth, "cores", lambda: 3)
    monkeypatch.setattr(bandwidth.np, "copyto", copy)
    bandwidth._on_cpu(100)()
    assert sorted(copied, reverse=True) == [(34, 34, 0), (33, 33, 67), (33, 33, 34)]
