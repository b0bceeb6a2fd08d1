"""Flags that mean the same in every command that has them, and what they must hold."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from moelocal.errors import RequestError

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


PICTURES: Final = (".png", ".svg", ".pdf")
"""What a picture's name may end in."""


def require_plot(file: Path, endings: Sequence[str] = PICTURES) -> None:
    """Of --plot, before hours of computing: can it be drawn at the end? Raises `RequestError`."""
    if file.suffix not in endings:
        raise RequestError(f"--plot {file}: expected a name that ends in {', '.join(endings)}")
    if file.is_dir():
        raise RequestError(f"--plot {file}: is a folder; expected the name of a file")
    if not file.absolute().parent.is_dir():
        raise RequestError(f"--plot {file}: no folder {file.absolute().parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(f"--plot needs matplotlib: {sys.executable} -m pip install matplotlib")


def add(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add the flags of these names to a parser, or to a group of one, in this order."""
    for name in names:
        parser.add_argument(name, **_FLAGS[name])
