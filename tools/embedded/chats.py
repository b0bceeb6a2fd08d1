"""Writes the chats that calibration and evaluation read, one JSON object per line: `python tools/embedded/chats.py`.

The generators are those of the training data, on the training side of their split: no task of the held-out accuracy is
among them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from data import SKILLS, sample, talk

TARGET = Path(__file__).parents[2] / "src/moelocal/quantize/chats.jsonl"
MOST = 190_000
"""Bytes of the file."""


def main() -> None:
    rng = random.Random("chats for calibration and evaluation")
    lines, size, seen = [], 0, set()
    while True:
        # of a long chat templates keep the last reasoning alone: half of them are short
        skill = SKILLS[len(lines) // 2 % len(SKILLS)]
        made = talk(skill, rng) if len(lines) % 2 else sample(skill, rng)
        entry = {"messages": made.messages} | ({"tools": made.tools} if made.tools else {})
        line = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
        if line in seen:
            continue
        size += len(line.encode()) + 1
        if size > MOST:
            break
        seen.add(line)
        lines.append(line)
    TARGET.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} chats, {TARGET.stat().st_size} bytes in {TARGET}")


if __name__ == "__main__":
    main()
