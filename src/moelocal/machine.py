"""What this machine is, found without MLX, and what must be in the environment before MLX starts."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from functools import cache
from pathlib import Path
from typing import Any, Final

LAST_LIMITED: Final = 4
"""The last Apple generation (M1 is 1) on which longer command buffers were seen to help."""

BUFFER_LIMITS: Final = {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "400"}
"""Kernels and millions of referenced elements after which MLX commits a command buffer; its own limits are 40 to 50.

A decode step of the flagship spans about 80 buffers at those, and each boundary costs time. All figures are others':
these two values, 5 to 8 % faster decoding on an M3 Ultra, prefill time and peak memory unchanged (ml-explore/mlx#4521);
1000 kernels, 11 to 13 % on an M1 Ultra and nothing on an M5 Max, in another program (lablup/mlxcel#353, #358, #360);
2000 and 2000, 6 % on an M1 Ultra (vllm-project/vllm-metal#578), later 58 to 91 tokens/s, but up to 35 GB more memory in
prompts of 8,192 tokens (#585, #637). More than 400 is not taken for that memory, and because MLX writes into a cache in
place only if no buffer that reads it is in flight, and up to 10 are (mlx/transforms.cpp): 400 leaves the flagship about
12 buffers a step (predicted from the elements that its kernels refer to). Not measured by this project.
"""


def sysctl(name: str) -> bytes:
    """The value of a macOS kernel variable; empty where there is none of that name."""
    return _sysctl(ctypes.CDLL(None), name) if sys.platform == "darwin" else b""


def _sysctl(library: Any, name: str) -> bytes:
    size = ctypes.c_size_t(0)
    if library.sysctlbyname(name.encode(), None, ctypes.byref(size), None, ctypes.c_size_t(0)):
        return b""
    value = ctypes.create_string_buffer(size.value)
    if library.sysctlbyname(name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0)):
        return b""
    return value.raw[: size.value]


@cache
def chip() -> str:
    """As its maker calls it, "Apple M4 Max"; empty if the system does not say."""
    if sys.platform == "darwin":
        return sysctl("machdep.cpu.brand_string").rstrip(b"\0").decode("ascii", "replace").strip()
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


@cache
def macos() -> str:
    """Its version, "15.3.1"; empty on other systems."""
    return sysctl("kern.osproductversion").rstrip(b"\0").decode("ascii", "replace")


def memory() -> int:
    """Bytes of memory; 0 if the system does not say."""
    if sys.platform == "darwin":
        return int.from_bytes(sysctl("hw.memsize"), sys.byteorder)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0


def generation(chip: str) -> int | None:
    """4 for "Apple M4 Max"; None for what is no Apple M chip."""
    found = re.match(r"Apple M(\d+)\b", chip)
    return int(found[1]) if found else None


def buffer_limits(chip: str) -> Mapping[str, str]:
    """The environment variables that make MLX's command buffers long enough on this chip, or none."""
    number = generation(chip)
    return BUFFER_LIMITS if number is not None and number <= LAST_LIMITED else {}


def most_resident() -> int:
    """The most bytes that this process had in memory since it started."""
    if (
        sys.platform == "linux"
    ):  # its ru_maxrss begins with what the parent had (getrusage(2): it survives execve)
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    import resource  # here: nothing else needs it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def limit_buffers(environment: MutableMapping[str, str], chip: str) -> None:
    """Put them into the environment, each unless it is set there. MLX reads them when it first uses the device."""
    for name, value in buffer_limits(chip).items():
        environment.setdefault(name, value)


def cache_folder() -> Path:
    """Where moelocal keeps what it can make again: `MOELOCAL_CACHE`, or a folder where the system has its caches."""
    if own := os.environ.get("MOELOCAL_CACHE"):
        return Path(own).expanduser()
    # the XDG rules: a relative path is to be ignored
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "moelocal"


if sys.platform == "darwin":  # here, so that importing this module first is all that `moelocal` has to do
    limit_buffers(os.environ, chip())
