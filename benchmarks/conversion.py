"""What a conversion takes: memory, disk, time; and whether it survives being killed.

    python benchmarks/conversion.py [--json] [--layers N] [--method minmax|search] [--recipe NAME] [--kills N]

A flagship-shaped source (256 experts, hidden size 2048, bfloat16, heavy-tailed random weights) is served by a hub on
loopback that makes the bytes when they are asked for, so that 72 GB need not lie on a disk. It has --layers of the 40
layers, the whole embedding and head, and shards of about 2.8 GB as the release has. A process of its own downloads and
quantizes it with --delete-source-shards.

- memory: the most that this process had resident, interpreter and libraries included.
- disk: the most that lay on the disk beside the output files, seen five times a second: shards, and what is noted.
- time: of that process; the server takes its share of the same cores. For 40 layers it is extrapolated by bytes.
- kills: conversions of a small checkpoint from the same kind of hub, each ended with kill -9 at a random moment and run
  again; a resume counts if every byte of its result is that of a conversion which nobody disturbed.

--method search is what `moelocal quantize` does unless told otherwise; on a CPU it takes some 50 times as long.
With --json the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from moelocal.config import ModelConfig
from moelocal.machine import most_resident
from moelocal.quantize.sizes import shapes_of

ROOT: Final = Path(__file__).parents[1]
CONFIG: Final = ROOT / "benchmarks" / "configs" / "qwen3.6-35b-a3b.json"
LAYERS: Final = 40
SHARD: Final = 2_800_000_000
TILE: Final = (1 << 26) - 4096
"""Bytes after which the weights repeat; no multiple of a tensor's size, so that experts and layers differ."""

Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--layers", type=int, default=8, help="layers of the flagship, up to 40; default 8")
    parser.add_argument("--method", choices=("minmax", "search"), default="minmax")
    parser.add_argument("--recipe", default="balanced")
    parser.add_argument("--kills", type=int, default=50, help="of a small conversion; default 50")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    if not 0 <= args.layers <= 40:
        parser.error(f"--layers: expected 0 to 40, got {args.layers}")
    sys.path.insert(0, str(ROOT / "tests"))
    found: dict[str, Any] = {}
    if args.layers:
        found |= flagship(args.layers, args.method, args.recipe)
    if args.kills:
        found |= kills(args.kills)
    table = Table("figure", "value")
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value}")
    Console().print(table)
    if args.json:
        print(json.dumps(found))


def child(source: str, to: str, recipe: str, method: str) -> None:
    """Convert in this process, and print what it took."""
    from moelocal.quantize.convert import convert
    from moelocal.quantize.recipe import Recipe

    print("begin", flush=True)
    started = time.perf_counter()
    done = convert(source, to, Recipe.open(recipe), method=method, delete_source=True)  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    most = most_resident()
    print(
        json.dumps({"seconds": seconds, "memory": most, "bytes": done.nbytes, "source": done.source_nbytes})
    )


def start(source: str, to: Path, recipe: str, method: str, url: str, cache: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, "--child", source, str(to), recipe, method],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


# the flagship


def flagship(layers: int, method: str, recipe: str) -> dict[str, Any]:
    """One conversion of `layers` layers, watched."""
    raw = json.loads(CONFIG.read_text())
    full = bytes_of(shapes_of(ModelConfig.parse(raw)))
    raw["text_config"]["num_hidden_layers"] = layers
    raw["text_config"].pop("layer_types", None)
    shapes = original_names(shapes_of(ModelConfig.parse(raw)))
    with (
        tempfile.TemporaryDirectory(prefix="moelocal-conversion-") as folder,
        serving(generated(shapes) | {"config.json": json.dumps(raw).encode()}) as (url, largest),
    ):
        to, cache = Path(folder) / "out", Path(folder) / "cache"
        process = start("owner/flagship", to, recipe, method, url, cache)
        beside = total = 0
        while process.poll() is None:
            output, rest = on_disk(to), used(cache)
            beside, total = max(beside, output[1] + rest), max(total, sum(output) + rest)
            time.sleep(0.2)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        if process.returncode:
            raise SystemExit(f"the conversion failed with {process.returncode}")
        told = json.loads(lines[-1])
    here = bytes_of(shapes)
    return {
        "layers_measured": layers,
        "method": method,
        "recipe": recipe,
        "source_bytes": here,
        "output_bytes": told["bytes"],
        "seconds": round(told["seconds"], 1),
        "megabytes_per_second": round(here / told["seconds"] / 1e6, 1),
        "seconds_of_40_layers_extrapolated": round(told["seconds"] * full / here, 1),
        "peak_memory_bytes": told["memory"],
        "peak_disk_bytes": total,
        "peak_extra_disk_bytes": beside,
        "two_shards_bytes": largest,
    }


def bytes_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return 2 * sum(math.prod(shape) for shape in shapes.values())


def original_names(shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Names and shapes as the release has them: gate and up of all experts in one tensor, raw convolutions."""
    result: Shapes = {}
    for name, shape in shapes.items():
        stored = name if name == "lm_head.weight" else f"model.language_model.{name}"
        if ".switch_mlp.up_proj" in name:
            continue
        if ".switch_mlp.gate_proj" in name:
            experts, width, hidden = shape
            stored = stored.replace("switch_mlp.gate_proj.weight", "experts.gate_up_proj")
            shape = (experts, 2 * width, hidden)
        elif ".switch_mlp.down_proj" in name:
            stored = stored.replace("switch_mlp.down_proj.weight", "experts.down_proj")
        elif name.endswith("conv1d.weight"):
            shape = (shape[0], 1, shape[1])
        result[stored] = shape
    return result


def generated(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Shards in the order of the tensors, whose bytes are made when they are read, and the index."""
    from hub.server import Generated

    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and bytes_of(shards[-1]) + bytes_of({name: shape}) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    tile = heavy_tailed()
    files: dict[str, Any] = {}
    index: dict[str, str] = {}
    for number, shard in enumerate(shards):
        header, position = {}, 0
        for name, shape in shard.items():
            end = position + bytes_of({name: shape})
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        head = struct.pack("<Q", len(text)) + text
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(shard, file)
        files[file] = Generated(len(head) + position, _Reader(head, tile, number))
    text = json.dumps({"metadata": {"total_size": bytes_of(shapes)}, "weight_map": index}).encode()
    return files | {"model.safetensors.index.json": text}


@dataclasses.dataclass(frozen=True)
class _Reader:
    """The bytes of one shard: its header, then the tile over and over, in each shard from another place."""

    head: bytes
    tile: bytes
    number: int

    def __call__(self, offset: int, length: int) -> bytes:
        parts = [self.head[offset : offset + length]]
        missing = length - len(parts[0])
        place = (max(0, offset - len(self.head)) + self.number * 1_000_002) % TILE
        while missing > 0:
            parts.append(self.tile[place : place + missing])
            missing -= len(parts[-1])
            place = 0
        return b"".join(parts)


def heavy_tailed() -> bytes:
    """Student's t with 5 degrees of freedom, times 0.02, as bfloat16 (the upper half of float32)."""
    generator = np.random.default_rng(7)
    values = generator.standard_t(5, TILE // 2).astype(np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


@contextmanager
def serving(files: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """A hub with one repository: its address, and the bytes of its two largest shards."""
    from hub.server import Repo, Server

    repo = Repo(files)
    shards = sorted(repo.size(name) for name in files if name.endswith(".safetensors"))
    with Server({"owner/flagship": repo}) as server:
        yield server.url, sum(shards[-2:])


def on_disk(to: Path) -> tuple[int, int]:
    """Bytes that the disk holds of output files, finished or not, and of everything else in the folder."""
    output = [*to.glob("model*.safetensors"), *to.glob(".conversion/model*.safetensors")]
    weights = sum(map(allocated, output))
    return weights, used(to) - weights


def used(folder: Path) -> int:
    return sum(allocated(path) for path in folder.rglob("*") if not path.is_symlink())


def allocated(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:  # a moment ago it was there
        return 0


# kill -9


def kills(count: int) -> dict[str, Any]:
    """So many conversions killed and resumed."""
    from parity.checkpoints import Recipe, write

    moments = random.Random(1)
    with tempfile.TemporaryDirectory(prefix="moelocal-kills-") as folder:
        top = Path(folder)
        source = write(top / "source", Recipe("qwen3_5_moe", dtype="BF16", width=64), shards=4)
        (top / "recipe.toml").write_text("[formats]\ndefault = { bits = 4, group = 32 }\n")
        recipe, cache = str(top / "recipe.toml"), top / "cache"
        with serving({file.name: file for file in source.iterdir()}) as (url, _):

            def begun(to: Path) -> subprocess.Popen[str]:
                process = start("owner/flagship", to, recipe, "minmax", url, cache)
                assert process.stdout is not None and process.stdout.readline() == "begin\n"
                return process

            whole = begun(top / "whole")
            started = time.perf_counter()
            assert whole.wait() == 0
            seconds = time.perf_counter() - started
            expected = content(top / "whole")
            killed = identical = attempts = 0
            while killed < count:
                to, attempts = top / f"out{attempts}", attempts + 1
                process = begun(to)
                time.sleep(moments.uniform(0, seconds))
                process.send_signal(signal.SIGKILL)
                if process.wait() == 0:
                    continue  # it was faster
                killed += 1
                identical += begun(to).wait() == 0 and content(to) == expected
    return {"kills": killed, "resumes_identical": identical}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    main()
