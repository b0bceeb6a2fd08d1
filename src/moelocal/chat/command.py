"""The chat as a command: its flags, the model they name, exit codes. `moelocal generate` shares them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import moelocal
from moelocal import flags
from moelocal.chat.conversation import Conversation
from moelocal.chat.keyboard import Lines, Terminal, decode
from moelocal.chat.program import Chat
from moelocal.chat.screen import Screen
from moelocal.cost import record
from moelocal.engine.load import Model
from moelocal.engine.sampling import Sampling
from moelocal.errors import MoelocalError

FLAGSHIP = "mlx-community/Qwen3.6-35B-A3B-4bit"

# The fields of `Sampling` that are numbers.
SAMPLING_FLAGS = {
    "temperature": (float, "0 always takes the likeliest token"),
    "top_p": (float, "draw from the likeliest tokens that sum to this probability"),
    "top_k": (int, "draw from this many tokens; 0: from all"),
    "min_p": (float, "leave out tokens below this fraction of the likeliest"),
    "presence_penalty": (float, "subtracted from tokens that the answer already holds"),
    "frequency_penalty": (float, "the same, for every time that it holds them"),
    "repetition_penalty": (float, "divides the logits of tokens in prompt and answer; 1: off"),
}

Run = Callable[[argparse.Namespace], None]


def main() -> int:
    """`python -m moelocal.chat`."""
    parser = argparse.ArgumentParser(prog="python -m moelocal.chat", description=chat.__doc__)
    add_chat_flags(parser)
    return exit_code(chat, parser.parse_args())


def exit_code(run: Run, parsed: argparse.Namespace) -> int:
    """0 when the command ran, 1 after an error of ours (one line says which), 130 after Ctrl-C."""
    try:
        run(parsed)
        sys.stdout.flush()
    except MoelocalError as error:
        print(f"moelocal: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the answer has enough. The interpreter flushes once more at its end: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def chat(parsed: argparse.Namespace) -> None:
    """Talk to a model. /help in the chat lists its commands; in a pipe each line is a message."""
    dialogue = parsed.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    screen = Screen(sys.stdout, sys.stderr, dialogue=dialogue)
    model, options = load(parsed)
    conversation = Conversation(system=parsed.system, thinking=thinking(parsed))
    program = Chat(
        model, screen, options, raw=parsed.raw, dialogue=dialogue, conversation=conversation, log=parsed.log
    )
    if parsed.prompt is not None:
        program.answer(parsed.prompt)
    elif dialogue:
        screen.note("/help lists the commands, Ctrl-D leaves.")
        program.run(Terminal())
    else:
        program.run(Lines(sys.stdin.buffer, prompt=_prompt_on_stderr if sys.stdin.isatty() else None))


def load(parsed: argparse.Namespace) -> tuple[Model, dict[str, Any]]:
    """The model and the options of its answers. Impossible sampling values, and a log that cannot be written, are
    refused before it loads."""
    given = {name: getattr(parsed, name) for name in SAMPLING_FLAGS if getattr(parsed, name) is not None}
    Sampling(**given)
    if parsed.log is not None:
        record.require_writable(parsed.log)
    if parsed.model is None:
        print(
            "This is the small demonstration model inside the package. For a large one:\n"
            f"  python -m moelocal.chat --model {FLAGSHIP}",
            file=sys.stderr,
        )
    model = moelocal.load(
        parsed.model,
        revision=parsed.revision,
        quantization=parsed.quantization,
        dtype=parsed.dtype,
        context=parsed.context,
        kv_bits=parsed.kv_bits,
        snapshots=parsed.snapshots,
        offline=parsed.offline,
        progress=sys.stderr.isatty(),
    )
    return model, {
        "sampling": replace(model.defaults, **given),
        "seed": parsed.seed,
        "max_tokens": parsed.max_tokens,
        "stop": tuple(parsed.stop),
    }


def thinking(parsed: argparse.Namespace) -> bool | None:
    """What the flags say about thinking; None leaves it to the chat template."""
    return False if parsed.no_thinking else None


def text(argument: str) -> str:
    """An argument as text. What is not UTF-8 arrives as halves of surrogate pairs."""
    try:
        return decode(os.fsencode(argument), "argument")
    except MoelocalError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `chat`."""
    parser.add_argument("--prompt", type=text, metavar="TEXT", help="answer this one message and leave")
    add_model_flags(parser)
    add_answer_flags(parser)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which checkpoint to load, and how."""
    flags.add(
        parser, "--model", "--revision", "--offline", "--quantization", "--dtype", "--context", "--kv-bits"
    )
    parser.add_argument(
        "--snapshots",
        default="0",
        metavar="SIZE",
        help="keep states of conversations on disk, up to this size (20GB), so that they go on at once after a restart",
    )


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that shape an answer."""
    group = parser.add_argument_group("answer (without a flag: as the checkpoint recommends)")
    group.add_argument("--system", type=text, metavar="TEXT", help="the system message")
    group.add_argument("--no-thinking", action="store_true", help="answer without thinking first")
    group.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without a chat template"
    )
    group.add_argument("--max-tokens", type=int, metavar="N", help="end the answer after so many tokens")
    group.add_argument(
        "--stop",
        type=text,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT; may be repeated",
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    group.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="add prompts and answers to FILE, for moelocal cost; else none is kept",
    )
    for name, (kind, description) in SAMPLING_FLAGS.items():
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="X", help=description)


def _prompt_on_stderr() -> None:
    """A person types and the answers go to a file: they still see when it is their turn."""
    print("> ", end="", file=sys.stderr, flush=True)
