"""Flags that mean the same in every command that has them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Final

_MODEL: Final = "a folder or a Hugging Face name; else the embedded one"
_FLAGS: Final[dict[str, dict[str, Any]]] = {
    "model": {"nargs": "?", "metavar": "MODEL", "help": _MODEL},
    "--model": {"metavar": "NAME", "help": _MODEL},
    "--revision": {"help": "branch, tag or commit of the Hugging Face repository"},
    "--offline": {"action": "store_true", "help": "use what is on this machine; download nothing"},
    "--quantization": {
        "default": "auto",
        "metavar": "RECIPE",
        "help": "quantize original weights once, by a recipe of `moelocal quantize`; none: run them as they are; else "
        "only if they do not fit",
    },
    "--dtype": {"choices": ("float32", "float16", "bfloat16"), "help": "of the computation"},
    "--context": {
        "type": int,
        "metavar": "TOKENS",
        "help": "the longest conversation; more than the model was trained with (up to 4 times) stretches it by YaRN",
    },
    "--kv-bits": {
        "type": int,
        "choices": (8, 4),
        "help": "keep keys and values in so many bits: less memory, slightly other answers",
    },
}


def integer(least: int) -> Callable[[str], int]:
    """The type of a flag: an integer from `least` on."""

    def number(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer from {least}, got {text!r}")
        return int(text)

    return number


def add(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add the flags of these names to a parser, or to a group of one, in this order."""
    for name in names:
        parser.add_argument(name, **_FLAGS[name])
