"""Folders that are no model, or not the model that they claim to be: one clear error for each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import moelocal
from damage import HYBRID, LAYER, NEXT, assert_fails, change_tensors
from moelocal.errors import CheckpointError, ConfigError, ModelNotFound, TemplateError, TokenizerError
from parity.checkpoints import write
from parity.storage import Tensor, encode, read_tensors, write_file, write_tensors

SHARD = "model-00001-of-00002.safetensors"
F32 = {"dtype": "F32"}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two shards and an index."""
    return write(tmp_path / "model", HYBRID, shards=2)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    return write(tmp_path / "model", HYBRID, shards=1)


# --- files ---


def test_the_undamaged_checkpoints_load(sharded, tmp_path):
    assert moelocal.load(str(sharded)).config.architecture == "qwen3_5_moe"
    assert moelocal.load(str(write(tmp_path / "single", HYBRID, shards=1))).config.vocab == HYBRID.vocab


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(ModelNotFound, match=re.escape(str(tmp_path / "nowhere"))):
        moelocal.load(str(tmp_path / "nowhere"))


def test_an_empty_folder(tmp_path):
    assert_fails(tmp_path, ConfigError, "{folder}/config.json: not found; a model folder needs it")


def test_a_folder_without_weights(sharded):
    for file in sharded.glob("*.safetensors*"):
        file.unlink()
    assert_fails(
        sharded,
        CheckpointError,
        "{folder}: no model*.safetensors in this folder; is it a model folder?",
    )


def test_a_missing_shard(sharded):
    (sharded / SHARD).unlink()
    assert_fails(
        sharded,
        CheckpointError,
        f"{{folder}}/{SHARD}: missing; the index names it. Download the model again",
    )


def test_a_truncated_shard(sharded):
    content = (sharded / SHARD).read_bytes()
    (sharded / SHARD).write_bytes(content[: len(content) // 2])
    with pytest.raises(
        CheckpointError, match=r"ends at byte \d+ of only \d+: the file is cut off; download it again"
    ):
        moelocal.load(str(sharded))


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_a_header(single, size):
    (single / "model.safetensors").write_bytes(b"\0" * size)
    assert_fails(
        single,
        CheckpointError,
        f"{{folder}}/model.safetensors: only {size} bytes: cut off, or no safetensors file",
    )


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(single, length):
    (single / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    assert_fails(
        single,
        CheckpointError,
        f"{{folder}}/model.safetensors: header of {length} bytes in a file of 10 bytes: "
        "cut off, or no safetensors file",
    )


def test_a_header_that_is_no_json(single):
    write_file(single / "model.safetensors", b"{nonsense", b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: header is not valid JSON: "):
        moelocal.load(str(single))


@pytest.mark.parametrize(("header", "found"), [([], "list"), (7, "int"), (None, "NoneType"), ("x", "str")])
def test_a_header_that_is_no_object(single, header, found):
    write_file(single / "model.safetensors", header, b"")
    assert_fails(
        single,
        CheckpointError,
        f"{{folder}}/model.safetensors: header: expected a JSON object, got {found}",
    )


def test_a_tensor_that_claims_more_bytes_than_the_file_has(single):
    write_file(
        single / "model.safetensors",
        {"norm.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        b"\0" * 16,
    )
    assert_fails(
        single,
        CheckpointError,
        f"{{folder}}/model.safetensors: norm.weight: data ends at byte {1 << 42} of only 16: "
        "the file is cut off; download it again",
    )


@pytest.mark.parametrize("offsets", [[0, 8], [12, 28]])
def test_tensors_that_overlap_or_leave_a_gap(single, offsets):
    begin, end = offsets
    first, second = [0, 8], [4, 12] if begin == 0 else [12, 20]
    entry = {"dtype": "F32", "shape": [2]}
    write_file(
        single / "model.safetensors",
        {"a": entry | {"data_offsets": first}, "b": entry | {"data_offsets": second}},
        b"\0" * max(second[1], end),
    )
    assert_fails(
        single,
        CheckpointError,
        f"{{folder}}/model.safetensors: b: data starts at {second[0]}, expected 8: overlap or gap",
    )


def test_bytes_that_no_tensor_describes(single):
    with (single / "model.safetensors").open("ab") as stream:
        stream.write(b"\0" * 5)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: \d+ bytes of data, the header describes \d+"
    ):
        moelocal.load(str(single))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (7, "expected an object, got 7"),
        ({"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}, "unknown dtype 'F99'"),
        ({"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}, "unknown dtype ['F32']"),
        (
            {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
            "malformed shape [-4] or data_offsets [0, 16]",
        ),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0]}, "malformed shape [4] or data_offsets [0]"),
        (
            F32 | {"shape": [5], "data_offsets": [0, 16]},
            "F32 [5] takes 20 bytes, the header gives it 16",
        ),
        (
            F32 | {"shape": [4], "data_offsets": [16, 0]},
            "F32 [4] takes 16 bytes, the header gives it -16",
        ),
    ],
)
def test_a_malformed_tensor_entry(single, entry, message):
    write_file(single / "model.safetensors", {"norm.weight": entry}, b"\0" * 16)
    assert_fails(single, CheckpointError, f"{{folder}}/model.safetensors: norm.weight: {message}")


@pytest.mark.parametrize("value", [[], 7, {"a": 1}, None])
def test_an_index_without_a_map_of_files(sharded, value):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    assert_fails(
        sharded,
        CheckpointError,
        "{folder}/model.safetensors.index.json: weight_map: expected an object of file names",
    )


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "..", "a/b.safetensors", "", "model.bin"]
)
def test_an_index_that_names_no_weight_file_of_this_folder(sharded, name):
    index = "model.safetensors.index.json"
    (sharded / index).write_text(json.dumps({"weight_map": {"norm.weight": name}}))
    assert_fails(
        sharded,
        CheckpointError,
        f"{{folder}}/{index}: weight_map: {name!r} is not the name of a safetensors file",
    )


def test_a_tensor_in_two_files(sharded):
    names = [file.name for file in sorted(sharded.glob("*.safetensors"))]
    first = read_tensors([sharded / names[0]])
    second = read_tensors([sharded / names[1]])
    name = next(iter(first))
    write_tensors(sharded / names[1], second | {name: first[name]})
    assert_fails(sharded, CheckpointError, f"{{folder}}/{names[1]}: {name} is also in {names[0]}")


# --- tensors ---


def test_a_missing_tensor(single):
    change_tensors(single, lambda t: t.pop(LAYER + "linear_attn.dt_bias"))
    assert_fails(single, CheckpointError, "{folder}: tensor layers.0.linear_attn.dt_bias is missing")


def test_a_missing_expert(tmp_path):
    folder = write(tmp_path / "model", NEXT, shards=1)
    change_tensors(folder, lambda t: t.pop("model.layers.0.mlp.experts.1.up_proj.weight"))
    assert_fails(folder, CheckpointError, "layers.0.mlp.switch_mlp.up_proj.weight: expert 1 is missing")


def test_an_expert_of_another_shape(tmp_path):
    folder = write(tmp_path / "model", NEXT, shards=1)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    change_tensors(folder, lambda t: t.update({name: encode(np.zeros((32, 16)))}))
    assert_fails(
        folder,
        CheckpointError,
        f"{name} (expert 2): expected [32, 32] as expert 0, got [32, 16]",
    )


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (LAYER + "input_layernorm.weight", (31,), "[32]"),
        (LAYER + "linear_attn.in_proj_z.weight", (32, 31), "[32, 32]"),
        (LAYER + "linear_attn.conv1d.weight", (64, 4), "[64, 4, 1]"),
        (LAYER + "mlp.gate.weight", (5, 32), "[4, 32]"),
        (LAYER + "mlp.experts.down_proj", (4, 32, 31), "[4, 32, 32]"),
        ("lm_head.weight", (95, 32), "[96, 32]"),
    ],
)
def test_a_tensor_of_another_shape(single, name, shape, expected):
    change_tensors(single, lambda t: t.update({name: encode(np.zeros(shape))}))
    assert_fails(
        single,
        CheckpointError,
        f"{{folder}}: {name}: expected float32 or float16 or bfloat16 {expected}, got float32 {list(shape)}",
    )


def test_fused_experts_that_cannot_be_halved(single):
    name = LAYER + "mlp.experts.gate_up_proj"
    change_tensors(single, lambda t: t.update({name: encode(np.zeros((4, 63, 32)))}))
    assert_fails(single, CheckpointError, f"{name}: expected [experts, 2 x width, hidden], got [4, 63, 32]")


def test_an_interleaved_projection_of_another_shape(tmp_path):
    folder = write(tmp_path / "model", NEXT, shards=1)
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    change_tensors(folder, lambda t: t.update({name: encode(np.zeros((90, 32)))}))
    assert_fails(folder, CheckpointError, f"{name}: expected 96 rows, got [90, 32]")


def test_integers_where_values_belong(single):
    name = LAYER + "linear_attn.A_log"
    change_tensors(single, lambda t: t.update({name: ("U32", [2], b"\0" * 8)}))
    assert_fails(
        single,
        CheckpointError,
        f"{{folder}}: {name}: expected float32 or float16 or bfloat16 [2], got uint32 [2]",
    )


def test_a_dtype_that_no_model_of_these_families_has(single):
    name = LAYER + "mlp.gate.weight"
    change_tensors(single, lambda t: t.update({name: ("F8_E4M3", [4, 32], b"\0" * 128)}))
    assert_fails(
        single,
        CheckpointError,
        f"{{folder}}/model.safetensors: {name}: dtype F8_E4M3 is not supported; use the original checkpoint",
    )


def test_tensors_that_nobody_reads(single):
    change_tensors(single, lambda t: t.update({"model.layers.9.oops.weight": encode(np.zeros(3))}))
    assert_fails(
        single,
        CheckpointError,
        "{folder}: 1 tensors that this model has no place for: model.layers.9.oops.weight; "
        "config.json and the weights do not belong together",
    )


def test_a_head_that_a_tied_model_lacks_or_an_untied_one_has(single):
    change_tensors(single, lambda t: t.pop("lm_head.weight"))
    assert_fails(single, CheckpointError, "{folder}: tensor lm_head.weight is missing")


def test_one_tensor_under_two_names(single):
    change_tensors(single, lambda t: t.update({"model.norm.weight": t["model.language_model.norm.weight"]}))
    assert_fails(
        single,
        CheckpointError,
        "{folder}/model.safetensors: model.norm.weight and model.language_model.norm.weight "
        "are the same tensor",
    )


def test_packed_weights_that_the_config_does_not_mention(single):
    def pack(tensors: dict[str, Tensor]) -> None:
        name = LAYER + "mlp.shared_expert.up_proj."
        tensors[name + "weight"] = ("U32", [32, 4], b"\0" * 512)
        tensors[name + "scales"] = encode(np.zeros((32, 1)))
        tensors[name + "biases"] = encode(np.zeros((32, 1)))

    change_tensors(single, pack)
    assert_fails(
        single,
        CheckpointError,
        f"{LAYER}mlp.shared_expert.up_proj.scales: packed weights, but config.json has no quantization",
    )


# --- texts ---


def test_a_folder_without_tokenizer_files_evaluates_tokens_and_names_what_text_needs(single):
    model = moelocal.load(single)
    assert model(mx.array([[1, 2]])).shape == (1, 2, HYBRID.vocab)
    with pytest.raises(TemplateError) as caught:
        moelocal.generate(model, "Hello!")
    assert str(caught.value) == (
        f"{single}: no chat template in chat_template.jinja, chat_template.json or tokenizer_config.json; "
        "add the template of the original model, or pass plain text to continue (raw=True)"
    )
    with pytest.raises(TokenizerError) as caught:
        moelocal.generate(model, "Hello!", raw=True)
    assert str(caught.value) == (
        f"{single}: neither tokenizer.json nor tokenizer.model is there, so texts cannot be encoded; "
        "copy the tokenizer files of the original model into this folder"
    )
