"""`moelocal quantize`: its flags, and what it prints."""

from __future__ import annotations

import argparse
import hashlib
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from moelocal import flags, hub
from moelocal.checkpoint.scope import Checkpoint
from moelocal.errors import RequestError
from moelocal.formats import QuantizedArray
from moelocal.quantize.calibrate import Calibration
from moelocal.quantize.convert import convert
from moelocal.quantize.corpus import Corpus, checked
from moelocal.quantize.pieces import Plan
from moelocal.quantize.progress import progress_bar
from moelocal.quantize.recipe import BUILT_IN, Recipe
from moelocal.quantize.result import Converted
from moelocal.units import parse_size, size

TOKENS: Final = 65_536
LENGTH: Final = 2_048
"""Of the calibration text, and of one sequence in it."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `quantize`."""
    parser.add_argument(
        "source", metavar="SOURCE", help="the original model: a folder or a Hugging Face name"
    )
    parser.add_argument("--to", metavar="FOLDER", help="where the result goes; default: ./NAME-RECIPE")
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        default="balanced",
        help=f"which tensor gets which format: {', '.join(BUILT_IN)}, or a recipe file; default: balanced",
    )
    parser.add_argument(
        "--method",
        choices=("search", "minmax"),
        default="search",
        help="search: the least error found (default); minmax: plain rounding, many times as fast",
    )
    parser.add_argument("--target-size", metavar="SIZE", help="fit the recipe to so many bytes, like 20.9GB")
    parser.add_argument(
        "--calibration",
        nargs="?",
        const="",
        metavar="FILE",
        help="measure what the weights do to a text, and quantize for that: built-in texts, or a .txt or .jsonl file; "
        "needs more memory and time",
    )
    parser.add_argument(
        "--delete-source-shards",
        action="store_true",
        help="delete each shard of the source as soon as its text tensors are safely written, also those of a local "
        "folder; what else is in it (vision, MTP) is lost",
    )
    parser.add_argument("--dequantize", action="store_true", help="accept a source that is quantized already")
    flags.add(parser, "--revision", "--offline")


class Texts:
    """Calibration on the built-in texts or a file, rendered when the source's tokenizer is there. Raises `RequestError`
    if the file cannot be used."""

    def __init__(self, file: str) -> None:
        self._file = Path(file) if file else None
        text = checked(self._file) if self._file else platform.python_version().encode()
        settings = f"{TOKENS} {LENGTH} {bool(file)} ".encode()
        self.digest = hashlib.sha256(settings + text).hexdigest()

    def begin(self, source: Checkpoint, output: Checkpoint, work: Path) -> None:
        corpus = (
            Corpus.from_file(self._file, source.folder, TOKENS, LENGTH)
            if self._file
            else Corpus.built_in(source.folder, "calibration", TOKENS, LENGTH)
        )
        self._calibration = Calibration(corpus)
        self._calibration.begin(source, output, work)

    def layer(self, index: int, source: Checkpoint, plan: Plan) -> Mapping[str, QuantizedArray]:
        return self._calibration.layer(index, source, plan)

    def resume(self, index: int, output: Checkpoint) -> None:
        self._calibration.resume(index, output)

    def head(self, source: Checkpoint, plan: Plan) -> Mapping[str, QuantizedArray]:
        return self._calibration.head(source, plan)


def run(parsed: argparse.Namespace) -> None:
    """Quantize a model into a folder, shard by shard. The same command continues what was interrupted."""
    if parsed.calibration is not None and parsed.method == "minmax":
        raise RequestError(
            "--method minmax does not go with --calibration, which searches; leave one of them out"
        )
    recipe = Recipe.open(parsed.recipe)
    target = None if parsed.target_size is None else parse_size(parsed.target_size, "--target-size")
    place = hub.locate(parsed.source)
    name = place.resolve().name if isinstance(place, Path) else place
    to = parsed.to or f"{name.rpartition('/')[2]}-{recipe.name}"
    try:
        with progress_bar() as report:
            done = convert(
                parsed.source,
                to,
                recipe,
                method=parsed.method,
                target=target,
                delete_source=parsed.delete_source_shards,
                revision=parsed.revision,
                offline=parsed.offline,
                dequantize=parsed.dequantize,
                calibrator=None if parsed.calibration is None else Texts(parsed.calibration),
                report=report,
                progress=sys.stderr.isatty(),
            )
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what is in {to}", file=sys.stderr)
        raise
    print(_summary(done))


def _summary(done: Converted) -> str:
    left_out = ", ".join(f"{count} {kind} tensors" for kind, count in done.left_out.items())
    lines = [
        f"{done.folder}: {'was there already' if done.before else 'done'}",
        f"size         {size(done.nbytes)}, from {size(done.source_nbytes)}",
        f"left out     {left_out or 'nothing'}",
    ]
    return "\n".join(lines)
