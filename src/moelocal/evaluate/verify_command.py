"""`moelocal verify`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from moelocal.engine.load import load
from moelocal.errors import NumericsError, RequestError
from moelocal.evaluate.verify import CONVERSATION, Way, verify


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `verify`."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder or a Hugging Face name; else the embedded one"
    )
    parser.add_argument(
        "--conversation",
        type=Path,
        metavar="FILE",
        help="a chat saved with /save, or a JSON list of messages",
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the computation")
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="the longest conversation, if need be stretched by YaRN"
    )
    parser.add_argument(
        "--kv-bits", type=int, choices=(8, 4), help="keep keys and values in so many bits, on both sides"
    )
    parser.add_argument(
        "--offline", action="store_true", help="use what is on this machine; download nothing"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object, on the last line"
    )


def run(parsed: argparse.Namespace) -> None:
    """Replay a conversation warm, forked, rewound, from disk, in a batch and with every form of the operations, and
    compare with cold runs. Exit code 1 if anything differs by more than it may."""
    messages = CONVERSATION if parsed.conversation is None else read(parsed.conversation)
    model = load(
        parsed.model,
        dtype=parsed.dtype,
        context=parsed.context,
        kv_bits=parsed.kv_bits,
        offline=parsed.offline,
        progress=sys.stderr.isatty(),
    )
    ways: list[Way] = []
    for way in verify(model, messages):
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


def read(path: Path) -> list[dict[str, Any]]:
    """The messages in a file. Raises `RequestError` if it cannot be read or holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: expected JSON in UTF-8: {error}") from None
    if isinstance(content, dict):
        system = content.get("system")
        head = [{"role": "system", "content": system}] if isinstance(system, str) else []
        content = content.get("messages")
        content = [*head, *content] if isinstance(content, list) else content
    if not isinstance(content, list) or not all(isinstance(message, dict) for message in content):
        raise RequestError(f"{path}: expected a chat saved with /save, or a JSON list of messages")
    return content
