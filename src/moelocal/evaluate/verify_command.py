"""`moelocal verify`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, TypeGuard

from moelocal import flags
from moelocal.engine.load import load
from moelocal.errors import NumericsError, RequestError
from moelocal.evaluate.verify import CONVERSATION, Way, verify


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `verify`."""
    flags.add(parser, "model")
    parser.add_argument(
        "--conversation",
        type=Path,
        metavar="FILE",
        help='a chat saved with /save, a JSON list of messages, or {"messages": [...], "tools": [...]}',
    )
    flags.add(parser, "--dtype", "--context", "--kv-bits", "--offline")
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object, on the last line"
    )


def run(parsed: argparse.Namespace) -> None:
    """Replay a conversation warm, answered, forked, rewound, from disk, in a batch and with every form of the
    operations, and compare with cold runs. Exit code 1 if anything differs by more than it may."""
    replay = Replay(list(CONVERSATION)) if parsed.conversation is None else read(parsed.conversation)
    model = load(
        parsed.model,
        dtype=parsed.dtype,
        context=parsed.context,
        kv_bits=parsed.kv_bits,
        offline=parsed.offline,
        progress=sys.stderr.isatty(),
    )
    ways: list[Way] = []
    for way in verify(model, replay.messages, tools=replay.tools, thinking=replay.thinking):
        if not ways:
            print(f"{'':<30} {'tokens':>7} {'reused':>7} {'error':>9} {'allowed':>9}  answers")
        ways.append(way)
        print(_row(way), flush=True)
    if parsed.json:
        print(json.dumps({"ways": [dataclasses.asdict(way) | {"right": way.right} for way in ways]}))
    wrong = [way.name for way in ways if not way.right]
    if wrong:
        raise NumericsError(
            f"not what a cold run gives: {'; '.join(wrong)}; please report this with the table above"
        )


def _row(way: Way) -> str:
    error = "same bits" if not way.error else f"{way.error:.1e}"
    allowed = "same bits" if not way.allowed else f"{way.allowed:.1e}"
    verdict = "equal" if way.equal else "DIFFER"
    mark = "" if way.right else "  WRONG"
    return f"{way.name:<30} {way.tokens:>7} {way.reused:>7} {error:>9} {allowed:>9}  {verdict}{mark}"


@dataclasses.dataclass(frozen=True, slots=True)
class Replay:
    """A conversation and how it was held; `thinking`: None leaves it to the chat template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    thinking: bool | None = None


def read(path: Path) -> Replay:
    """The conversation in a file. Raises `RequestError` if it cannot be read or holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: expected JSON in UTF-8: {error}") from None
    found = content if isinstance(content, dict) else {"messages": content}
    system, tools, thinking = (found.get(name) for name in ("system", "tools", "thinking"))
    messages = found.get("messages")
    if not _objects(messages):
        raise RequestError(
            f"{path}: expected a chat saved with /save, a JSON list of messages, or an object "
            '{"messages": [...], "tools": [...], "thinking": false}, where all but the messages may be left out'
        )
    if tools is not None and not _objects(tools):
        raise RequestError(f"{path}: tools: expected a list of objects or null")
    if thinking is not None and not isinstance(thinking, bool):
        raise RequestError(f"{path}: thinking: expected true, false or null, got {thinking!r}")
    if system is not None and not isinstance(system, str):
        raise RequestError(f"{path}: system: expected a string or null, got {type(system).__name__}")
    return Replay(
        [*([{"role": "system", "content": system}] if system else []), *messages], tools or None, thinking
    )


def _objects(content: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(content, list) and all(isinstance(each, dict) for each in content)
