"""The command line `moelocal`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import moelocal
from moelocal import hub
from moelocal.chat import command
from moelocal.chat.keyboard import decode
from moelocal.chat.program import size
from moelocal.config import AttentionSpec, ModelConfig, MoESpec
from moelocal.doctor.command import add_flags, doctor
from moelocal.evaluate import verify_command
from moelocal.survey import Part, survey


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

    command.add_source_flags(add("inspect", "describe a checkpoint", _inspect))
    add_flags(add("doctor", "which kernels this machine uses, and why", doctor))
    verify_command.add_flags(
        add("verify", "prove that warm answers are those of a cold run", verify_command.run)
    )
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
    if parsed.json:
        done = moelocal.generate(model, prompt, **options)
        print(json.dumps(dataclasses.asdict(done), ensure_ascii=False))
        return
    for event in moelocal.stream(model, prompt, **options):
        print(event.text, end="", flush=True)
    print()


def _inspect(parsed: argparse.Namespace) -> None:
    """Describe a checkpoint without loading its weights."""
    folder = hub.resolve(
        parsed.model, revision=parsed.revision, offline=parsed.offline, progress=sys.stderr.isatty()
    )
    found = survey(folder)
    print(f"folder       {folder}")
    print(_described(found.config))
    print(f"text         {size(found.nbytes)} in {found.files} {'file' if found.files == 1 else 'files'}")
    for part in found.text:
        print(_row(part))
    print(f"left out     {'nothing' if not found.left_out else 'what the text model does not read'}")
    for part in found.left_out:
        print(_row(part))
    print("formats")
    for name, matrices in found.formats:
        print(f"  {name:<26} {matrices:>6} matrices")


def _described(config: ModelConfig) -> str:
    layers = len(config.layers)
    attention = sum(isinstance(layer.mixer, AttentionSpec) for layer in config.layers)
    first = config.layers[0].mlp
    if isinstance(first, MoESpec):
        mlp = f"{first.experts} experts of width {first.width}, {first.per_token} per token"
        if first.shared_width:
            mlp += f", and a shared one of width {first.shared_width}"
    else:
        mlp = f"dense, width {first.width}"
    return (
        f"architecture {config.architecture}\n"
        f"layers       {layers}: {layers - attention} delta net, {attention} attention\n"
        f"feed-forward {mlp}\n"
        f"size         hidden {config.hidden}, vocabulary {config.vocab}, context {config.context}"
    )


def _row(part: Part) -> str:
    return f"  {part.name:<26} {part.tensors:>6} tensors {size(part.nbytes):>10}"


def _version(parsed: argparse.Namespace) -> None:
    """Print the version."""
    print(moelocal.__version__)
