"""Conversion: the weights that come out, how config.json describes them, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import moelocal
from damage import change_tensors
from hub.repos import NAME, connected
from hub.server import Fault, Repo
from moelocal import hub
from moelocal.checkpoint.files import read_entries, read_header
from moelocal.checkpoint.names import kind_of, mlx_name
from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig
from moelocal.errors import CheckpointError, ModelNotFound, MoelocalError, RequestError
from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.ops.group_search import group_search
from moelocal.ops.min_max import min_max
from moelocal.quantize import convert as module
from moelocal.quantize.convert import convert
from moelocal.quantize.journal import locked
from moelocal.quantize.pieces import Piece
from moelocal.quantize.recipe import Plan, Recipe, class_of
from moelocal.quantize.shards import Shards
from moelocal.quantize.streamed import block_of
from moelocal.units import size
from parity.checkpoints import SMALL, tokens, write
from parity.checkpoints import Recipe as Random
from parity.ours import Ours, assert_same

FAMILIES = {
    "qwen3_5_moe": Random("qwen3_5_moe", dtype="BF16", **SMALL),
    "qwen3_5_moe one by one": Random("qwen3_5_moe", per_expert=True, **SMALL),
    "qwen3_5": Random("qwen3_5", tied=True, **SMALL),
    "qwen3_next": Random("qwen3_next", dtype="F16", **SMALL),
    "qwen3_moe": Random("qwen3_moe", **SMALL),
}
MOE = FAMILIES["qwen3_5_moe"]
FOUR, SIX = QuantSpec(4, 32), QuantSpec(6, 32)

MIXED = """
summary = "Several formats, some matrices kept."
[formats]
default = { bits = 4, group = 32 }
router = "keep"
delta.a = "keep"
head = { bits = 6, group = 32 }
experts.down = { bits = 5, group = 32 }
shared = { bits = 8, group = 32 }
delta.z = { bits = 6, group = 32 }
"""

FEW = """
[formats]
default = "keep"
embedding = { bits = 6, group = 32 }
experts.down = { bits = 4, group = 32, edges = { bits = 3, share = 0.25 } }
dense.down = { bits = 4, group = 32, edges = { bits = 3, share = 0.25 } }
delta.z = { bits = 5, group = 32, edges = { bits = 8, share = 0.25 } }
"""


@pytest.fixture
def mixed(tmp_path) -> Recipe:
    (tmp_path / "mixed.toml").write_text(MIXED)
    return Recipe.open(tmp_path / "mixed.toml")


def source(tmp_path: Path, recipe: Random = MOE, shards: int = 3) -> Path:
    return write(tmp_path / "source", recipe, shards)


def weights(folder: Path) -> dict[str, mx.array]:
    """All stored tensors by name."""
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= mx.load(str(file))
    return found


def bits(array: mx.array) -> tuple[Any, ...]:
    return array.dtype, array.shape, np.array(array.view(mx.uint8)).tobytes()


def refused(kind: type[MoelocalError], message: str, *args: Any, **more: Any) -> None:
    with pytest.raises(MoelocalError) as caught:
        convert(*args, **more)
    assert type(caught.value) is kind
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("family", "method"), [*((family, "minmax") for family in FAMILIES), ("qwen3_5_moe", "search")]
)
def test_every_tensor_is_quantized_as_planned(tmp_path, mixed, family, method):
    recipe = mixed
    if method == "search":  # which takes seconds for all of these small matrices
        (tmp_path / "few.toml").write_text(FEW)
        recipe = Recipe.open(tmp_path / "few.toml")
    folder = source(tmp_path, FAMILIES[family])
    config = ModelConfig.read(folder)
    shapes = {name: part.shape for name, part in Checkpoint.open(folder, config).sources.items()}
    plan = recipe.plan(config, shapes)
    for path in list(plan):  # mlx-lm has one matrix for each of these pairs
        for pair, first, second in (("qkvz", "qkv", "z"), ("ba", "b", "a")):
            if family == "qwen3_next" and path.endswith(f"in_proj_{first}"):
                stem = path.removesuffix(first)
                found = [plan.pop(stem + name) for name in (first, second)]
                plan[stem + pair] = None if None in found else max(found, key=lambda spec: spec.bits)
    checkpoint = Checkpoint.of(folder, config, read_entries(folder), split=False)
    dtype = checkpoint.compute_dtype
    expected: dict[str, mx.array] = {}
    for name, part in checkpoint.sources.items():
        array, stored = part.read(), mlx_name(name, config)
        spec = plan.get(name.removesuffix(".weight"))
        if spec is None:
            expected[stored] = array if name.endswith("A_log") else array.astype(dtype)
            continue
        packed = min_max(array, spec, dtype) if method == "minmax" else group_search(array, spec, None, dtype)
        for suffix, part_of in zip(("weight", "scales", "biases"), packed.arrays, strict=True):
            expected[f"{stored.removesuffix('weight')}{suffix}"] = part_of

    done = convert(folder, tmp_path / "out", recipe, method=method)

    found = weights(tmp_path / "out")
    assert set(found) == set(expected)
    for name in expected:
        assert bits(found[name]) == bits(expected[name]), name
    assert done.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert not (tmp_path / "out" / ".conversion").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_computes_what_its_dequantized_weights_do(tmp_path, mixed, family):
    convert(source(tmp_path, FAMILIES[family]), tmp_path / "out", mixed, method="minmax")
    (tmp_path / "keep.toml").write_text('[formats]\ndefault = "keep"')
    keep = Recipe.open(tmp_path / "keep.toml")
    convert(tmp_path / "out", tmp_path / "plain", keep, method="minmax", dequantize=True)
    assert "quantization" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    sequence = tokens(20, FAMILIES[family].vocab)
    packed, plain = (Ours(tmp_path / name).logits(sequence) for name in ("out", "plain"))
    if FAMILIES[family].dtype == "F32":  # in 16 bits, dequantized weights are rounded once more
        assert_same(packed, plain)
    assert np.abs(packed - plain).mean() < 0.05 < plain.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_that_deviates_from_the_default_has_an_entry(tmp_path, mixed, family):
    folder = source(tmp_path, FAMILIES[family])
    convert(folder, tmp_path / "out", mixed, method="minmax")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["quantization"] == raw["quantization_config"]
    default = {"group_size": 32, "bits": 4, "mode": "affine"}
    entries = {key: value for key, value in raw["quantization"].items() if key not in default}
    assert default.items() <= raw["quantization"].items()
    stored = weights(tmp_path / "out")
    config = ModelConfig.read(tmp_path / "out")
    seen = set()
    for name, array in stored.items():
        path = name.removesuffix(".weight")
        if path == name or array.ndim < 2 or "conv1d" in name:
            continue
        entry = entries.pop(path, default)
        if f"{path}.scales" not in stored:
            assert entry is False, path
        else:
            cols = stored[f"{path}.scales"].shape[-1] * 32
            assert entry == {"group_size": 32, "bits": array.shape[-1] * 32 // cols, "mode": "affine"}, path
        seen.add(str(entry))
    assert entries == {}, "entries of paths that do not exist"
    assert len(seen) >= 3
    assert all(path.startswith(("language_model.", "model.", "lm_head")) for path in raw["quantization"]
               if path not in default)  # fmt: skip
    rest = {k: v for k, v in raw.items() if not k.startswith("quantization")}
    before = json.loads((folder / "config.json").read_text())
    before.pop("vision_config", None)
    assert rest == before
    assert config.quantization is not None


def test_the_embedded_model_answers_after_plain_four_bits(tmp_path):
    done = convert(hub.EMBEDDED, tmp_path / "out", Recipe.open("4bit"), method="minmax")
    copied = {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in done.folder.iterdir()} == copied | {
        "config.json", "conversion.json", "model.safetensors", "model.safetensors.index.json"
    }  # fmt: skip
    for name in copied:
        assert (done.folder / name).read_bytes() == (hub.EMBEDDED / name).read_bytes()
    model = moelocal.load(done.folder)
    assert moelocal.generate(model, "What is 3 + 4?", max_tokens=60, seed=1).text.strip() == "7"
    assert done.left_out == {"mtp": 19}


def test_the_manifest_says_where_the_weights_come_from_and_is_the_same_every_time(tmp_path, mixed):
    import hashlib

    folder = source(tmp_path)
    convert(folder, tmp_path / "a", mixed, method="minmax")
    convert(folder, tmp_path / "b", mixed, method="minmax")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    manifest = json.loads((tmp_path / "a" / "conversion.json").read_text())
    data = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert manifest["sha256"] == {"model.safetensors": hashlib.sha256(data).hexdigest()}
    assert manifest["recipe"] == {"name": "mixed", "digest": mixed.digest}
    assert (manifest["source"], manifest["method"]) == ("source", "minmax")
    assert str(tmp_path) not in json.dumps(manifest), "a published model would tell where its maker keeps it"


def test_pieces_of_any_size_give_the_same_bytes(tmp_path, mixed, monkeypatch):
    from moelocal.quantize import pieces

    folder = source(tmp_path, FAMILIES["qwen3_next"])
    convert(folder, tmp_path / "whole", mixed, method="minmax")
    monkeypatch.setattr(module, "pieces_of", lambda p, c: pieces.pieces_of(p, c, 3000))
    convert(folder, tmp_path / "cut", mixed, method="minmax")
    for name in ("model.safetensors", "config.json", "conversion.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_moe"])
def test_one_shard_is_needed_at_a_time_and_goes_when_its_tensors_are_written(
    tmp_path, mixed, monkeypatch, family
):
    folder = source(tmp_path, Random(family, text_only=True, mtp=False, **SMALL), shards=7)
    copy = shutil.copytree(folder, tmp_path / "copy")
    write_piece = module._Conversion._write
    seen = []

    def watched(self: Any, piece: Piece, *args: Any) -> None:
        present = sorted(file.name for file in copy.glob("*.safetensors"))
        assert piece.files == (present[0],), "those before it are gone"
        seen.append(present[0])
        write_piece(self, piece, *args)

    monkeypatch.setattr(module._Conversion, "_write", watched)
    convert(copy, tmp_path / "out", mixed, method="minmax", delete_source=True)
    assert list(copy.glob("*.safetensors")) == []
    assert len(set(seen)) == 7
    monkeypatch.undo()
    convert(folder, tmp_path / "kept", mixed, method="minmax")
    assert len(list(folder.glob("*.safetensors"))) == 7
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()


def test_a_shard_without_a_text_tensor_is_not_deleted(tmp_path, mixed):
    """What is not in the result would be lost with it."""
    folder = source(tmp_path, shards=7)
    convert(folder, tmp_path / "out", mixed, method="minmax", delete_source=True)
    left = sorted(folder.glob("*.safetensors"))
    assert left and all(
        kind_of(entry.name) in ("vision", "mtp") for file in left for entry in read_header(file)
    )


def test_a_finished_result_of_the_same_command_is_left_as_it_is(tmp_path, mixed):
    folder = source(tmp_path)
    first = convert(folder, tmp_path / "out", mixed, method="minmax", delete_source=True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second = convert(folder, tmp_path / "out", mixed, method="minmax", delete_source=True)
    assert (first.before, second.before) == (False, True)
    assert (second.nbytes, second.source_nbytes, second.left_out) == (
        first.nbytes, first.source_nbytes, first.left_out
    )  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    refused(
        RequestError,
        f"{tmp_path / 'out'}: holds the result of another conversion (source, recipe mixed); choose a new folder "
        "with --to, or delete this one",
        folder, tmp_path / "out", mixed, method="search",
    )  # fmt: skip


@pytest.mark.parametrize("delete", [False, True])
def test_a_repository_becomes_what_its_folder_does(tmp_path, mixed, monkeypatch, delete):
    folder = source(tmp_path, Random("qwen3_5_moe", text_only=True, mtp=False, **SMALL), shards=5)
    convert(folder, tmp_path / "from folder", mixed, method="minmax")
    repo = Repo({file.name: file for file in folder.iterdir()})
    downloads = tmp_path / "out" / ".conversion" / "downloads"
    write_piece, bring = module._Conversion._write, Shards._bring

    def watched(self: Any, *args: Any) -> None:
        assert len(list(downloads.glob("*"))) <= 2, "that in use and the next"
        write_piece(self, *args)

    def after_the_third(self: Any, repository: Any, name: str) -> None:
        """The fourth is asked for when the third is whole: otherwise its refusal may end the run before that."""
        before = self._jobs.get(name.replace("00004", "00003"))
        if "00004" in name and before is not None:
            wait([before])
        bring(self, repository, name)

    monkeypatch.setattr(module._Conversion, "_write", watched)
    monkeypatch.setattr(Shards, "_bring", after_the_third)
    with connected(monkeypatch, tmp_path / "cache", repo) as server:
        # the first two requests are for the header
        cut = Fault("model-00003", skip=2, cut=5000)
        server.faults = [cut, *(Fault(f"model-0000{i}", 99, 2, status=403) for i in (4, 5))]
        with pytest.raises(ModelNotFound):
            convert(NAME, tmp_path / "out", mixed, method="minmax", delete_source=delete)
        assert not (tmp_path / "out" / "config.json").exists()
        server.faults, before = [], server.sent
        convert(NAME, tmp_path / "out", mixed, method="minmax", delete_source=delete)
        last = sum((folder / f"model-0000{i}-of-00005.safetensors").stat().st_size for i in (4, 5))
        assert server.sent - before <= last, "only what was missing"
    assert bool(list((tmp_path / "cache").rglob("*.safetensors"))) != delete
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "from folder" / name).read_bytes()
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert manifest["source"] == f"{NAME}@{repo.commit}"


class Recorder:
    """Calibrates nothing: takes min/max, notes its calls, and reads what it may."""

    digest = "recorder"

    def __init__(self, stop: int | None = None) -> None:
        self.calls: list[str] = []
        self.stop = stop

    def begin(self, source: Checkpoint, output: Checkpoint, work: Path) -> None:
        if not (work / "noted").exists():
            assert isinstance(source.root().matrix("embed_tokens", MOE.vocab, MOE.hidden, None), mx.array)
            (work / "noted").touch()
        packed = output.root().matrix("embed_tokens", MOE.vocab, MOE.hidden, None)
        assert isinstance(packed, QuantizedArray) and packed.spec == FOUR
        mx.eval(packed.arrays)
        self.calls.append("begin")

    def layer(self, index: int, source: Checkpoint, plan: Plan) -> Mapping[str, QuantizedArray]:
        if index == self.stop:
            raise KeyboardInterrupt
        self.calls.append(f"layer {index}")
        block = block_of(source, index, mx.float32)
        assert len(block.arrays) > 8 and all(path.startswith(f"layers.{index}.") for path in plan)
        return self.plain(source.folder, plan, mx.bfloat16, leave=f"layers.{index}.self_attn.q_proj")

    def resume(self, index: int, output: Checkpoint) -> None:
        self.calls.append(f"resume {index}")
        assert output.folder != source
        block_of(output, index, mx.float32)

    def head(self, source: Checkpoint, plan: Plan) -> Mapping[str, QuantizedArray]:
        self.calls.append(f"head {sorted(plan)}")
        return self.plain(source.folder, plan, mx.bfloat16)

    def plain(self, folder: Path, plan: Plan, dtype: mx.Dtype, leave: str = "") -> dict[str, QuantizedArray]:
        sources = Checkpoint.open(folder, ModelConfig.read(folder)).sources
        return {
            path: min_max(sources[f"{path}.weight"].read(), spec, dtype)
            for path, spec in plan.items()
            if spec is not None and path != leave
        }


def test_matrices_that_the_file_holds_as_one_are_calibrated_one_by_one(tmp_path, mixed):
    folder = source(tmp_path, FAMILIES["qwen3_next"])
    convert(folder, tmp_path / "plain", mixed, method="minmax")

    class Quantizer(Recorder):
        def begin(self, source: Checkpoint, output: Checkpoint, work: Path) -> None:
            pass

        def layer(self, index: int, source: Checkpoint, plan: Plan) -> Mapping[str, QuantizedArray]:
            if index == 0:
                specs = {path.rpartition(".")[2]: spec for path, spec in plan.items() if "in_proj" in path}
                assert specs == {"in_proj_qkv": SIX, "in_proj_z": SIX, "in_proj_b": None, "in_proj_a": None}
            return self.plain(source.folder, plan, mx.float16)

        def head(self, source: Checkpoint, plan: Plan) -> Mapping[str, QuantizedArray]:
            return {}

    convert(folder, tmp_path / "out", mixed, method="minmax", calibrator=Quantizer())
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize("delete", [False, True])
def test_a_calibrator_gets_the_layers_in_order_and_goes_on_from_what_is_written(tmp_path, mixed, delete):
    folder = source(tmp_path)
    convert(folder, tmp_path / "plain", mixed, method="minmax")
    first, second = Recorder(stop=2), Recorder()
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", mixed, method="minmax", calibrator=first, delete_source=delete)
    convert(folder, tmp_path / "out", mixed, method="minmax", calibrator=second, delete_source=delete)
    assert first.calls == ["begin", "layer 0", "layer 1"]
    assert second.calls == [
        "begin", "resume 0", "resume 1", "layer 2", "layer 3", "head ['lm_head']"
    ]  # fmt: skip
    assert len(list(folder.glob("*.safetensors"))) == (1 if delete else 3), "that of the vision tower stays"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["calibration"] == "recorder"


# what is refused


def test_a_quantized_source_is_refused_unless_asked_for(tmp_path, mixed):
    convert(source(tmp_path), tmp_path / "four", mixed, method="minmax")
    four = tmp_path / "four"
    matrices = sum(name.endswith(".scales") for name in weights(four))
    refused(
        CheckpointError,
        f"{four}: is quantized already ({matrices} matrices); take the original weights, or let "
        "`moelocal quantize --dequantize` quantize these once more, which adds to their error",
        four, tmp_path / "out", mixed,
    )  # fmt: skip
    assert not (tmp_path / "out").exists()
    convert(four, tmp_path / "out", mixed, method="minmax", dequantize=True)
    once, twice = dense(four), dense(tmp_path / "out")
    for name, array in once.items():
        # rounded on a grid whose edges moved by less than a step; other weights would be at a distance of about 1.4
        assert np.linalg.norm(twice[name] - array) < 0.1 * np.linalg.norm(array), name


def dense(folder: Path) -> dict[str, np.ndarray]:
    """The matrices that are quantized, dequantized, by path."""
    from moelocal.model import Decoder
    from moelocal.quantize.pieces import parts_of

    checkpoint = Checkpoint.open(folder, ModelConfig.read(folder))
    Decoder(checkpoint, mx.float32, evaluate=False)
    parts = parts_of(checkpoint, checkpoint.packed)
    return {p.path: np.array(p.read(0, p.shape[0])) for p in parts if p.spec is not None}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "index", "place"),
    [
        ("model.language_model.layers.1.mlp.experts.gate_up_proj", (2, 40, 3), "index 2 of 4"),
        ("model.language_model.layers.3.self_attn.q_proj.weight", (5, 0), "index 5 of 128"),
        ("model.language_model.layers.0.input_layernorm.weight", (7,), "index 7 of 32"),
    ],
)
def test_weights_that_are_no_numbers_are_named(tmp_path, mixed, name, index, place, value):
    from parity.storage import encode

    folder = source(tmp_path, shards=1)

    def spoil(tensors: dict[str, Any]) -> None:
        dtype, shape, data = tensors[name]
        array = np.array(mx.array(np.frombuffer(data, np.uint16)).view(mx.bfloat16).astype(mx.float32))
        array = array.reshape(shape)
        array[index] = value
        tensors[name] = encode(array, dtype)

    change_tensors(folder, spoil)
    refused(
        CheckpointError,
        f"{name}: holds NaN or infinite weights ({place}); the source is damaged: download it again, or use another",
        folder, tmp_path / "out", mixed, method="minmax",
    )  # fmt: skip


def test_the_bad_expert_of_a_stack_is_named(tmp_path, mixed):
    from parity.storage import encode

    folder = source(tmp_path, FAMILIES["qwen3_moe"], shards=1)
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    change_tensors(folder, lambda t: t.update({name: encode(np.full((32, 32), np.nan), "F32")}))
    refused(
        CheckpointError,
        f"{name}: holds NaN or infinite weights (index 3 of 4); the source is damaged: download it again, or use "
        "another",
        folder, tmp_path / "out", mixed, method="minmax",
    )  # fmt: skip


def test_a_target_size_is_met_where_matrices_are_written_as_one(tmp_path, mixed):
    """qkv and z in different formats become one matrix of the better, which the plan alone does not count."""
    folder = source(tmp_path, FAMILIES["qwen3_next"])
    (tmp_path / "apart.toml").write_text(
        MIXED.replace("bits = 6, group = 32 }\n", "bits = 3, group = 32 }\n", 2)
    )
    for target in (75_000, 100_000):
        to = tmp_path / str(target)
        convert(folder, to, Recipe.open(tmp_path / "apart.toml"), method="minmax", target=target)
        index = json.loads((to / "model.safetensors.index.json").read_text())
        assert 0.9 * target < index["metadata"]["total_size"] <= target


def test_an_unknown_method_is_refused(tmp_path, mixed):
    message = "method: expected one of search, minmax, got 'fast'"
    refused(RequestError, message, source(tmp_path), tmp_path / "out", mixed, method="fast")


def test_groups_that_do_not_divide_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "wide.toml").write_text("[formats]\ndefault = { bits = 4, group = 128 }")
    recipe = Recipe.open(tmp_path / "wide.toml")
    with pytest.raises(
        MoelocalError, match=r"^recipe wide: .*: groups of 128 do not divide its 32 columns; "
    ):
        convert(source(tmp_path), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_plan_whose_groups_do_not_divide_is_refused(tmp_path):
    class Careless:
        name, digest = "careless", "0"

        def plan(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
            return {"layers.3.self_attn.o_proj": QuantSpec(4, 128)}

    refused(
        CheckpointError,
        "model.language_model.layers.3.self_attn.o_proj.weight [32, 64]: groups of 128 do not divide its 64 columns; "
        "choose a smaller group for it, or keep it unquantized",
        source(tmp_path), tmp_path / "out", Careless(),
    )  # fmt: skip


def test_the_source_itself_and_folders_of_others_are_refused(tmp_path, mixed):
    folder = source(tmp_path)
    message = "is the source itself; choose another folder with --to"
    refused(RequestError, f"{folder}: {message}", folder, folder, mixed)
    (tmp_path / "link").symlink_to(folder)
    refused(RequestError, f"{tmp_path / 'link'}: {message}", folder, tmp_path / "link", mixed)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    refused(
        RequestError,
        f"{tmp_path / 'mine'}: holds files that no conversion wrote, diary.txt among them; choose a new folder with "
        "--to",
        folder, tmp_path / "mine", mixed,
    )  # fmt: skip
    refused(
        RequestError,
        f"{tmp_path / 'mine' / 'diary.txt'}: is a file; the result needs a folder",
        folder, tmp_path / "mine" / "diary.txt", mixed,
    )  # fmt: skip
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]


def test_a_target_in_the_home_of_nobody_is_refused(tmp_path, mixed):
    message = "~nosuchuser/out: Could not determine home directory"
    refused(RequestError, message, source(tmp_path), "~nosuchuser/out", mixed)


def test_a_manifest_of_another_tool_is_no_result_of_ours(tmp_path, mixed):
    (tmp_path / "out").mkdir()
    for name in ("conversion.json", "config.json"):
        (tmp_path / "out" / name).write_text('{"recipe": "theirs"}')
    refused(
        RequestError,
        f"{tmp_path / 'out'}: holds the result of another conversion (None, recipe theirs); choose a new folder "
        "with --to, or delete this one",
        source(tmp_path), tmp_path / "out", mixed,
    )  # fmt: skip


def test_a_result_whose_weights_are_gone_is_not_taken_for_whole(tmp_path, mixed):
    folder = source(tmp_path)
    convert(folder, tmp_path / "out", mixed, method="minmax")
    (tmp_path / "out" / "model.safetensors").unlink()
    refused(
        RequestError,
        f"{tmp_path / 'out'}: weights of this result were removed or cut off after it was finished; delete the folder "
        "and run the same command again",
        folder, tmp_path / "out", mixed, method="minmax",
    )  # fmt: skip


def test_a_source_that_was_trained_on_is_not_taken_for_the_old_one(tmp_path, mixed):
    folder = source(tmp_path)
    convert(folder, tmp_path / "out", mixed, method="minmax")
    first = next(folder.glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    os.utime(first, ns=(0, first.stat().st_mtime_ns + 10**9))  # however coarse the clock of the disk is
    refused(
        RequestError,
        f"{tmp_path / 'out'}: holds what was made of {folder} before the weights there changed; choose a new folder "
        "with --to, or delete this one",
        folder, tmp_path / "out", mixed, method="minmax",
    )  # fmt: skip


@pytest.mark.parametrize("place", ["me@corp", "mod\udcffel"])
def test_the_path_of_a_folder_stays_private_whatever_its_name_is(tmp_path, mixed, place):
    folder = tmp_path / place / "model"
    try:
        folder.parent.mkdir()
    except OSError:
        pytest.skip("this disk takes names of whole characters only")
    source(tmp_path).rename(folder)
    convert(folder, tmp_path / "out", mixed, method="minmax")
    manifest = (tmp_path / "out" / "conversion.json").read_text("utf-8")
    assert json.loads(manifest)["source"] == "model" and str(tmp_path) not in manifest
    convert(folder.rename(folder.with_name(place)), tmp_path / "again", mixed, method="minmax")
    assert json.loads((tmp_path / "again" / "conversion.json").read_text("utf-8"))["source"] == place


def test_what_another_process_finished_meanwhile_is_taken_as_it_is(tmp_path, mixed, monkeypatch):
    folder = source(tmp_path)

    @contextmanager
    def late(work: Path) -> Iterator[None]:
        monkeypatch.undo()
        convert(folder, tmp_path / "out", mixed, method="minmax")
        with locked(work):
            yield

    monkeypatch.setattr(module, "locked", late)
    assert convert(folder, tmp_path / "out", mixed, method="minmax").before is True
    assert not (tmp_path / "out" / ".conversion").exists()


def test_a_lock_that_was_removed_with_its_folder_is_taken_anew(tmp_path, monkeypatch):
    work, flock = tmp_path / "out" / ".conversion", fcntl.flock

    def removed(fd: int, operation: int) -> None:
        monkeypatch.undo()
        shutil.rmtree(work)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", removed)
    with locked(work):
        assert (work / "lock").exists()
        with (
            pytest.raises(RequestError, match="another process is converting into this folder"),
            locked(work),
        ):
            pass


def test_a_disk_without_locks_is_written_to(tmp_path, monkeypatch):
    def unsupported(fd: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path / "out" / ".conversion"):
        assert (tmp_path / "out" / ".conversion").is_dir()


def test_files_are_closed_after_an_error(tmp_path, mixed):
    folder = source(tmp_path)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "quantizing":
            raise KeyboardInterrupt

    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / "out", mixed, method="minmax", report=interrupt)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_two_processes_do_not_write_one_result(tmp_path, mixed):
    folder = source(tmp_path)
    with locked(tmp_path / "out" / ".conversion"):
        refused(
            RequestError,
            f"{tmp_path / 'out'}: another process is converting into this folder",
            folder, tmp_path / "out", mixed,
        )  # fmt: skip
    assert convert(folder, tmp_path / "out", mixed, method="minmax").before is False


def test_no_space_is_said_before_the_first_byte(tmp_path, mixed, monkeypatch):
    folder = source(tmp_path)
    needed = convert(folder, tmp_path / "fits", mixed, method="minmax").nbytes
    free = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    refused(
        CheckpointError,
        f"{tmp_path / 'out'}: {size(needed)} are needed, but only {size(needed - 1)} are free on this disk; "
        "free some space, or choose another one with --to",
        folder, tmp_path / "out", mixed,
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


MEASURE = """
import resource, sys
from pathlib import Path
from moelocal.quantize import convert as module, pieces
from moelocal.quantize.recipe import Recipe

source, out, small, most = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
module.pieces_of = lambda parts, checkpoint: pieces.pieces_of(parts, checkpoint, most)
unit = 1 if sys.platform == "darwin" else 1024
module.convert(small, out / "small", Recipe.open("4bit"), method="minmax")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
module.convert(source, out / "large", Recipe.open("4bit"), method=sys.argv[5])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""


def large(folder: Path, layers: int, experts: int, hidden: int = 1024, width: int = 512) -> Path:
    """A checkpoint of zeros, in files that take no disk."""
    import struct

    recipe = Random("qwen3_5_moe", layers=layers, hidden=64, vocab=4096, experts=experts, width=64, dtype="BF16",
                    shared_width=64, mtp=False)  # fmt: skip
    write(folder, recipe, 1)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"] |= {"hidden_size": hidden, "moe_intermediate_size": width}
    (folder / "config.json").write_text(json.dumps(raw))
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, position = json.loads(content[8 : 8 + length]), 0
    sizes = {64: hidden}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = entry["shape"]
        if name.endswith("gate_up_proj"):
            shape = [experts, 2 * width, hidden]
        elif name.endswith("experts.down_proj"):
            shape = [experts, hidden, width]
        elif "norm.weight" in name and "linear_attn" not in name and shape == [64]:
            shape = [hidden]
        elif name.endswith(("o_proj.weight", "out_proj.weight", "shared_expert.down_proj.weight")):
            shape = [hidden, shape[1]]
        elif len(shape) == 2:
            shape = [shape[0], sizes.get(shape[1], shape[1])]
        nbytes = int(np.prod(shape)) * {"BF16": 2, "F32": 4}[entry["dtype"]]
        header[name] = entry | {"shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + position)
    return folder


def extra_memory(tmp_path: Path, folder: Path, most: int, method: str = "minmax") -> int:
    """Bytes that the conversion of `folder` took in a process of its own beyond those of a tiny one."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, tmp_path / "out", hub.EMBEDDED, str(most), method],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_memory_is_that_of_a_piece_whatever_the_size(tmp_path):
    folder = large(tmp_path / "large", layers=4, experts=16)
    assert (folder / "model.safetensors").stat().st_size > 200 << 20
    # a piece of 8 MB: read and copied, 4 arrays of a chunk of 4 MB each, the result, and what the allocator keeps
    assert extra_memory(tmp_path, folder, 8 << 20) < 64 << 20


@pytest.mark.slow
@pytest.mark.parametrize("method", ["minmax", "search"])
def test_memory_with_pieces_as_large_as_they_are(tmp_path, method):
    from moelocal.quantize.pieces import SOURCE_BYTES

    layers = 16 if method == "minmax" else 1  # the search takes half a microsecond per weight
    folder = large(tmp_path / "large", layers=layers, experts=32)
    # a piece of 64 MB: read and copied, some 15 arrays of a chunk of 4 MB, the result, and what the allocator keeps
    assert extra_memory(tmp_path, folder, SOURCE_BYTES, method) < 400 << 20


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "recipe",
    [
        Random("qwen3_5_moe", dtype="BF16"), Random("qwen3_5_moe", per_expert=True), Random("qwen3_5", tied=True),
        Random("qwen3_5", text_only=True), Random("qwen3_next"), Random("qwen3_moe"),
    ],
    ids=lambda r: f"{r.family} {r.dtype}{' tied' * r.tied}{' one by one' * r.per_expert}{' text only' * r.text_only}",
)  # fmt: skip
def test_mlx_lm_computes_the_same_logits_on_the_result(tmp_path, mixed, recipe):
    from parity.originals import MlxLm

    folder = convert(write(tmp_path / "source", recipe), tmp_path / "out", mixed, method="minmax").folder
    sequence = tokens(75, recipe.vocab)
    ours, theirs = Ours(folder), MlxLm(folder)
    assert_same(ours.logits(sequence), theirs.logits(sequence))
    assert_same(ours.chunked(sequence, [33, 1, 30]), theirs.stepwise(sequence, 64))


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_5", "qwen3_next"])
def test_plain_four_bits_are_what_mlx_lm_writes(tmp_path, family):
    """Every tensor, bit for bit; on a machine whose MLX computes on the CPU."""
    from parity.originals import convert as theirs

    folder = write(tmp_path / "source", Random(family))
    convert(folder, tmp_path / "ours", Recipe.open("4bit"), method="minmax")
    theirs(folder, tmp_path / "theirs", {"bits": 4, "group_size": 64})
    ours, expected = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert set(ours) == set(expected)
    different = [name for name in expected if bits(ours[name]) != bits(expected[name])]
    assert different == []
    read = {name: json.loads((tmp_path / name / "config.json").read_text())["quantization"] for name in
            ("ours", "theirs")}  # fmt: skip
    # an entry of mlx-lm's has no mode, which means affine
    assert read["ours"] == {
        key: {"mode": "affine", **value} if isinstance(value, dict) else value
        for key, value in read["theirs"].items()
    }


def test_classes_and_parts_agree_on_what_is_a_matrix(tmp_path):
    from moelocal.quantize.pieces import parts_of

    for name, recipe in FAMILIES.items():
        folder = write(tmp_path / name.replace(" ", "_"), recipe)
        for part in parts_of(Checkpoint.open(folder, ModelConfig.read(folder)), {}):
            known = class_of(part.path) is not None and part.name.endswith(".weight")
            assert part.matrices == ((part.path,) if known else ()), part.name
