"""Why `ops/host.py` exists: one float32 product and one softmax, by MLX on the CPU and by NumPy. Prints a table."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table


def seconds(call: Callable[[], object], repeats: int = 15) -> float:
    """Median time of one call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    rows, inner, cols = 2048, 128, 512
    a, b = mx.random.normal((rows, inner)), mx.random.normal((inner, cols))
    mx.eval(a, b)
    na, nb = np.array(a), np.array(b)
    flops = 2 * rows * inner * cols
    mlx, numpy = seconds(lambda: mx.eval(a @ b)), seconds(lambda: na @ nb)
    table = Table("", "MLX, CPU", "NumPy", title=f"float32 [{rows}, {inner}] x [{inner}, {cols}]")
    table.add_row("milliseconds", f"{mlx * 1e3:.2f}", f"{numpy * 1e3:.2f}")
    table.add_row("GFLOP/s", f"{flops / mlx / 1e9:.1f}", f"{flops / numpy / 1e9:.1f}")
    Console().print(table)
    if args.json:
        print(json.dumps({"mlx_gflops": flops / mlx / 1e9, "numpy_gflops": flops / numpy / 1e9}))


if __name__ == "__main__":
    main()
