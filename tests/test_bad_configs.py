"""config.json files that are broken, contradict themselves or describe a model that we do not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moelocal
from damage import HYBRID, assert_fails, change_config
from moelocal.errors import CheckpointError, ConfigError, UnsupportedModel
from parity.checkpoints import write


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    return write(tmp_path / "model", HYBRID, shards=1)


@pytest.mark.parametrize(
    ("text", "found"), [("[]", "list"), ("7", "int"), ('"x"', "str"), ("null", "NoneType")]
)
def test_a_config_that_is_no_object(single, text, found):
    (single / "config.json").write_text(text)
    assert_fails(single, ConfigError, f"{{folder}}/config.json: expected a JSON object, got {found}")


@pytest.mark.parametrize("text", ["{", "", "\xff", '{"a": ' * 100_000])
def test_a_config_that_is_no_json(single, text):
    (single / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON: "):
        moelocal.load(str(single))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"hidden_act": "gelu"}, UnsupportedModel, "hidden_act: only 'silu' is supported, got 'gelu'"),
        (
            {"output_gate_type": "sigmoid"},
            UnsupportedModel,
            "output_gate_type: only 'swish' is supported, got 'sigmoid'",
        ),
        ({"attention_bias": True}, UnsupportedModel, "attention_bias: only False is supported, got True"),
        (
            {"attn_output_gate": False},
            UnsupportedModel,
            "attn_output_gate: False is not supported for qwen3_5_moe",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}},
            UnsupportedModel,
            "rope_parameters: rope_type: only 'default' and 'yarn' are supported, got 'llama3'",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "high_freq_factor": 4}},
            UnsupportedModel,
            "rope_parameters: unknown key 'high_freq_factor'",
        ),
        (
            {"layer_types": ["sliding_attention"] * 4},
            UnsupportedModel,
            "layer_types: expected one of ['full_attention', 'linear_attention'], got 'sliding_attention'",
        ),
        (
            {"layer_types": ["full_attention"]},
            ConfigError,
            "layer_types: expected a list of 4 names, got ['full_attention']",
        ),
        (
            {"qk_clip": 8.0},
            UnsupportedModel,
            "qk_clip: unknown key (value 8.0); it may change the model. "
            "If it does not, remove it from config.json",
        ),
        ({"hidden_size": "32"}, ConfigError, "hidden_size: expected an integer of at least 1, got '32'"),
        ({"hidden_size": None}, ConfigError, "hidden_size: expected an integer of at least 1, got None"),
        (
            {"num_hidden_layers": 0},
            ConfigError,
            "num_hidden_layers: expected an integer of at least 1, got 0",
        ),
        ({"rms_norm_eps": -1}, ConfigError, "rms_norm_eps: expected a positive number, got -1"),
        ({"num_experts_per_tok": 9}, ConfigError, "num_experts_per_tok: 9 of only 4 experts"),
        (
            {"num_key_value_heads": 3},
            ConfigError,
            "num_attention_heads: 4 is no multiple of 3 key-value heads",
        ),
        (
            {"linear_num_value_heads": 3, "linear_num_key_heads": 2},
            ConfigError,
            "linear_num_value_heads: 3 is no multiple of 2 key heads",
        ),
        ({"eos_token_id": "x"}, ConfigError, "eos_token_id: expected a token id or a list of them, got 'x'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unsupported_or_impossible_config_value(single, change, kind, message):
    change_config(single, lambda text: text.update(change))
    assert_fails(single, kind, f"config.json: text_config: {message}")


def test_an_unknown_model_type(single):
    config = json.loads((single / "config.json").read_text()) | {"model_type": "qwen4_exp"}
    (single / "config.json").write_text(json.dumps(config))
    assert_fails(
        single,
        UnsupportedModel,
        "config.json: model_type: 'qwen4_exp' is not supported; "
        "supported: qwen3_5_moe, qwen3_5, qwen3_next, qwen3_moe",
    )


def test_weights_of_another_size_than_the_config_says(single):
    change_config(single, lambda text: text.update(hidden_size=48))
    assert_fails(
        single,
        CheckpointError,
        "{folder}: model.language_model.embed_tokens.weight: "
        "expected float32 or float16 or bfloat16 [96, 48], got float32 [96, 32]",
    )
