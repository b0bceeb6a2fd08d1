"""What all cores gain: a product of one row with a packed matrix on one thread, and in parts (`moelocal.ops.cores`).

    python benchmarks/cores.py [--json] [--rounds 20]

4 bits in groups of 64, on this machine's CPU through MLX, sixteen products one after the other as in a model. The
best of --rounds; with --json the last line is one object: by number of weights microseconds of both.
"""

from __future__ import annotations

import argparse
import json
import time

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from moelocal.flags import integer
from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.ops import cores
from moelocal.ops.linear import portable

SIZES = [1 << power for power in range(8, 13)]
CHAIN = 16


def measure(size: int, rounds: int) -> tuple[float, float]:
    """Seconds of a product with [size, size] on one thread, and in at least two parts."""
    packed = mx.quantize(mx.random.normal((size, size)) / size**0.5, group_size=64, bits=4)
    weight, x = QuantizedArray(*packed, QuantSpec(4, 64)), mx.random.normal((1, size))
    mx.eval(packed, x)

    def chain(x: mx.array) -> mx.array:
        for _ in range(CHAIN):
            x = portable(x, weight)
        return x

    best, least = [], cores.LEAST
    for limit in (1 << 60, size * size // cores.cores()):
        cores.LEAST = limit
        function = mx.compile(chain)
        mx.eval(function(x))
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            mx.eval(function(x))
            seconds.append(time.perf_counter() - begin)
        best.append(min(seconds) / CHAIN)
    cores.LEAST = least
    one, parts = best
    return one, parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=integer(1), default=20)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    found = {size * size: measure(size, args.rounds) for size in SIZES}
    table = Table("weights", "one thread, us", f"{cores.cores()} cores, us", "ratio")
    for weights, (one, parts) in found.items():
        table.add_row(f"{weights:,}", f"{1e6 * one:,.0f}", f"{1e6 * parts:,.0f}", f"{one / parts:.2f}")
    Console().print(table)
    if args.json:
        print(
            json.dumps({str(weights): [round(1e6 * s, 1) for s in each] for weights, each in found.items()})
        )


if __name__ == "__main__":
    main()
