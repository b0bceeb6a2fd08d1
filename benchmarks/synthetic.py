"""A random quantized checkpoint of any supported shape, to measure speed, memory and growth without a download.

    python benchmarks/synthetic.py flagship OUT --layers 4          # 4 of the 40 layers of Qwen3.6-35B-A3B, 4 bits
    python benchmarks/synthetic.py small OUT --experts 256 --bits 8 --tokenizer
    python benchmarks/synthetic.py path/to/config.json OUT --recipe balanced --seed 7

SHAPE is a config.json of a supported family, its folder, or a name: `flagship`, or `small`, the same architecture a few
hundred times smaller. Flags change what the config says; with --layers the pattern of attention and delta-net layers
goes on from the first one. --recipe takes those of `moelocal quantize`, or "none"; --bits and --group give every matrix
one format, both gates 8 bits as mlx-lm does. The result loads in moelocal, mlx-lm, and what else reads MLX checkpoints.

Packed weights are random codes, uniform over what the bits can hold, under scales that vary by a factor of three; what
is kept unquantized is normal. Variances are chosen so that activations stay of the order of one at any depth, and the
router is sharp enough that tokens choose different experts. Speed and memory are those of a trained model of this shape
and these formats; what such a model says is noise, and how evenly it uses its experts is ours, not a trained router's.

Written block by block: memory does not grow with the model. The disk is checked before the first byte, and OUT appears
when everything is in it. Equal arguments give equal bytes (with one version of NumPy); a folder that holds
them already is left as it is. With --json the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from random_weights import sources_of
from rich.console import Console
from rich.table import Table

from moelocal import hub
from moelocal.chat.command import exit_code
from moelocal.checkpoint.scope import Checkpoint
from moelocal.checkpoint.writing import Output, disk_errors, write_json
from moelocal.config import ModelConfig, read_json
from moelocal.errors import RequestError
from moelocal.formats import QuantSpec
from moelocal.quantize.convert import Report
from moelocal.quantize.pieces import spec_of, tensors_of
from moelocal.quantize.progress import progress_bar
from moelocal.quantize.recipe import CLASSES, Recipe, Rule
from moelocal.quantize.result import config_of, copy
from moelocal.quantize.sizes import shapes_of
from moelocal.text.tokenizer import Tokenizer
from moelocal.units import size

FLAGSHIP: Final = Path(__file__).parent / "configs" / "qwen3.6-35b-a3b.json"

SHAPES: Final[dict[str, dict[str, int]]] = {
    "flagship": {},
    "small": {
        "layers": 8, "hidden": 512, "vocab": 8192, "heads": 4, "kv_heads": 1, "head_dim": 128, "key_heads": 4,
        "value_heads": 8, "key_dim": 64, "value_dim": 64, "experts": 64, "per_token": 8, "width": 128,
        "shared_width": 128,
    },
}  # fmt: skip
"""Built-in shapes: what they change in the flagship's config."""

KEYS: Final = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "vocab": ("vocab_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "key_heads": ("linear_num_key_heads",),
    "value_heads": ("linear_num_value_heads",),
    "key_dim": ("linear_key_head_dim",),
    "value_dim": ("linear_value_head_dim",),
    "experts": ("num_experts", "num_local_experts"),
    "per_token": ("num_experts_per_tok",),
    "width": ("moe_intermediate_size", "intermediate_size"),
    "shared_width": ("shared_expert_intermediate_size",),
    "context": ("max_position_embeddings",),
}
"""Flag -> the keys of config.json that it may have; the first one that is there is changed."""

DTYPES: Final = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
MANIFEST: Final = "synthetic.json"
FORMAT: Final = 1
"""Of the values: another number for every change that changes bytes."""


@dataclass(frozen=True, slots=True)
class Written:
    """The result: its folder, parameters, bytes of the weights; `before`: it was there already."""

    folder: Path
    parameters: int
    nbytes: int
    before: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 after an error of ours, 130 after Ctrl-C."""
    return exit_code(run, parser().parse_args(arguments))


def run(parsed: argparse.Namespace) -> None:
    """Write, and say what. Raises what a user can cause as one of our errors."""
    begin = time.perf_counter()
    raw = shape(parsed.shape, {flag: getattr(parsed, flag) for flag in KEYS}, parsed.tokenizer)
    recipe = recipe_of(parsed.recipe, parsed.bits, parsed.group)
    with progress_bar() as report:
        done = write(
            raw, parsed.to, recipe,
            dtype=parsed.dtype, seed=parsed.seed, tokenizer=parsed.tokenizer, report=report,
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    table = Table(show_header=False)
    table.add_row("folder", str(done.folder) + (" (was there already)" if done.before else ""))
    table.add_row("parameters", f"{done.parameters:,}")
    table.add_row("weights", size(done.nbytes))
    table.add_row("bits per weight", f"{8 * done.nbytes / done.parameters:.2f}")
    table.add_row("seconds", f"{seconds:.1f}")
    Console().print(table)
    if parsed.json:
        facts = {"folder": str(done.folder), "parameters": done.parameters, "nbytes": done.nbytes}
        print(json.dumps(facts | {"seconds": round(seconds, 3), "before": done.before}))


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("shape", metavar="SHAPE", help="flagship, small, or a config.json")
    made.add_argument("to", metavar="OUT", type=Path, help="the folder to write; must not exist, or be empty")
    for flag, keys in KEYS.items():
        name = "--" + flag.replace("_", "-")
        made.add_argument(name, type=int, metavar="N", help=f"{keys[0]} of config.json")
    made.add_argument("--recipe", metavar="NAME", help="recipe of moelocal, its file, or none; default 4bit")
    made.add_argument("--bits", type=int, metavar="N", help="every matrix alike, instead of a recipe")
    made.add_argument("--group", type=int, default=64, metavar="N", help="with --bits; default 64")
    made.add_argument("--dtype", choices=tuple(DTYPES), help="of scales and what is not quantized")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="from 0, the default")
    made.add_argument("--tokenizer", action="store_true", help="add that of the embedded model, for texts")
    made.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return made


# what is written


def shape(
    name: str | Path, changes: Mapping[str, int | None] | None = None, tokenizer: bool = False
) -> dict[str, Any]:
    """config.json of a built-in shape or of a file, with `changes` by flag (`KEYS`; None changes nothing).

    `tokenizer`: the vocabulary must hold that of the embedded model; unless `changes` has one, it becomes that.
    Raises `ConfigError`, `UnsupportedModel`; `RequestError` for what this family has no key for.
    """
    wanted = {flag: value for flag, value in (changes or {}).items() if value is not None}
    if str(name) in SHAPES:
        wanted, file = SHAPES[str(name)] | wanted, FLAGSHIP
    else:
        file = Path(name).expanduser()
        file = file / "config.json" if file.is_dir() else file
        if not file.exists():
            raise RequestError(f"{name}: no such file; expected a config.json, or one of {', '.join(SHAPES)}")
    raw = read_json(file)
    ModelConfig.parse(raw)
    text = raw.get("text_config", raw)
    if tokenizer:
        embedded = hub.resolve(None)
        least = max(Tokenizer.open(embedded).tokens) + 1
        if (changes or {}).get("vocab") is None:
            wanted["vocab"] = ModelConfig.read(embedded).vocab
        elif wanted["vocab"] < least:
            raise RequestError(
                f"--vocab: the embedded tokenizer needs at least {least}, got {wanted['vocab']}"
            )
        text["eos_token_id"] = raw["eos_token_id"] = sorted(ModelConfig.read(embedded).eos)
    for flag, value in wanted.items():
        if value < 1:
            raise RequestError(f"--{flag.replace('_', '-')}: expected an integer from 1, got {value}")
        key = next((key for key in KEYS[flag] if text.get(key) is not None), None)
        if key is None:
            raise RequestError(
                f"--{flag.replace('_', '-')}: {file} has no {' or '.join(KEYS[flag])} that it could change"
            )
        text[key] = value
    if "layers" in wanted and isinstance(kinds := text.get("layer_types"), list):
        period = text.get("full_attention_interval") or len(kinds)
        text["layer_types"] = [kinds[layer % period] for layer in range(wanted["layers"])]
    for place in (raw, text):  # of the source; the result gets its own
        place.pop("quantization", None)
        place.pop("quantization_config", None)
    ModelConfig.parse(raw)
    return raw


def recipe_of(name: str | None, bits: int | None = None, group: int = 64) -> Recipe:
    """The recipe of a name or file, "none", or plain `bits` for all. Raises `ConfigError`, `RequestError`."""
    if bits is None:
        return Recipe("none", "", dict.fromkeys(CLASSES, Rule(None)), "keep") if name == "none" else (
            Recipe.open(name or "4bit")
        )  # fmt: skip
    if name is not None:
        raise RequestError("--bits: is instead of a recipe; leave one of the two out")
    rules = dict.fromkeys(CLASSES, Rule(QuantSpec(bits, group)))
    rules |= dict.fromkeys(("router", "shared_gate"), Rule(QuantSpec(8, group)))
    return Recipe(f"{bits}bit-g{group}", "", rules, "keep")


def write(
    raw: Mapping[str, Any],
    to: str | Path,
    recipe: Recipe,
    *,
    dtype: str | None = None,
    seed: int = 0,
    tokenizer: bool = False,
    report: Report = lambda what, done, total: None,
) -> Written:
    """Write the checkpoint of a config.json to the folder `to`.

    `dtype` of scales and unquantized tensors: None for what the config says, or bfloat16. `tokenizer`: with the text
    files of the embedded model. `report` is told how many bytes of how many are written.

    Raises `RequestError` for a folder that holds something else, `ConfigError`, `CheckpointError` (no space).
    """
    if seed < 0:
        raise RequestError(f"--seed: expected an integer from 0, got {seed}")
    config = ModelConfig.parse(raw)
    text = raw.get("text_config", raw)
    stored = DTYPES.get(dtype or text.get("dtype") or text.get("torch_dtype") or "", mx.bfloat16)
    folder = Path(to).expanduser().absolute()
    sources = sources_of(config, seed)
    parts = [source.part for source in sources]
    plan = recipe.plan(config, shapes_of(config))
    empty = Checkpoint.of(folder, config, {})
    tensors = {part.path: tensors_of(part, spec_of(part, plan), empty, stored) for part in parts}
    work = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    output = Output(work, work, [tensor for each in tensors.values() for tensor in each])
    parameters = sum(math.prod(part.shape) for part in parts)
    written = config_of(raw, parts, plan, config)
    manifest = {
        "about": "random weights of benchmarks/synthetic.py: a shape to measure, not a model",
        "format": FORMAT, "seed": seed, "recipe": recipe.name, "layout": output.digest,
        "config": hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest(),
        "tokenizer": tokenizer, "bytes": output.nbytes,
    }  # fmt: skip
    if _there(folder, manifest):
        return Written(folder, parameters, output.nbytes, before=True)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(folder)
        if output.nbytes > (free := shutil.disk_usage(folder.parent).free):
            raise RequestError(
                f"{folder}: {size(output.nbytes)} are needed, but only {size(free)} are free on this disk; "
                "choose another folder, or fewer --layers"
            )
        work.mkdir()
    try:
        with closing(output):
            output.prepare()
            done = 0
            for source in sources:
                spec = spec_of(source.part, plan)
                for first, last in source.blocks():
                    arrays = source.stored(spec, stored, first, last)
                    for tensor, array in zip(tensors[source.part.path], arrays, strict=True):
                        output.write(tensor.name, first, array)
                        done += array.nbytes
                    report("writing random weights", done, output.nbytes)
                mx.clear_cache()
            output.publish()
        if tokenizer:
            for file in _texts():
                copy(file, work / file.name)
        write_json(work / MANIFEST, manifest)
        write_json(work / "config.json", written)
        with disk_errors(folder):
            work.rename(folder)  # over an empty folder too, never over one with files
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Written(folder, parameters, output.nbytes)


def _there(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the folder holds this very result. Raises `RequestError` if it holds anything else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise RequestError(f"{folder}: is a file; the result needs a folder")
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return False
    if MANIFEST in names and read_json(folder / MANIFEST) == manifest:
        return True
    what = "another synthetic checkpoint" if MANIFEST in names else f"other files, {names[0]} among them"
    raise RequestError(f"{folder}: holds {what}; choose a new folder, or delete this one")


def _remove_left_over(folder: Path) -> None:
    """Work folders of processes that were killed."""
    for path in folder.parent.glob(f".{folder.name}.*.part"):
        number = re.fullmatch(rf"\.{re.escape(folder.name)}\.(\d+)\.part", path.name)
        if number:
            try:
                os.kill(int(number[1]), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except PermissionError:
                pass


def _texts() -> Iterator[Path]:
    """The embedded model's files but for config and weights."""
    for file in sorted(hub.resolve(None).iterdir()):
        if file.is_file() and file.name != "config.json" and file.suffix != ".safetensors":
            yield file


if __name__ == "__main__":
    sys.exit(main())
