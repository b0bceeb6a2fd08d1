"""Where a line of a kernel's text comes from, and which lines a machine address stands for."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

Place = tuple[str, int]
"""File and line, as compilers name them."""

_LINE: Final = re.compile(r'[ \t]*#[ \t]*line[ \t]+(\d+)(?:[ \t]+"([^"]*)")?')


def places(text: str, name: str) -> list[Place]:
    """What a compiler calls each line of `text`, which begins as line 1 of the file `name`; `#line` directives, with
    which a header keeps the names of the files that it was put together from, are followed."""
    found, file, number = [], name, 1
    for line in text.split("\n"):
        found.append((file, number))
        directive = _LINE.match(line)
        if directive:
            number, file = int(directive[1]), directive[2] or file
        else:
            number += 1
    return found


@cache
def _symbolizer() -> str | None:
    names = ("addr2line", "llvm-addr2line", *(f"llvm-addr2line-{version}" for version in range(24, 15, -1)))
    return next(filter(None, map(shutil.which, names)), None)


def source_lines(library: Path, addresses: Sequence[int]) -> list[str]:
    """`file:line` for return addresses within `library`, each followed by ` <- ` and the place that it was inlined
    into, up to the kernel's own text; "?" for address 0 and where there is no addr2line."""
    tool = _symbolizer()
    found = []
    for address in addresses:
        if not tool or not address:
            found.append("?")
            continue
        # a return address may already belong to the next line, so ask for the instruction before it
        command = [tool, "-i", "-e", str(library), hex(address - 1)]
        answer = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        frames = [re.sub(r".*/", "", line.split(" (")[0]) for line in answer if line]
        # frames of the Metal library and of what surrounds the author's text are left out
        foreign = re.compile(r"msl_|kernel\.metal:|\?|.*\.(entry|signature):")
        found.append(" <- ".join(dict.fromkeys(f for f in frames if not foreign.match(f))) or "?")
    return found
