"""Why reading a prompt takes longer with more experts: one layer in the host form, and how much of it is unpacking.

    python benchmarks/unpacking.py [--json] [--tokens 512] [--hidden 512] [--width 128]

The expert block of one layer, 4 bits, 8 experts per token, random choices, on this machine's CPU through NumPy
(`moelocal.ops.experts.host`). Unpacking is timed inside it. Multiply-adds are the same in every row. NumPy computes on
one thread: two wait for each other where another program holds a core. The best of
--rounds; with --json the last line is one object: by number of experts seconds, seconds of unpacking, MLX's peak bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from unittest.mock import patch

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from moelocal.formats import QuantizedArray, QuantSpec, Weight
from moelocal.ops import experts
from moelocal.ops.host import Host, borrow_weight, one_thread

EXPERTS = (16, 32, 64, 128, 256, 512)
PER_TOKEN = 8


def packed(*shape: int) -> QuantizedArray:
    """Random codes of 4 bits in groups of 64."""
    *lead, cols = shape
    words = mx.random.randint(0, 1 << 31, (*lead, cols // 8)).astype(mx.uint32)
    scales = mx.full((*lead, cols // 64), 0.01)
    found = QuantizedArray(words, scales, scales * -7.5, QuantSpec(4, 64))
    mx.eval(found.arrays)
    return found


def measure(count: int, tokens: int, hidden: int, width: int, rounds: int) -> dict[str, float]:
    """The best of some rounds."""
    layer = experts.SwiGLU((packed(count, 2 * width, hidden),), packed(count, hidden, width))
    x = mx.random.normal((1, tokens, hidden))
    chosen = mx.argsort(mx.random.normal((1, tokens, count)), axis=-1)[..., :PER_TOKEN].astype(mx.uint32)
    weights = mx.full((1, tokens, PER_TOKEN), 1 / PER_TOKEN)
    mx.eval(x, chosen, weights)
    spent = 0.0

    def timed(weight: Weight) -> Host:
        nonlocal spent
        begin = time.perf_counter()
        found = borrow_weight(weight)
        spent += time.perf_counter() - begin
        return found

    best: dict[str, float] = {}
    with patch.object(experts, "borrow_weight", timed), one_thread():
        for _ in range(rounds):
            mx.clear_cache()
            mx.reset_peak_memory()
            spent, held, begin = 0.0, mx.get_active_memory(), time.perf_counter()
            mx.eval(experts.host(x, layer, chosen, weights, None, None, None))
            seconds = time.perf_counter() - begin
            if not best or seconds < best["seconds"]:
                best = {"seconds": seconds, "unpacking": spent, "nbytes": mx.get_peak_memory() - held}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = {n: measure(n, args.tokens, args.hidden, args.width, args.rounds) for n in EXPERTS}
    table = Table("experts", "ms", "of it unpacking", "MLX's MB")
    for count, best in found.items():
        share = best["unpacking"] / best["seconds"]
        table.add_row(
            str(count), f"{1e3 * best['seconds']:.1f}", f"{share:.0%}", f"{best['nbytes'] / 1e6:.0f}"
        )
    Console().print(table)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
