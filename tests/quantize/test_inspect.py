"""`moelocal inspect`, as a person and as a program reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest

from damage import HYBRID
from hub.repos import connected
from hub.server import Generated, Repo
from moelocal.checkpoint.names import mlx_name
from moelocal.cli import main
from moelocal.config import ModelConfig
from moelocal.quantize.recipe import BUILT_IN, Recipe
from moelocal.quantize.sizes import shapes_of
from parity.checkpoints import SMALL, config, write
from parity.checkpoints import Recipe as Model
from parity.storage import read_tensors


def inspected(capsys, *arguments: str | Path) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def failed(capsys, *arguments: str | Path) -> str:
    assert main(["inspect", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.fixture(scope="module")
def flagship(root, tmp_path_factory) -> Path:
    """The 35B-A3B without its weights: a sparse file of 69 GB, of which only the header takes space."""
    folder = tmp_path_factory.mktemp("flagship")
    raw = json.loads((root / "benchmarks/configs/qwen3.6-35b-a3b.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw))
    found, header, position = ModelConfig.parse(raw), {}, 0
    for name, shape in shapes_of(found).items():
        if name.endswith("conv1d.weight"):
            shape = (shape[0], 1, shape[1])
        end = position + 2 * math.prod(shape)
        header[mlx_name(name, found)] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)
    return folder


def packed(folder: Path, model: Model, recipe: str) -> Path:
    """A checkpoint in the layout of MLX, its matrices zeros in the formats of a recipe, the rest bfloat16."""
    folder.mkdir()
    raw = config(model)
    found = ModelConfig.parse(raw)
    plan = Recipe.open(recipe).plan(found, shapes_of(found))
    arrays, entries = {}, {}
    for name, shape in shapes_of(found).items():
        path, plain = name.removesuffix(".weight"), mx.zeros(shape, mx.bfloat16)
        spec = plan.get(path)
        if spec is None:
            arrays[mlx_name(name, found)] = plain
            entries[mlx_name(path, found)] = False
            continue
        codes = mx.quantize(plain, spec.group, spec.bits)
        for leaf, array in zip(("weight", "scales", "biases"), codes, strict=True):
            arrays[mlx_name(f"{path}.{leaf}", found)] = array
        entries[mlx_name(path, found)] = {"bits": spec.bits, "group_size": spec.group}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(
        json.dumps(raw | {"quantization": {"bits": 4, "group_size": 64, **entries}})
    )
    return folder


def test_an_original(capsys, flagship):
    assert (
        inspected(capsys, flagship, "--memory", "32GB").splitlines()
        == f"""\
{flagship}
architecture  qwen3_5_moe
layers        40: 30 delta net, 10 attention
feed-forward  256 experts of width 512, 8 per token, and a shared one of width 512
size          hidden 2048, vocabulary 248,320, context 262,144

The text model in 1 file: 69.32 GB, 34.66 billion weights of 16.00 bits; a token reads 5.89 GB.

part                          format               weights      size  read per token
experts gate, up, down        16-bit float   32.21 billion  64.42 GB         2.01 GB
delta net qkv, z, b, a, out   16-bit float    1.01 billion   2.02 GB         2.02 GB
embedding                     16-bit float  508.56 million   1.02 GB          4.1 kB
output head                   16-bit float  508.56 million   1.02 GB         1.02 GB
attention q, k, v, o          16-bit float  272.63 million  545.3 MB        545.3 MB
shared expert gate, up, down  16-bit float  125.83 million  251.7 MB        251.7 MB
router                        16-bit float   20.97 million   41.9 MB         41.9 MB
norms and others              16-bit float    1.16 million    2.3 MB          2.3 MB
shared expert's gate          16-bit float          81,920  163.8 kB        163.8 kB
all                                          34.66 billion  69.32 GB         5.89 GB

Cache: 20.5 kB for each token of context, and 64.4 MB of states.
Memory: 32.0 GiB; on a Mac the GPU may use about 78% of it, 26.80 GB: it does not fit.
(Counted: weights, states, cache of one conversation, 1.00 GB for activations, an assumption.)

What `moelocal quantize --recipe NAME` would make of it, and the context that fits then:

recipe        size  bits  read per token    context
4bit      19.51 GB  4.50         1.67 GB    262,144  plain 4 bits, as mlx-lm writes it
fast      20.90 GB  4.83         2.03 GB    235,908  fewer bytes per token than balanced
balanced  20.93 GB  4.83         2.31 GB    234,519  sensitive matrices at 6 and 8 bits
quality   20.90 GB  4.82         2.54 GB    236,107  all that every token reads at 8 bits
small     17.68 GB  4.08         2.44 GB    262,144  two of three expert matrices at 3 bits
8bit      36.83 GB  8.50         3.13 GB  too large  plain 8 bits, nearly the original
""".splitlines()
    )


def test_with_a_recipe(capsys, flagship):
    lines = inspected(capsys, flagship, "--memory", "24GB", "--recipe", "balanced").splitlines()
    assert lines[6:12] == [
        "The text model in 1 file: 69.32 GB, 34.66 billion weights of 16.00 bits; a token reads 5.89 GB.",
        "",
        "With recipe balanced: 20.93 GB, 34.66 billion weights of 4.83 bits; a token reads 2.31 GB.",
        "",
        "part                          format                                    weights      size  read per token",
        "experts gate, up              4 bits                              21.47 billion  12.08 GB        377.5 MB",
    ]
    assert lines[12].startswith(
        "experts down                  5 bits in 24 layers, 4 bits in 16   10.74 billion"
    )
    assert "Groups of 64 weights share a scale and a bias, or as many as stand behind a /." in lines
    assert (
        "Memory: 24.0 GiB; on a Mac the GPU may use about 74% of it, 19.07 GB: the result does not fit."
        in lines
    )
    assert not any(line.startswith("What ") for line in lines)


def test_with_a_target_size(capsys, flagship):
    out = inspected(capsys, flagship, "--memory", "32GB", "--target-size", "20GB")
    assert "With recipe balanced, fitted to 20.00 GB: 20.00 GB, 34.66 billion weights of 4.62 bits;" in out
    assert "the result fits with its whole context of 262,144 tokens." in out
    fast = json.loads(inspected(capsys, flagship, "--recipe", "fast", "--target-size", "19.5GiB", "--json"))
    assert fast["then"]["recipe"] == "fast" and fast["then"]["target_nbytes"] == 20_937_965_568
    assert 20_904_797_440 < fast["then"]["nbytes"] <= 20_937_965_568


def test_json(capsys, flagship):
    found = json.loads(inspected(capsys, flagship, "--json", "--memory", "32GB"))
    parts = found["now"].pop("parts")
    assert found["now"] == {
        "nbytes": 69_321_221_376,
        "parameters": 34_660_610_688,
        "bits_per_weight": 16.0,
        "read_per_token_nbytes": 5_892_863_232,
        "cache_per_token_nbytes": 20_480,
        "state_nbytes": 64_389_120,
        "context_that_fits": None,
    }
    assert sum(part["nbytes"] for part in parts.values()) == 69_321_221_376
    assert parts["router"] == {
        "parameters": 20_971_520,
        "nbytes": 41_943_040,
        "read_per_token_nbytes": 41_943_040,
        "formats": {"16-bit float": 40},
    }
    assert list(found["recipes"]) == list(BUILT_IN)
    assert found["recipes"]["small"]["nbytes"] == 17_679_508_736
    assert found["recipes"]["8bit"]["context_that_fits"] is None
    assert found["memory"] == {
        "nbytes": 34_359_738_368,
        "usable_nbytes": 26_800_595_927,
        "working_nbytes": 1_000_000_000,
    }
    assert (found["dtype"], found["quantized"], found["files"]) == ("bfloat16", False, 1)
    assert "then" not in found


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_5", "qwen3_next", "qwen3_moe"])
def test_what_was_announced_is_what_is_there_afterwards(capsys, tmp_path, family):
    model = Model(family, dtype="BF16", sensitive="BF16", layers=8)
    before = json.loads(
        inspected(capsys, write(tmp_path / "original", model), "--recipe", "balanced", "--json")
    )
    folder = packed(tmp_path / "packed", model, "balanced")
    after = json.loads(inspected(capsys, folder, "--json"))
    announced = {key: before["then"][key] for key in after["now"]}
    assert after["now"] == announced
    assert after["quantized"] and "recipes" not in after
    assert before["now"]["nbytes"] == 2 * before["now"]["parameters"]


def test_a_quantized_checkpoint(capsys, tmp_path):
    folder = packed(tmp_path / "packed", Model("qwen3_5_moe", layers=8), "balanced")
    out = inspected(capsys, folder)
    assert "5 bits in 5 layers, 4 bits in 3" in out and "What `moelocal quantize" not in out
    assert failed(capsys, folder, "--recipe", "small") == (
        f"moelocal: error: {folder}: already quantized; what a recipe makes of a model depends on the original "
        "weights\n"
    )


def test_a_model_without_delta_nets_and_one_without_experts(capsys, tmp_path):
    lines = inspected(capsys, write(tmp_path / "moe", Model("qwen3_moe", **SMALL))).splitlines()
    assert "layers        4: 4 attention" in lines
    assert "feed-forward  4 experts of width 32, 2 per token" in lines
    assert "Cache: 1.0 kB for each token of context." in lines
    lines = inspected(capsys, write(tmp_path / "dense", Model("qwen3_5", **SMALL))).splitlines()
    assert "feed-forward  dense, width 32" in lines
    assert any(line.startswith("feed-forward gate, up, down  32-bit float") for line in lines)


def test_what_is_left_out(capsys, tmp_path):
    folder = write(tmp_path / "model", HYBRID)
    sizes = {"mtp.": 0, "model.visual.": 0}
    for name, (_, _, data) in read_tensors(sorted(folder.glob("*.safetensors"))).items():
        for prefix in sizes:
            sizes[prefix] += len(data) * name.startswith(prefix)
    mtp, vision = sizes.values()
    assert mtp > vision > 0
    out = inspected(capsys, folder)
    assert (
        f"Left out, because generating text does not read it: mtp {mtp / 1e3:.1f} kB, vision {vision / 1e3:.1f} kB."
    ) in out.splitlines()
    assert "The text model in 3 files: " in out and "32-bit float" in out


def test_what_no_group_divides(capsys, tmp_path):
    folder = write(tmp_path / "model", Model("qwen3_5_moe", **SMALL | {"width": 48}))
    out = inspected(capsys, folder, "--recipe", "balanced")
    down = [f"layers.{i}.mlp.switch_mlp.down_proj" for i in range(4)]
    assert f"No group divides the columns of {', '.join(down)}: kept." in out
    out = inspected(capsys, folder, "--recipe", "4bit")
    assert "No group divides the columns of embed_tokens, " in out and " more: kept." in out
    (tmp_path / "mine.toml").write_text("[formats]\ndefault = { bits = 4 }")
    assert failed(capsys, folder, "--recipe", tmp_path / "mine.toml") == (
        "moelocal: error: recipe mine: embed_tokens: groups of 64 do not divide its 32 columns; choose another "
        'group, "keep", or misfit = "smaller"\n'
    )


def test_what_a_large_target_keeps_is_no_misfit(capsys):
    out = inspected(capsys, "--recipe", "4bit", "--target-size", "8.5MB")
    assert "16-bit float in " in out and "No group divides" not in out


def test_the_embedded_model(capsys):
    out = inspected(capsys, "--memory", "16GB")
    assert out.splitlines()[0].endswith("moelocal/embedded")
    assert "fits with its whole context of" in out


def test_what_goes_wrong_is_one_line(capsys, tmp_path, flagship):
    assert failed(capsys, tmp_path).startswith(f"moelocal: error: {tmp_path}/config.json: not found")
    assert failed(capsys, flagship, "--target-size", "9GB") == (
        "moelocal: error: target size 9.00 GB: the smallest that recipe balanced can become is 11.49 GB\n"
    )
    assert failed(capsys, flagship, "--recipe", "best").startswith("moelocal: error: best: no such recipe; ")
    assert failed(capsys, flagship, "--memory", "all") == (
        "moelocal: error: --memory: expected a size like 24GB, as a Mac's memory is named, got 'all'\n"
    )
    assert failed(capsys, flagship, "--target-size", "20,9GB") == (
        "moelocal: error: --target-size: expected a size like 20.9GB (1e9 bytes) or 19.5GiB (2^30), got '20,9GB'\n"
    )


def test_a_repository_is_described_from_its_headers_alone(capsys, flagship, tmp_path, monkeypatch):
    small = {path.name: path.read_bytes() for path in flagship.glob("*.json")}
    shard = flagship / "model.safetensors"

    def read(offset: int, length: int) -> bytes:
        with shard.open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)

    repo = Repo(small | {shard.name: Generated(shard.stat().st_size, read)})
    with connected(monkeypatch, tmp_path / "cache", repo) as server:
        there = inspected(capsys, "owner/name", "--memory", "32GB")
        assert server.sent < 2_000_000
    here = inspected(capsys, flagship, "--memory", "32GB")
    assert there.splitlines()[0] == "owner/name"
    assert there.splitlines()[1:] == here.splitlines()[1:]
