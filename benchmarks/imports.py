"""Seconds that an import takes in a fresh interpreter, less the start of the interpreter itself.

    python benchmarks/imports.py [--json] [MODULE ...]

Prints a table; with --json the last line is one JSON object of module name to median seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

ROUNDS = 7


def import_seconds(modules: Sequence[str], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of `import module` by module. They take turns, so that a busy moment hits them all."""
    seconds: dict[str, list[float]] = {module: [] for module in modules}
    for _ in range(rounds):
        for module in modules:
            code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            seconds[module].append(float(done.stdout.splitlines()[-1]))
    return {module: statistics.median(each) for module, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", default=["moelocal", "mlx.core"], metavar="MODULE")
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_args()
    for module in parsed.modules:
        if find_spec(module.partition(".")[0]) is None:
            parser.error(f"no module {module} here")
    found = import_seconds(parsed.modules)
    for module, seconds in found.items():
        print(f"{module:<20} {seconds:.3f} s")
    if parsed.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
