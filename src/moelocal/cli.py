"""The command line. Each command imports what it needs, so that help comes before MLX is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from moelocal.errors import MoelocalError

if TYPE_CHECKING:
    from moelocal.engine.sampling import Sampling
    from moelocal.model import Model

FLAGSHIP = "mlx-community/Qwen3.6-35B-A3B-4bit"

# Fields of Sampling by name; the classes stay unimported until a command runs.
SAMPLING_FLAGS = {
    "temperature": (float, "0 always takes the likeliest token"),
    "top_p": (float, "draw from the likeliest tokens that sum to this probability"),
    "top_k": (int, "draw from this many tokens; 0: from all"),
    "min_p": (float, "leave out tokens below this fraction of the likeliest"),
    "presence_penalty": (float, "subtracted from tokens that the answer already holds"),
    "frequency_penalty": (float, "the same, for every time that it holds them"),
    "repetition_penalty": (float, "divides the logits of tokens in prompt and answer; 1: off"),
}


def main(arguments: Sequence[str] | None = None, program: str = "moelocal") -> int:
    """Runs one command: 0, 1 after an error of ours, 130 after Ctrl-C. Wrong usage raises SystemExit(2)."""
    parsed = _parser(program).parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
        return code
    except MoelocalError as error:
        print(f"moelocal: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the answer has enough. The interpreter flushes once more at its end: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description="Mixture-of-experts models on your own machine."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    chat = commands.add_parser("chat", help="talk to a model", description=_chat.__doc__)
    chat.set_defaults(run=_chat)
    _add_model_flags(chat)
    chat.add_argument("--prompt", type=_text, metavar="TEXT", help="answer this one message and leave")
    _add_answer_flags(chat)

    generate = commands.add_parser("generate", help="answer one prompt", description=_generate.__doc__)
    generate.set_defaults(run=_generate)
    generate.add_argument(
        "prompt", type=_text, metavar="PROMPT", help="the message; - reads it from standard input"
    )
    generate.add_argument("--json", action="store_true", help="print the whole completion as one JSON object")
    _add_model_flags(generate)
    _add_answer_flags(generate)

    inspect = commands.add_parser("inspect", help="describe a checkpoint", description=_inspect.__doc__)
    inspect.set_defaults(run=_inspect)
    _add_source_flags(inspect)

    shown = commands.add_parser("version", help="print the version", description=_version.__doc__)
    shown.set_defaults(run=_version)
    return parser


def _add_source_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="a folder or a Hugging Face name; default: the embedded one"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the Hugging Face repository")
    parser.add_argument(
        "--offline", action="store_true", help="use what is on this machine; download nothing"
    )


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    _add_source_flags(group)  # type: ignore[arg-type]
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the computation")


def _add_answer_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answer (without a flag: as the checkpoint recommends)")
    group.add_argument("--system", type=_text, metavar="TEXT", help="the system message")
    group.add_argument("--no-thinking", action="store_true", help="answer without thinking first")
    group.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without a chat template"
    )
    group.add_argument("--max-tokens", type=int, metavar="N", help="end the answer after so many tokens")
    group.add_argument(
        "--stop",
        type=_text,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT; may be repeated",
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    for name, (kind, text) in SAMPLING_FLAGS.items():
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="X", help=text)


def _text(argument: str) -> str:
    """An argument as text. What is not UTF-8 arrives as halves of surrogate pairs."""
    from moelocal.chat.keyboard import decode

    try:
        return decode(os.fsencode(argument), "argument")
    except MoelocalError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _chat(parsed: argparse.Namespace) -> int:
    """Talk to a model. /help in the chat lists its commands."""
    from moelocal.chat.conversation import Conversation
    from moelocal.chat.keyboard import Lines, Terminal
    from moelocal.chat.program import Chat
    from moelocal.chat.screen import Screen

    dialogue = parsed.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    screen = Screen(sys.stdout, sys.stderr, dialogue=dialogue)
    model, options = _load(parsed)
    conversation = Conversation(system=parsed.system, thinking=_thinking(parsed))
    chat = Chat(model, screen, options, raw=parsed.raw, dialogue=dialogue, conversation=conversation)
    if parsed.prompt is not None:
        chat.answer(parsed.prompt)
    elif dialogue:
        screen.note("/help lists the commands, Ctrl-D leaves.")
        chat.run(Terminal())
    else:
        chat.run(Lines(sys.stdin.buffer, prompt=_prompt_on_stderr if sys.stdin.isatty() else None))
    return 0


def _generate(parsed: argparse.Namespace) -> int:
    """Answer one prompt. Standard output carries the answer alone."""
    import moelocal

    prompt: Any = parsed.prompt
    if prompt == "-":
        from moelocal.chat.keyboard import decode

        prompt = decode(sys.stdin.buffer.read(), "standard input")
    if parsed.system and not parsed.raw:
        prompt = [{"role": "system", "content": parsed.system}, {"role": "user", "content": prompt}]
    model, options = _load(parsed)
    options |= {"thinking": _thinking(parsed), "raw": parsed.raw}
    if parsed.json:
        done = moelocal.generate(model, prompt, **options)
        print(json.dumps(dataclasses.asdict(done), ensure_ascii=False))
        return 0
    for event in moelocal.stream(model, prompt, **options):
        print(event.text, end="", flush=True)
    print()
    return 0


def _inspect(parsed: argparse.Namespace) -> int:
    """Describe a checkpoint without loading its weights."""
    raise NotImplementedError


def _version(parsed: argparse.Namespace) -> int:
    """Print the version."""
    print(version("moelocal"))
    return 0


def _load(parsed: argparse.Namespace) -> tuple[Model, dict[str, Any]]:
    """The model and the options of its answers. Impossible sampling values are refused before it loads."""
    from moelocal.engine.sampling import Sampling

    given = {name: getattr(parsed, name) for name in SAMPLING_FLAGS if getattr(parsed, name) is not None}
    Sampling(**given)
    import moelocal

    if parsed.model is None:
        print(
            "This is the small demonstration model inside the package. For a large one: "
            f"python -m moelocal.chat --model {FLAGSHIP}",
            file=sys.stderr,
        )
    model = moelocal.load(
        parsed.model,
        revision=parsed.revision,
        dtype=parsed.dtype,
        offline=parsed.offline,
        progress=sys.stderr.isatty(),
    )
    sampling: Sampling | None = Sampling.from_defaults({**model.defaults, **given}) if given else None
    return model, {
        "sampling": sampling,
        "seed": parsed.seed,
        "max_tokens": parsed.max_tokens,
        "stop": tuple(parsed.stop),
    }


def _thinking(parsed: argparse.Namespace) -> bool | None:
    return False if parsed.no_thinking else None


def _prompt_on_stderr() -> None:
    """A person types and the answers go to a file: they still see when it is their turn."""
    print("> ", end="", file=sys.stderr, flush=True)
