"""How kernels cut their work on this GPU generation: template constants, chosen once per process."""

from __future__ import annotations

from typing import Final

from moelocal import machine

_ONE_ROW_FROM: Final = 5
"""The first Apple generation (M1 is 1) that one row suits. Others measured, in kernels of their own with these shapes:
one row of a packed matrix per simdgroup is faster on an M5 Max, and makes decoding 10 % slower on an M4 Pro (mlx.fast
challenge, submission 126). Not measured by this project."""

GENERATION: Final = machine.generation(machine.chip()) or 0

ROWS: Final = 1 if GENERATION >= _ONE_ROW_FROM else 2
"""Rows of a packed matrix that a simdgroup owns."""
