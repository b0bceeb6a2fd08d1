"""Plot the training log: `python tools/embedded/plot.py` -> docs/images/embedded-training.png."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOG = Path(__file__).parent / "log.jsonl"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "embedded-training.png"


def main() -> None:
    # a run that resumed from a saved state did some steps twice: the second time counts
    records: list[dict] = []
    for line in LOG.read_text().splitlines():
        record = json.loads(line)
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    millions = [r["tokens"] / 1e6 for r in records]
    width = 15
    for name, label in (("loss", "next token"), ("mtp", "MTP layer, the token after")):
        values = [r[name] for r in records]
        smooth = [
            sum(values[max(0, i - width) : i + 1]) / len(values[max(0, i - width) : i + 1])
            for i in range(len(values))
        ]
        left.plot(millions, smooth, label=label)
    left.set(xlabel="million tokens", ylabel="loss on the answers (mean of 150 steps)", yscale="log")
    left.legend()
    checks = [r for r in records if "accuracy" in r]
    for skill in checks[-1]["accuracy"] if checks else []:
        right.plot(
            [r["tokens"] / 1e6 for r in checks],
            [r["accuracy"][skill] for r in checks],
            label=skill,
            marker=".",
        )
    right.set(
        xlabel="million tokens", ylabel="held-out, whole answer as written (24 samples)", ylim=(0, 1.02)
    )
    right.legend(fontsize=8)
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE)


if __name__ == "__main__":
    main()
