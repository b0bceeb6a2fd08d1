"""What this machine is, and the environment that MLX finds."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from moelocal import machine


class FakeLibrary:
    """The C library of a Mac, as far as kernel variables go."""

    def __init__(self, **variables: bytes) -> None:
        self.variables = variables

    def sysctlbyname(self, name, value, size, new, new_size) -> int:
        found = self.variables.get(name.decode().replace(".", "_"))
        if found is None:
            return -1
        if value is not None:
            ctypes.memmove(value, found, len(found))
        ctypes.cast(size, ctypes.POINTER(ctypes.c_size_t))[0] = len(found)
        return 0


def test_kernel_variables_are_read_whole():
    library = FakeLibrary(
        machdep_cpu_brand_string=b"Apple M4 Max\0", hw_memsize=(1 << 36).to_bytes(8, "little")
    )
    assert machine._sysctl(library, "machdep.cpu.brand_string") == b"Apple M4 Max\0"
    assert int.from_bytes(machine._sysctl(library, "hw.memsize"), "little") == 1 << 36
    assert machine._sysctl(library, "hw.nothing") == b""


@pytest.mark.parametrize(
    ("chip", "number"),
    [
        ("Apple M1", 1),
        ("Apple M4 Max", 4),
        ("Apple M12 Ultra", 12),
        ("Apple M1 (Virtual)", 1),
        ("Apple A18 Pro", None),
        ("AMD EPYC", None),
        ("", None),
    ],
)
def test_generation(chip: str, number: int | None):
    assert machine.generation(chip) == number


@pytest.mark.parametrize("chip", ["Apple M1 Ultra", "Apple M4"])
def test_generations_that_gain_get_longer_command_buffers(chip: str):
    environment: dict[str, str] = {}
    machine.limit_buffers(environment, chip)
    assert environment == {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "400"}


@pytest.mark.parametrize("chip", ["Apple M5 Max", "Apple M6", "AMD EPYC", ""])
def test_others_keep_the_limits_of_mlx(chip: str):
    environment: dict[str, str] = {}
    machine.limit_buffers(environment, chip)
    assert environment == {}


def test_a_users_own_limit_stays():
    environment = {"MLX_MAX_OPS_PER_BUFFER": "7"}
    machine.limit_buffers(environment, "Apple M2")
    assert environment == {"MLX_MAX_OPS_PER_BUFFER": "7", "MLX_MAX_MB_PER_BUFFER": "400"}


def test_the_limits_are_set_before_mlx_is_imported():
    program = (
        "import sys, moelocal.ops; n = list(sys.modules); print(n.index('moelocal.machine'), n.index('mlx'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    ours, mlx = map(int, done.stdout.split())
    assert ours < mlx


def test_the_limits_are_set_when_the_module_is_imported_on_a_mac():
    # macOS as far as the module asks; the control is the same program on another chip
    program = """
import sys, ctypes, os
sys.platform, brand = "darwin", b"Apple {chip}\\0"
class Library:
    def sysctlbyname(self, name, value, size, new, new_size):
        size._obj.value = len(brand)
        if value is not None: ctypes.memmove(value, brand, len(brand))
        return 0
ctypes.CDLL = lambda name: Library()
import importlib.util
spec = importlib.util.spec_from_file_location("machine", {file!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
print(os.environ.get("MLX_MAX_OPS_PER_BUFFER"))
"""
    for chip, expected in (("M3 Ultra", "1000"), ("M5 Max", "None")):
        text = program.replace("{chip}", chip).replace("{file!r}", repr(machine.__file__))
        done = subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, check=True, env={"PATH": "/usr/bin"}
        )
        assert done.stdout.strip() == expected


@pytest.mark.skipif(sys.platform != "darwin", reason="asks macOS")
def test_this_mac_is_known():
    assert machine.chip().startswith("Apple")
    assert machine.macos().count(".") >= 1
    assert machine.memory() > 1 << 32


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("MOELOCAL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert machine.cache_folder() == Path("/x/moelocal")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored
    monkeypatch.setattr(machine.sys, "platform", "linux")
    assert machine.cache_folder() == Path.home() / ".cache/moelocal"
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert machine.cache_folder() == Path.home() / "Library/Caches/moelocal"
    monkeypatch.setenv("MOELOCAL_CACHE", "~/own")
    assert machine.cache_folder() == Path.home() / "own"
