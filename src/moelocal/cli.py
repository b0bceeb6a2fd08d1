"""The command line `moelocal`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import moelocal
from moelocal.bench import command as bench
from moelocal.chat import command
from moelocal.chat.keyboard import decode
from moelocal.cost import command as cost
from moelocal.cost import record
from moelocal.doctor.command import add_flags, doctor
from moelocal.engine.completion import Completion
from moelocal.errors import RequestError
from moelocal.evaluate import command as evaluation
from moelocal.evaluate import verify_command
from moelocal.pelican import command as pelican
from moelocal.quantize import command as quantization
from moelocal.quantize import inspect


def main(arguments: Sequence[str] | None = None, program: str = "moelocal") -> int:
    """Runs one command: 0, 1 after an error of ours, 130 after Ctrl-C. Wrong usage raises SystemExit(2)."""
    parser = argparse.ArgumentParser(
        prog=program, description="Mixture-of-experts models on your own machine."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, summary: str, run: command.Run) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=run.__doc__)
        added.set_defaults(run=run)
        return added

    command.add_chat_flags(add("chat", "talk to a model", command.chat))

    one_shot = add("generate", "answer one prompt", _generate)
    one_shot.add_argument(
        "prompt", type=command.text, metavar="PROMPT", help="the message; - reads it from a pipe"
    )
    one_shot.add_argument("--json", action="store_true", help="print the whole completion as one JSON object")
    command.add_model_flags(one_shot)
    command.add_answer_flags(one_shot)

    inspect.add_flags(add("inspect", "what a checkpoint is, or would become", inspect.inspect))
    quantization.add_flags(add("quantize", "make a checkpoint smaller", quantization.run))
    evaluation.add_flags(add("evaluate", "how far a model is from its original", evaluation.run))
    add_flags(add("doctor", "which kernels this machine uses, and why", doctor))
    verify_command.add_flags(
        add("verify", "prove that warm answers are those of a cold run", verify_command.run)
    )
    bench.add_flags(add("bench", "how fast a model is here, alone and beside other programs", bench.run))
    pelican.add_flags(add("pelican", "models draw a pelican on a bicycle, side by side", pelican.run))
    cost.add_flags(add("cost", "what a log of API calls cost, and would cost here", cost.run))
    add("version", "print the version", _version)

    parsed = parser.parse_args(arguments)
    return command.exit_code(parsed.run, parsed)


def _generate(parsed: argparse.Namespace) -> None:
    """Answer one prompt. Standard output carries the answer alone."""
    prompt: Any = parsed.prompt
    if prompt == "-":
        prompt = decode(sys.stdin.buffer.read(), "standard input")
    if parsed.system and not parsed.raw:
        prompt = [{"role": "system", "content": parsed.system}, {"role": "user", "content": prompt}]
    model, options = command.load(parsed)
    options |= {"thinking": command.thinking(parsed), "raw": parsed.raw}
    done: Completion | None = None
    if parsed.json:
        done = moelocal.generate(model, prompt, **options)
        print(json.dumps(dataclasses.asdict(done), ensure_ascii=False))
    else:
        for event in moelocal.stream(model, prompt, **options):
            print(event.text, end="", flush=True)
            done = event.completion or done
        print()
    if parsed.log is not None and done is not None:
        try:
            record.append(parsed.log, model.name, prompt, done)
        except RequestError as error:  # the answer is there
            print(f"moelocal: warning: {error}; this answer is not in it", file=sys.stderr)


def _version(parsed: argparse.Namespace) -> None:
    """Print the version."""
    print(moelocal.__version__)
