"""benchmarks/synthetic.py: what it writes is a checkpoint of the shape, the same every time, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import random_weights  # noqa: E402
import synthetic  # noqa: E402

import moelocal  # noqa: E402
from moelocal.checkpoint.scope import Checkpoint  # noqa: E402
from moelocal.checkpoint.writing import Output  # noqa: E402
from moelocal.config import AttentionSpec, ModelConfig  # noqa: E402
from moelocal.errors import CheckpointError, MoelocalError, RequestError  # noqa: E402
from moelocal.formats import QuantSpec  # noqa: E402
from moelocal.model import Decoder  # noqa: E402
from moelocal.ops.op import observing  # noqa: E402
from moelocal.units import size  # noqa: E402
from parity.checkpoints import Recipe, config, tokens  # noqa: E402

TINY = {"layers": 4, "hidden": 128, "vocab": 320, "heads": 4, "kv_heads": 2, "head_dim": 32, "key_heads": 2,
        "value_heads": 4, "key_dim": 32, "value_dim": 32, "experts": 16, "per_token": 4, "width": 64,
        "shared_width": 64, "context": 512}  # fmt: skip

FAMILIES = {
    "qwen3_5_moe": Recipe("qwen3_5_moe"),
    "qwen3_5_moe text only": Recipe("qwen3_5_moe", text_only=True),
    "qwen3_5 tied": Recipe("qwen3_5", tied=True),
    "qwen3_5": Recipe("qwen3_5"),
    "qwen3_next": Recipe("qwen3_next"),
    "qwen3_moe": Recipe("qwen3_moe"),
}
FORMATS: dict[str, tuple[str | None, int | None, int]] = {
    "4bit": (None, None, 64),
    "balanced": ("balanced", None, 64),
    "none": ("none", None, 64),
    "3 bits": (None, 3, 32),
    "6 bits": (None, 6, 128),
}


def write(to: Path, raw: dict[str, Any] | None = None, form: str = "4bit", **more: Any) -> synthetic.Written:
    recipe = synthetic.recipe_of(*FORMATS[form])
    return synthetic.write(raw or synthetic.shape("flagship", TINY), to, recipe, **more)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# the shape


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_and_its_logits_are_of_the_order_of_one(tmp_path, family, form):
    raw = config(FAMILIES[family])
    done = write(tmp_path / "out", raw, form)
    decoder = Decoder.open(done.folder, mx.float32)
    logits = decoder(mx.array(tokens(40, 320))[None])
    # the head is drawn for logits of standard deviation 1.6 behind a norm; 128 columns make that uncertain by 10 %
    assert 1.2 < mx.std(logits).item() < 2.1
    assert done.nbytes == sum(file.stat().st_size for file in done.folder.glob("*.safetensors"))
    assert ModelConfig.read(done.folder).layers == ModelConfig.parse(raw).layers


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_reads_the_same_model(tmp_path, family, form):
    from parity.originals import MlxLm
    from parity.ours import Ours, assert_same

    folder = write(tmp_path / "out", config(FAMILIES[family]), form).folder
    sequence = tokens(75, 320)
    assert_same(Ours(folder).logits(sequence), MlxLm(folder).logits(sequence))


def test_parameters_and_formats_are_those_of_the_plan(tmp_path):
    done = write(tmp_path / "out", form="balanced")
    checkpoint = Checkpoint.open(done.folder, ModelConfig.read(done.folder))
    decoder = Decoder(checkpoint, mx.bfloat16)
    assert decoder.config.layers == ModelConfig.parse(synthetic.shape("flagship", TINY)).layers
    formats = checkpoint.formats
    assert formats["layers.0.mlp.switch_mlp.up_proj"] == "affine 4 bits in groups of 64"
    assert formats["layers.3.self_attn.o_proj"] == "affine 8 bits in groups of 64"
    assert formats["layers.0.mlp.gate"] == "bfloat16"
    shapes = synthetic.shapes_of(decoder.config)
    assert done.parameters == sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("layers", [1, 4, 6, 11])
@pytest.mark.parametrize("listed", [True, False])
def test_the_pattern_of_layers_goes_on(tmp_path, layers, listed):
    raw = json.loads(synthetic.FLAGSHIP.read_text())
    if listed:
        kinds = ["linear_attention"] * 3 + ["full_attention"]
        raw["text_config"]["layer_types"] = kinds * 10
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw))
    found = ModelConfig.parse(synthetic.shape(file, {"layers": layers})).layers
    assert [isinstance(layer.mixer, AttentionSpec) for layer in found] == [i % 4 == 3 for i in range(layers)]


def test_the_named_flagship_is_the_one_of_the_config():
    assert ModelConfig.parse(synthetic.shape("flagship")) == ModelConfig.parse(
        json.loads(synthetic.FLAGSHIP.read_text())
    )


@pytest.mark.parametrize(
    ("flag", "value"), [("experts", 32), ("hidden", 256), ("width", 128), ("context", 77)]
)
def test_a_flag_changes_the_config(flag, value):
    found = ModelConfig.parse(synthetic.shape("small", {flag: value}))
    mlp = found.layers[0].mlp
    got = {"experts": getattr(mlp, "experts", 0), "hidden": found.hidden, "width": mlp.width}
    assert (got | {"context": found.context})[flag] == value


# values


def test_codes_are_uniform_and_weights_have_the_variance_that_was_asked_for():
    tensor = random_weights.Random(
        "layers.0.mlp.gate.weight", (512, 1024), ("layers.0.mlp.gate",), 0.0, 0.02, 3
    )
    for bits in (2, 3, 4, 5, 6, 8):
        spec = QuantSpec(bits, 64)
        words, scales, biases = tensor.stored(spec, mx.float32, 0, 512)
        values = np.array(mx.dequantize(words, scales, biases, 64, bits))
        # of 500,000 values the standard deviation is sure to 0.1 %, of 8,192 groups with factors 1/2 to 3/2 to 1 %
        assert abs(values.std() / 0.02 - 1) < 0.02
        assert abs(values.mean()) < 0.02 * 0.01
        ones = mx.ones_like(scales)
        codes = np.array(mx.dequantize(words, ones, mx.zeros_like(ones), 64, bits)).astype(int)
        shares = np.bincount(codes.ravel(), minlength=2**bits) / codes.size
        # 5 standard deviations of a share
        assert np.abs(shares - 2.0**-bits).max() < 5 * math.sqrt(2.0**-bits / codes.size)


@pytest.mark.parametrize("layers", [4, 32])
def test_activations_stay_of_the_order_of_one_and_tokens_use_all_experts(tmp_path, layers):
    raw = synthetic.shape("flagship", TINY | {"layers": layers})
    decoder = Decoder.open(write(tmp_path / "out", raw).folder, mx.float32)
    cache, used = decoder.new_cache(), set[int]()

    def note(op: Any, arguments: tuple[Any, ...]) -> None:
        if op.name == "experts":
            used.update(np.array(arguments[2]).ravel().tolist())

    x = decoder.embed(mx.array(tokens(256, 320))[None])
    with observing(note):
        for block, layer in zip(decoder.blocks, cache.layers, strict=True):
            x = block(x, layer, 0, None, None, None)
            # embedding 1, and two additions a layer of together at most about 1 over all layers
            assert 0.7 < mx.std(x).item() < 2.0
    assert used == set(range(16))


@given(rows=st.integers(1, 3000), cols=st.integers(1, 40_000))
def test_blocks_cover_a_tensor_and_are_bounded(rows, cols):
    blocks = list(random_weights.Random("x", (rows, cols), (), 0.0, 1.0, 0).blocks())
    assert [first for first, _ in blocks] == [0, *(last for _, last in blocks[:-1])]
    assert blocks[-1][1] == rows
    assert all(4 * cols * (last - first) <= max(random_weights.BLOCK, 4 * cols) for first, last in blocks)


def test_equal_arguments_give_equal_bytes(tmp_path):
    first, again, other = (write(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert content(first.folder) == content(again.folder)
    weights = "model.safetensors"
    assert content(first.folder)[weights] != content(other.folder)[weights]


# writing


def test_what_is_there_already_is_left(tmp_path):
    before = write(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in before.folder.iterdir()}
    again = write(tmp_path / "out")
    assert again.before and not before.before
    assert {path: path.stat().st_mtime_ns for path in before.folder.iterdir()} == times


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    written = Output.write
    count = 0

    def fail(*arguments: Any, **more: Any) -> int:
        nonlocal count
        count += 1
        if count == 20:
            raise KeyboardInterrupt
        return written(*arguments, **more)

    monkeypatch.setattr(Output, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_that_of_a_living_one_is_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".out.{ended.pid}.part").mkdir()
    living = tmp_path / f".out.{os.getppid()}.part"
    living.mkdir()
    write(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "out"])


def test_the_disk_is_checked_before_the_first_byte(tmp_path, monkeypatch):
    nbytes = write(tmp_path / "whole").nbytes
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda folder: SimpleNamespace(free=nbytes - 1))
    with pytest.raises(RequestError) as error:
        write(tmp_path / "out")
    assert str(error.value) == (
        f"{tmp_path}/out: {size(nbytes)} are needed, but only {size(nbytes - 1)} are free on this disk; "
        "choose another folder, or fewer --layers"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def _file(folder: Path) -> None:
    folder.write_text("")


def _others(folder: Path) -> None:
    folder.mkdir()
    (folder / "b").touch()
    (folder / "a").touch()


def _another(folder: Path) -> None:
    write(folder, seed=9)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_file, "{}: is a file; the result needs a folder"),
        (_others, "{}: holds other files, a among them; choose a new folder, or delete this one"),
        (_another, "{}: holds another synthetic checkpoint; choose a new folder, or delete this one"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(tmp_path, prepare: Callable[[Path], None], message):
    folder = tmp_path / "out"
    prepare(folder)
    before = content(folder) if folder.is_dir() else None
    with pytest.raises(RequestError) as error:
        write(folder)
    assert str(error.value) == message.format(folder)
    assert before is None or content(folder) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as error:
        write(tmp_path / "file" / "out")
    assert str(error.value) == f"{tmp_path}/file/out: cannot be written: File exists"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nothing", {}, "nothing: no such file; expected a config.json, or one of flagship, small"),
        ("small", {"layers": 0}, "--layers: expected an integer from 1, got 0"),
        ("small", {"experts": 4}, "config.json: text_config: num_experts_per_tok: 8 of only 4 experts"),
        (
            "dense",
            {"experts": 4},
            "--experts: {} has no num_experts or num_local_experts that it could change",
        ),
    ],
)
def test_a_shape_that_cannot_be_is_refused(tmp_path, name, changes, message):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config(FAMILIES["qwen3_5"])))
    with pytest.raises(MoelocalError) as error:
        synthetic.shape(file if name == "dense" else name, changes)
    assert str(error.value) == message.format(file)


# the command


def test_with_the_tokenizer_texts_work(tmp_path, capsys):
    arguments = [f"--{flag.replace('_', '-')}={n}" for flag, n in TINY.items() if flag != "vocab"]
    status = synthetic.main(["flagship", str(tmp_path / "out"), *arguments, "--tokenizer", "--json"])
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0 and facts["folder"] == str(tmp_path / "out") and not facts["before"]
    model = moelocal.load(facts["folder"], progress=False)
    done = moelocal.generate(model, "Hello!", max_tokens=5, seed=1)
    assert 1 <= len(done.tokens) <= 5 and model.stop_tokens == moelocal.load(progress=False).stop_tokens


def test_a_vocabulary_that_is_too_small_for_the_tokenizer_is_refused(tmp_path, capsys):
    least = max(moelocal.load(progress=False).tokenizer.tokens) + 1
    assert synthetic.main(["small", str(tmp_path / "out"), "--tokenizer", "--vocab", "300"]) == 1
    assert capsys.readouterr().err == (
        f"moelocal: error: --vocab: the embedded tokenizer needs at least {least}, got 300\n"
    )


def test_bits_and_a_recipe_at_once_are_refused(tmp_path, capsys):
    assert synthetic.main(["small", str(tmp_path / "out"), "--bits", "4", "--recipe", "fast"]) == 1
    assert capsys.readouterr().err == (
        "moelocal: error: --bits: is instead of a recipe; leave one of the two out\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import synthetic, sides\n"
        "raw = synthetic.shape('flagship', {'layers': int(sys.argv[3]), 'vocab': 1000})\n"
        "done = synthetic.write(raw, sys.argv[2], synthetic.recipe_of(None))\n"
        "print(done.nbytes, sides.most_resident())"
    )
    found = []
    for layers in ("1", "3"):
        arguments = [str(ROOT / "benchmarks"), str(tmp_path / layers), layers]
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
        )
        found.append([int(word) for word in done.stdout.split()])
    # three layers are 900 MB more; a block is 32 MB, of which some are held at once
    assert found[1][0] - found[0][0] > 800e6
    assert found[1][1] < found[0][1] + 50e6 and found[1][1] < 400e6
