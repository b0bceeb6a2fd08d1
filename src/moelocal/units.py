"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from moelocal.errors import RequestError

GIB: Final = 1 << 30
_SHOWN: Final = ((10**9, "GB", 2), (10**6, "MB", 1), (10**3, "kB", 1))
_READ: Final = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
                "KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB, "TiB": 1 << 40}  # fmt: skip


def size(nbytes: int) -> str:
    """Bytes in decimal units, as disks are sold: "20.93 GB", "413.2 MB", "20.5 kB", "64 bytes"."""
    for unit, name, digits in _SHOWN:
        if nbytes >= unit:
            return f"{nbytes / unit:.{digits}f} {name}"
    return f"{nbytes} bytes"


def size_above(nbytes: int) -> str:
    """`size`, rounded up: what can be asked for where `nbytes` are needed."""
    step = next((unit // 10**digits for unit, _, digits in _SHOWN if nbytes >= unit), 1)
    return size(-(-nbytes // step) * step)


def memory_size(nbytes: int) -> str:
    """Memory as it is sold, and as `parse_memory` reads it: "24 GB" are 24 x 2^30 bytes."""
    return f"{nbytes / GIB:.0f} GB"


def parse_size(text: str, where: str = "size") -> int:
    """Bytes of "20.9GB" (1e9), "19.5 GiB" (2^30), "800MB" or "123456" (bytes). Raises `RequestError` that names
    `where`."""
    return _parsed(text, where, _READ, "20.9GB (1e9 bytes) or 19.5GiB (2^30)")


def parse_memory(text: str, where: str = "memory") -> int:
    """As `parse_size`, but GB means GiB: a Mac "with 24 GB" has 24 x 2^30 bytes. Raises `RequestError`."""
    return _parsed(text, where, {**_READ, "GB": GIB}, "24GB, as a Mac's memory is named")


def _parsed(text: str, where: str, units: Mapping[str, int], example: str) -> int:
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    factor = units.get(match[2] or "B") if match else None
    if match is None or factor is None or (number := round(float(match[1]) * factor)) < 1:
        raise RequestError(f"{where}: expected a size like {example}, got {text!r}")
    return number
