"""One model in every form that a checkpoint takes on disk: the logits must be the same, bit for bit where the
arithmetic is the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from parity.checkpoints import SMALL, Recipe, encode_all, tokens, weights, write
from parity.ours import Ours, assert_same
from parity.storage import read_tensors, write_shards, write_tensors

LENGTH = 40


def logits(folder: Path) -> np.ndarray:
    return Ours(folder).logits(tokens(LENGTH, 96))


def stored(folder: Path) -> dict:
    return read_tensors(sorted(folder.glob("model*.safetensors")))


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_shards_do_not_matter(tmp_path, shards):
    recipe = Recipe("qwen3_5_moe", **SMALL)
    one = logits(write(tmp_path / "one", recipe, shards=1))
    assert np.array_equal(logits(write(tmp_path / "many", recipe, shards)), one)


def test_loading_twice_gives_the_same_and_changes_no_file(tmp_path):
    folder = write(tmp_path / "model", Recipe("qwen3_5_moe", **SMALL))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert np.array_equal(logits(folder), logits(folder))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_experts_one_by_one_equal_fused_ones(tmp_path):
    fused = logits(write(tmp_path / "fused", Recipe("qwen3_5_moe", **SMALL)))
    assert np.array_equal(
        logits(write(tmp_path / "single", Recipe("qwen3_5_moe", **SMALL, per_expert=True))), fused
    )


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_5"])
def test_the_text_only_layout_equals_the_wrapper(tmp_path, family):
    # a tensor's values come from its name, so the text-only folder is the wrapper's, renamed
    wrapper = Recipe(family, **SMALL)
    expected = logits(write(tmp_path / "wrapper", wrapper))
    folder = write(tmp_path / "text", Recipe(family, **SMALL, text_only=True))
    renamed = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in stored(tmp_path / "wrapper").items()
        if "visual" not in name
    }
    write_shards(folder, renamed, 3)
    assert np.array_equal(logits(folder), expected)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_next"])
def test_mtp_and_vision_tensors_do_not_change_the_text(tmp_path, family):
    with_mtp = logits(write(tmp_path / "with", Recipe(family, **SMALL)))
    assert np.array_equal(logits(write(tmp_path / "without", Recipe(family, **SMALL, mtp=False))), with_mtp)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_moe"])
def test_new_config_keys_equal_the_old_ones(tmp_path, family):
    folder = write(tmp_path / "model", Recipe(family, **SMALL))
    expected = logits(folder)
    config = json.loads((folder / "config.json").read_text())
    # as transformers 5 writes it
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    if family == "qwen3_next":
        config["rope_parameters"]["partial_rotary_factor"] = config.pop("partial_rotary_factor")
        config["layer_types"] = ["linear_attention"] * 3 + ["full_attention"]
        del config["full_attention_interval"]
    config["num_local_experts"] = config.pop("num_experts")
    del config["rope_scaling"]
    (folder / "config.json").write_text(json.dumps(config))
    assert np.array_equal(logits(folder), expected)


def test_layer_types_decide_over_the_interval(tmp_path):
    recipe = Recipe("qwen3_5", **SMALL, layers=4)
    folder = write(tmp_path / "model", recipe)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["full_attention_interval"] == 4
    expected = logits(folder)
    config["text_config"]["full_attention_interval"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    assert np.array_equal(logits(folder), expected)


def test_a_copy_of_the_embedding_as_the_head_of_a_tied_model_is_no_error(tmp_path):
    recipe = Recipe("qwen3_5", **SMALL, tied=True)
    folder = write(tmp_path / "model", recipe, shards=1)
    expected = logits(folder)
    tensors = stored(folder)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    write_tensors(folder / "model.safetensors", tensors)
    assert np.array_equal(logits(folder), expected)


def converted_by_hand(source: Recipe) -> dict[str, np.ndarray]:
    """The tensors of a fused qwen3_5_moe in the MLX format: norms with their 1, other names and axes."""
    result: dict[str, np.ndarray] = {}
    shifted = ("input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight",
               "language_model.norm.weight")  # fmt: skip
    for name, array in weights(source).items():
        if "visual" in name or name.startswith("mtp."):
            continue
        ours = name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head", "language_model.lm_head"
        )
        if name.endswith(shifted):
            result[ours] = array + np.float32(1)
        elif name.endswith("conv1d.weight"):
            result[ours] = array.swapaxes(1, 2)
        elif name.endswith("experts.gate_up_proj"):
            gate, up = np.split(array, 2, axis=1)
            result[ours.replace("experts.gate_up_proj", "switch_mlp.gate_proj.weight")] = gate
            result[ours.replace("experts.gate_up_proj", "switch_mlp.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            result[ours.replace("experts.down_proj", "switch_mlp.down_proj.weight")] = array
        else:
            result[ours] = array
    return result


@pytest.mark.parametrize("mtp", [None, "mtp.", "language_model.mtp."])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_converted_checkpoint_equals_the_raw_one_with_or_without_mtp(tmp_path, mtp, shift):
    # mlx-lm 4eeaf209 added 1 to norms again wherever MTP tensors were present (ml-explore/mlx-lm#1623)
    recipe = Recipe("qwen3_5_moe", **SMALL)
    expected = logits(write(tmp_path / "raw", recipe))
    folder = write(tmp_path / "converted", recipe, shards=1)
    tensors = converted_by_hand(recipe)
    for name, array in weights(recipe).items():
        if mtp and name.startswith("mtp."):
            tensors[mtp + name.removeprefix("mtp.")] = array + np.float32(shift if "norm" in name else 0)
    write_tensors(folder / "model.safetensors", encode_all(tensors))
    assert np.array_equal(logits(folder), expected)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("qwen3_5_moe", **SMALL),
        Recipe("qwen3_5_moe", **SMALL, text_only=True),
        Recipe("qwen3_5_moe", **SMALL, per_expert=True),
        Recipe("qwen3_5", **SMALL),
        Recipe("qwen3_5", **SMALL, tied=True),
        Recipe("qwen3_next", **SMALL),
        Recipe("qwen3_moe", **SMALL),
    ],
    ids=lambda r: f"{r.family}{'-text' * r.text_only}{'-per-expert' * r.per_expert}{'-tied' * r.tied}",
)
def test_what_transformers_saves_equals_what_it_loaded(tmp_path, recipe, originals):
    raw = write(tmp_path / "raw", recipe)
    original = originals(raw)
    saved = original.save(tmp_path / "saved")
    assert np.array_equal(logits(saved), logits(raw))
    assert_same(logits(saved), original.logits(tokens(LENGTH, 96)))


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_5", "qwen3_next", "qwen3_moe"])
def test_what_mlx_lm_converts_equals_the_raw_checkpoint(tmp_path, family):
    from parity.originals import convert

    raw = write(tmp_path / "raw", Recipe(family, **SMALL))
    converted = convert(raw, tmp_path / "converted")
    again = convert(converted, tmp_path / "again")
    assert np.array_equal(logits(converted), logits(raw))
    assert np.array_equal(logits(again), logits(raw))
