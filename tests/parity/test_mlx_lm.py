"""Logits against mlx-lm on the same files: unquantized, and in every packed format that it writes.

Both sides compute in float32 (mlx-lm's floating-point values are cast after loading), so that the packed
codes, scales and biases are the same numbers and the difference is rounding only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moelocal.errors import CheckpointError
from parity.checkpoints import Recipe, tokens
from parity.ours import Ours, assert_same

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

LENGTH = 75
MOE = Recipe("qwen3_5_moe")
FAMILIES = {
    "qwen3_5_moe": MOE,
    "qwen3_5_moe bfloat16": Recipe("qwen3_5_moe", dtype="BF16"),
    "qwen3_5 tied": Recipe("qwen3_5", tied=True),
    "qwen3_5 untied": Recipe("qwen3_5"),
    "qwen3_next": Recipe("qwen3_next"),
    "qwen3_moe": Recipe("qwen3_moe"),
}
FORMATS = [
    *({"bits": bits, "group_size": group} for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    {"bits": 4, "group_size": 16, "mode": "nvfp4"},
]


def name_of(spec: dict[str, Any]) -> str:
    return f"{spec.get('mode', 'affine')}-{spec['bits']}-g{spec['group_size']}"


def assert_equal_on(folder: Path, recipe: Recipe) -> None:
    from parity.originals import MlxLm

    sequence = tokens(LENGTH, recipe.vocab)
    theirs, ours = MlxLm(folder), Ours(folder)
    assert_same(ours.logits(sequence), theirs.logits(sequence))
    assert_same(ours.chunked(sequence, [33, 1, 30]), theirs.stepwise(sequence, 64))


@pytest.mark.parametrize("family", [name for name in FAMILIES if "bfloat16" not in name])
def test_the_raw_checkpoint(raw, family):
    # bfloat16 is left out: mlx-lm rounds 1 + w to bfloat16 when it reads a raw checkpoint, we do not
    recipe = FAMILIES[family]
    assert_equal_on(raw(recipe), recipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_checkpoint(raw, tmp_path, family):
    from parity.originals import convert

    recipe = FAMILIES[family]
    assert_equal_on(convert(raw(recipe), tmp_path / "mlx"), recipe)


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_every_packed_format(raw, tmp_path, spec):
    from parity.originals import convert

    # mlx-lm's own predicate keeps both gates at 8 bits, so there are entries per tensor too
    assert_equal_on(convert(raw(MOE), tmp_path / "mlx", spec), MOE)


@pytest.mark.parametrize("spec", [FORMATS[7], *FORMATS[-3:]], ids=name_of)
@pytest.mark.parametrize("family", list(FAMILIES)[1:])
def test_every_family_packed(raw, tmp_path, family, spec):
    from parity.originals import convert

    recipe = FAMILIES[family]
    assert_equal_on(convert(raw(recipe), tmp_path / "mlx", spec), recipe)


def recipe_mixed(path: str, _: Any) -> bool | dict[str, Any]:
    """Five formats in one layer, and some paths left as they are: what `quant_predicate` functions return."""
    if path.endswith(("mlp.gate", "shared_expert_gate", "in_proj_a", "in_proj_b")):
        return False
    for name, bits, group in (
        ("down_proj", 5, 32),
        ("out_proj", 8, 128),
        ("q_proj", 3, 64),
        ("lm_head", 6, 64),
    ):
        if path.endswith(name):
            return {"bits": bits, "group_size": group, "mode": "affine"}
    return True


def recipe_by_layer(path: str, _: Any) -> bool | dict[str, Any]:
    """Neighbouring projections in different formats, so that none can be fused with the next."""
    if "layers.1." in path or "layers.3." in path:
        if path.endswith(("in_proj_z", "k_proj", "up_proj")):
            return {"bits": 6, "group_size": 64}
        if path.endswith(("in_proj_qkv", "gate_proj", "v_proj")):
            return {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    return not path.endswith("embed_tokens")


def recipe_eight_bits_in_groups_of_32(path: str, _: Any) -> bool | dict[str, Any]:
    """Entries without a mode mean affine, even where the default is mxfp8 with that very size."""
    return {"bits": 8, "group_size": 32} if path.endswith(("o_proj", "mlp.gate")) else True


@pytest.mark.parametrize("predicate", [recipe_mixed, recipe_by_layer, recipe_eight_bits_in_groups_of_32])
@pytest.mark.parametrize("spec", [FORMATS[7], *FORMATS[-3:]], ids=name_of)
def test_mixed_precision(raw, tmp_path, spec, predicate: Callable[..., Any]):
    from parity.originals import convert

    assert_equal_on(convert(raw(MOE), tmp_path / "mlx", spec, predicate), MOE)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model."])
def test_entries_set_to_false_as_lm_studio_writes_them(raw, tmp_path, prefix):
    from parity.originals import convert

    folder = convert(raw(MOE), tmp_path / "mlx", FORMATS[7], recipe_mixed)
    config = json.loads((folder / "config.json").read_text())
    plan = config["quantization"]
    left_alone = [f"layers.{i}.mlp.{gate}" for i in range(4) for gate in ("gate", "shared_expert_gate")]
    left_alone += [f"layers.{i}.linear_attn.in_proj_{x}" for i in range(3) for x in "ab"]
    assert not any(f"language_model.model.{path}" in plan for path in left_alone), (
        "mlx-lm writes no such entries"
    )
    plan |= {prefix + path: False for path in left_alone}
    config["quantization"] = config["quantization_config"] = plan
    (folder / "config.json").write_text(json.dumps(config))
    assert_equal_on(folder, MOE)


def test_entries_without_a_packed_tensor_and_the_reverse_are_errors(raw, tmp_path):
    from parity.originals import convert

    folder = convert(raw(MOE), tmp_path / "mlx", FORMATS[7], recipe_mixed)
    config = json.loads((folder / "config.json").read_text())
    path = "language_model.model.layers.0.mlp.shared_expert.up_proj"
    config["quantization"][path] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.shared_expert\.up_proj: config\.json says None"
    ):
        Ours(folder)
