"""Held-out accuracy of the embedded model: `python tools/embedded/evaluate.py [--samples N] [--model FOLDER] [--json]`.

Greedy answers through the library itself, on instances that training never saw, judged by exact match of the answer
(or of the tool call, parsed) after the thinking part. With --json the last line on stdout is one object: `overall`,
`skills` (name to accuracy), `samples` (per skill).
"""

from __future__ import annotations

import argparse
import json
import random
import sys

from data import SKILLS, Sample, sample
from rich.console import Console
from rich.progress import track
from rich.table import Table

import moelocal

SEED = 7


def right(model: moelocal.Model, task: Sample) -> bool:
    """Whether the model's answer to all but the last message equals the last message."""
    expected = task.messages[-1]
    done = moelocal.generate(
        model,
        task.messages[:-1],
        tools=task.tools,
        thinking=task.thinking,
        max_tokens=600,
        sampling=moelocal.Sampling(temperature=0),
    )
    calls = [call["function"] for call in expected.get("tool_calls", [])]
    made = [{"name": call.name, "arguments": call.arguments} for call in done.tool_calls]
    return made == calls and done.text.strip() == expected["content"].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100, help="per skill")
    parser.add_argument("--model", default=None, help="a folder; default: the model in the package")
    parser.add_argument("--skill", choices=SKILLS, action="append", help="only this one; may be repeated")
    parser.add_argument("--show", action="store_true", help="print each wrong answer")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    errors = Console(stderr=True)
    model = moelocal.load(args.model)
    skills = {}
    for skill in args.skill or SKILLS:
        rng = random.Random(f"{SEED}/{skill}")
        tasks = [sample(skill, rng, 1.0, "held-out") for _ in range(args.samples)]
        verdicts = []
        for task in track(tasks, skill.ljust(12), console=errors, disable=not sys.stderr.isatty()):
            verdicts.append(right(model, task))
            if args.show and not verdicts[-1]:
                print(
                    skill, repr(task.messages[-2]["content"]), "expected", task.messages[-1], file=sys.stderr
                )
        skills[skill] = sum(verdicts) / len(verdicts)
    overall = sum(skills.values()) / len(skills)
    table = Table("skill", "held-out accuracy", "samples", title="exact match, greedy")
    for skill, accuracy in skills.items():
        table.add_row(skill, f"{accuracy:.1%}", str(args.samples))
    table.add_row("overall", f"{overall:.1%}", str(args.samples * len(skills)), style="bold")
    Console().print(table)
    if args.json:
        print(json.dumps({"overall": overall, "skills": skills, "samples": args.samples}))


if __name__ == "__main__":
    main()
