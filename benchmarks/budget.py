"""What one decoded token costs, counted without weights and without a Mac, beside mlx-lm.

    python benchmarks/budget.py [--json] [--config FILE] [--context N] [--rounds N] [--results FOLDER]

A decode step of this library with its kernels on, and of mlx-lm (extra `compare`), is traced and never evaluated
(ledger/trace.py). Weights are plain 4-bit, activations bfloat16, sampling greedy. The tables hold:

- launches: kernels that MLX's Metal backend would start, hidden copies included (the rules: ledger/dispatches.py).
- MB: weights and caches that these kernels read and write, beside the least that the model needs. What passes between
  kernels is summed separately; it mostly stays in the chip's caches.
- longest chain: launches that must wait for one another.
- tokens/s by chip: bytes / bandwidth + launches x cost of a launch (constants and sources: ledger/chips.json).
  Predicted, not measured: nothing here ran on a Mac.
- host: microseconds to build the graph of a step, both in turns in this run (left out: see ledger/host.py).

With --results the counts and predictions are added to the results there, for the table of docs/benchmarks.md. With
--json the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moelocal.bench import results
from moelocal.bench.header import Header, command_line
from moelocal.bench.results import Row

HERE = Path(__file__).parent
FLAGSHIP = HERE / "configs" / "qwen3.6-35b-a3b.json"
OURS, THEIRS = "moelocal", "mlx-lm"
MICROSECONDS = 1e6


def counted(side: str, config: Path, context: int) -> dict[str, Any]:
    """The counts of a side. In an interpreter of its own: mlx-lm compiles functions as it is imported, and in a trace
    these have to be others."""
    command = [sys.executable, __file__, "--count", side, "--config", str(config), "--context", str(context)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"tracing a step of {side} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_counted(side: str, raw: dict[str, Any], context: int) -> dict[str, Any]:
    """The inside of `counted`."""
    import mlx.core as mx
    from ledger.count import count, minimum
    from ledger.steps import traced

    from moelocal.config import ModelConfig

    graph = traced(side, raw, context)
    found = count(graph, ModelConfig.parse(raw), context)
    return {
        "blocks": {name: asdict(block) for name, block in found.blocks.items()},
        "launches": found.launches,
        "nbytes": found.nbytes,
        "activations": sum(block.activations for block in found.blocks.values()),
        "longest_chain": found.longest_chain,
        "minimum": minimum(raw, context),
        "merged": graph.merged,
        "mlx_nbytes": mx.get_peak_memory(),
    }


def launch_seconds(chips: dict[str, Any], chip: str) -> float:
    """Cost of one launch on a chip, from the published rate of stock MLX there or on the chip that it is like."""
    facts = chips["chips"][chip]
    while "like" in facts:
        facts = chips["chips"][facts["like"]]
    fitted = chips["fitted_to"]
    rest = 1 / facts["stock"] - fitted["nbytes"] / (facts["effective"] * 1e9)
    return float(rest / fitted["launches"])


def predict(chips: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Tokens per second by chip."""
    return {
        chip: 1
        / (found["nbytes"] / (facts["effective"] * 1e9) + found["launches"] * launch_seconds(chips, chip))
        for chip, facts in chips["chips"].items()
    }


def rows_of(
    header: Header, chips: dict[str, Any], sides: dict[str, dict[str, Any]], config: str, context: int
) -> Iterator[Row]:
    """Counts and predictions of each side, what Apple states, and what others have published for stock MLX."""
    where = f"config={config} context={context}"
    names = {OURS: OURS, THEIRS: f"{THEIRS} {version(THEIRS)}" if THEIRS in sides else ""}
    for side, found in sides.items():
        for figure, unit in (("launches", "launches"), ("nbytes", "bytes"), ("longest_chain", "launches")):
            yield Row(header, None, "budget", names[side], where, figure, unit, found[figure])
        for chip, rate in predict(chips, found).items():
            setting, remark = f"{where} chip={chip.replace(' ', '-')}", "not measured by anybody"
            yield Row(
                header, None, "budget", names[side], setting, "predicted", "tokens/s", rate, remark=remark
            )
    for chip, facts in chips["chips"].items():
        setting = f"{where} chip={chip.replace(' ', '-')}"
        peak = facts["peak"] * 1e9
        yield Row(
            header, None, "budget", "chip", setting, "bandwidth", "bytes/s", peak, remark="stated by Apple"
        )
        if "stock" in facts:
            rate, source = facts["stock"], facts["source"]
            yield Row(
                header, None, "budget", "stock MLX", setting, "published", "tokens/s", rate, remark=source
            )


def show_counts(console: Console, name: str, context: int, sides: dict[str, dict[str, Any]]) -> None:
    ours, theirs = sides[OURS], sides.get(THEIRS)
    table = Table(
        title=f"One decoded token of {name}, 4-bit, {context} tokens of context",
        caption="MB of weights and caches; traced and counted, not run",
    )
    table.add_column("block")
    heads = ["launches", "MB", "least MB"]
    if theirs:
        heads = ["launches", f"mlx-lm {version('mlx-lm')}", "MB", "mlx-lm", "least MB"]
    for head in heads:
        table.add_column(head, justify="right")

    def moved(found: dict[str, Any], block: str) -> str:
        facts = found["blocks"][block]
        return f"{(facts['weights'] + facts['caches']) / 1e6:,.1f}"

    for block, least in ours["minimum"].items():
        row = [f"{ours['blocks'][block]['launches']:,}", moved(ours, block), f"{least / 1e6:,.1f}"]
        if theirs:
            row[1:1] = [f"{theirs['blocks'][block]['launches']:,}"]
            row[3:3] = [moved(theirs, block)]
        table.add_row(block, *row)
    table.add_section()
    least = sum(ours["minimum"].values())
    row = [f"{ours['launches']:,}", f"{ours['nbytes'] / 1e6:,.1f}", f"{least / 1e6:,.1f}"]
    other = [f"{ours['activations'] / 1e6:,.1f}"]
    if theirs:
        row[1:1] = [f"{theirs['launches']:,}"]
        row[3:3] = [f"{theirs['nbytes'] / 1e6:,.1f}"]
        other.append(f"{theirs['activations'] / 1e6:,.1f}")
    table.add_row("all", *row, style="bold")
    chain = [f"{found['longest_chain']:,}" for found in sides.values()]
    table.add_row("longest chain", *chain)
    table.add_row("between kernels", *([""] * (2 if theirs else 1)), *other)
    console.print(table)


def show_kernels(console: Console, found: dict[str, Any]) -> None:
    table = Table("block", "what it launches", title="Our launches")
    for block, facts in found["blocks"].items():
        kernels = Counter(facts["kernels"]).most_common()
        table.add_row(block, ", ".join(f"{number} {kernel}" for kernel, number in kernels))
    console.print(table)


def show_chips(
    console: Console, chips: dict[str, Any], sides: dict[str, dict[str, Any]], published: bool
) -> None:
    low, high = chips["demonstrated"]
    table = Table(
        title="Tokens per second: PREDICTED, not measured",
        caption="published: stock MLX, by others, for Qwen3.6-35B-A3B; the model is fitted to it. "
        f"{low:.0%}-{high:.0%}: of peak bandwidth, the most that public kernels have reached. "
        "~: launch cost of a sister chip. Sources: ledger/chips.json",
    )
    table.add_column("chip")
    for head in ("GB/s", "us a launch", "moelocal", "mlx-lm", "published", f"{low:.0%}-{high:.0%}"):
        table.add_column(head, justify="right")
    predicted = {side: predict(chips, found) for side, found in sides.items()}
    for chip, facts in chips["chips"].items():
        theirs = f"{predicted[THEIRS][chip]:.0f}" if THEIRS in predicted else "-"
        limits = [share * facts["peak"] * 1e9 / sides[OURS]["nbytes"] for share in (low, high)]
        table.add_row(
            chip,
            str(facts["peak"]),
            f"{'~' if 'like' in facts else ''}{launch_seconds(chips, chip) * MICROSECONDS:.1f}",
            f"{predicted[OURS][chip]:.0f}",
            theirs,
            f"{facts['stock']}" if published and "stock" in facts else "-",
            f"{limits[0]:.0f}-{limits[1]:.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object at the end")
    parser.add_argument(
        "--config", type=Path, default=FLAGSHIP, help="a config.json; default: the flagship's"
    )
    parser.add_argument("--context", type=int, default=0, help="tokens before this one; default: 0")
    parser.add_argument("--rounds", type=int, default=30, help="of the host timing, 0 for none; default: 30")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="add the figures to the results there")
    parser.add_argument("--count", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if not parsed.config.is_file():
        parser.error(f"--config: no file {parsed.config}")
    raw = json.loads(parsed.config.read_text())
    # the step after the first has the shapes of a later one; every 256 positions one enlarges the caches: not that one
    context = max(parsed.context, 1) + (parsed.context > 0 and parsed.context % 256 == 0)
    if parsed.count:
        print(json.dumps(run_counted(parsed.count, raw, context)))
        return

    console = Console()
    sides = {OURS: counted(OURS, parsed.config, context)}
    if importlib.util.find_spec("mlx_lm"):
        sides[THEIRS] = counted(THEIRS, parsed.config, context)
    else:
        console.print("mlx-lm is not installed (extra `compare`): its columns are left out.")
    chips = json.loads((HERE / "ledger" / "chips.json").read_text())
    show_counts(console, parsed.config.stem, parsed.context, sides)
    show_kernels(console, sides[OURS])
    show_chips(console, chips, sides, parsed.config == FLAGSHIP and parsed.context < 1024)
    ratio = None
    if THEIRS in sides and parsed.rounds:
        from ledger.host import seconds

        mine, other = (each * MICROSECONDS for each in seconds(raw, context, parsed.rounds))
        ratio = other / mine
        console.print(
            f"Host, building the graph of one step (encoding its launches not included), median of {parsed.rounds} "
            f"in turns: {mine:,.0f} us, mlx-lm {other:,.0f} us, ratio {ratio:.2f}."
        )
    if parsed.results:
        rows = rows_of(Header.now(command_line()), chips, sides, parsed.config.stem, parsed.context)
        console.print(f"results    {results.append(parsed.results, rows)}")
    if parsed.json:
        ours, theirs = sides[OURS], sides.get(THEIRS)
        figures = {
            "dispatches_per_token": ours["launches"],
            "bytes_per_token": ours["nbytes"],
            "longest_chain": ours["longest_chain"],
            "host_ratio": ratio and round(ratio, 2),
            "mlx_lm_dispatches_per_token": theirs and theirs["launches"],
            "mlx_lm_bytes_per_token": theirs and theirs["nbytes"],
            "mlx_lm_longest_chain": theirs and theirs["longest_chain"],
            "minimum_bytes_per_token": sum(ours["minimum"].values()),
            "predicted": {chip: round(rate, 1) for chip, rate in predict(chips, ours).items()},
        }
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
