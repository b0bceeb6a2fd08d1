"""Recipes: what the files mean, which format every matrix gets, and what is refused."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig
from moelocal.errors import ConfigError
from moelocal.formats import QuantSpec
from moelocal.model import Decoder
from moelocal.quantize.recipe import (
    BUILT_IN,
    CLASSES,
    FAMILIES,
    Recipe,
    class_of,
    from_the_edges,
    layer_of,
    misfits,
)
from moelocal.quantize.sizes import shapes_of
from parity.checkpoints import SMALL, config, write
from parity.checkpoints import Recipe as Model

FAMILY_NAMES = ("qwen3_5_moe", "qwen3_5", "qwen3_next", "qwen3_moe")


def recipe(tmp_path, text: str) -> Recipe:
    (tmp_path / "mine.toml").write_text(text)
    return Recipe.open(tmp_path / "mine.toml")


def model(family: str = "qwen3_5_moe", **changes) -> tuple[ModelConfig, dict[str, tuple[int, ...]]]:
    found = ModelConfig.parse(config(Model(family, **changes)))
    return found, shapes_of(found)


def test_the_built_in_recipes_are_the_files_of_the_package():
    folder = files("moelocal.quantize") / "recipes"
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{name}.toml" for name in BUILT_IN)
    for name in BUILT_IN:
        found = Recipe.open(name)
        # 40 columns are what `inspect` has for it on a terminal of 100
        assert found.name == name and 0 < len(found.summary) <= 40
        assert found.misfit in ("smaller", "keep")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_plan_has_every_matrix_that_the_network_takes_and_nothing_else(tmp_path, family):
    folder = write(tmp_path / "model", Model(family, **SMALL))
    checkpoint = Checkpoint.open(folder, ModelConfig.read(folder))
    Decoder(checkpoint, checkpoint.compute_dtype, evaluate=False)
    shapes = {name: source.shape for name, source in checkpoint.sources.items()}
    assert set(Recipe.open("balanced").plan(checkpoint.config, shapes)) == set(checkpoint.formats)


def test_what_is_no_matrix_has_no_class():
    _, shapes = model()
    names = {
        re.sub(r"layers\.\d+\.", "", name)
        for name in shapes
        if class_of(name.removesuffix(".weight")) is None
    }
    assert names == {
        "input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight",
        "self_attn.q_norm.weight", "self_attn.k_norm.weight",
        "linear_attn.norm.weight", "linear_attn.conv1d.weight", "linear_attn.A_log", "linear_attn.dt_bias",
    }  # fmt: skip
    assert class_of("layers.0.mlp.switch_mlp.gate_proj") == "experts.gate"
    assert class_of("layers.0.mlp.gate") == "router"
    assert class_of("layers.0.mlp.gate_proj") == "dense.gate"
    found = {class_of(n.removesuffix(".weight")) for f in FAMILY_NAMES for n in model(f)[1]}
    assert found - {None} == set(CLASSES)


def test_each_rule_reaches_its_class(tmp_path):
    # a format of its own for one class after another: that class changes and no other
    found, shapes = model()
    plain = recipe(tmp_path, "[formats]\ndefault = { bits = 4 }").plan(found, shapes)
    for kind in CLASSES:
        text = f"[formats]\ndefault = {{ bits = 4 }}\n{kind} = {{ bits = 8, group = 32 }}"
        plan = recipe(tmp_path, text).plan(found, shapes)
        changed = {path for path in plan if plan[path] != plain[path]}
        assert changed == {path for path in plan if class_of(path) == kind}
        assert {plan[path] for path in changed} <= {QuantSpec(8, 32)}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family_is_short_for_all_its_classes(tmp_path, family):
    short = f'[formats]\ndefault = {{ bits = 4 }}\n{family} = "keep"'
    long = "[formats]\ndefault = { bits = 4 }\n" + "\n".join(
        f'{family}.{p} = "keep"' for p in FAMILIES[family]
    )
    assert recipe(tmp_path, short).digest == recipe(tmp_path, long).digest
    assert recipe(tmp_path, short).digest != recipe(tmp_path, "[formats]\ndefault = { bits = 4 }").digest


@given(st.sets(st.integers(0, 200)))
def test_layers_are_taken_from_both_ends_inwards(layers):
    ordered = from_the_edges(list(layers))
    assert sorted(ordered) == sorted(layers)
    rest = sorted(layers)
    for index, layer in enumerate(ordered):
        assert layer == rest.pop(-1 if index % 2 else 0)


@pytest.mark.parametrize(
    ("share", "layers", "expected"),
    [(0.6, 4, {0, 3}), (0.5, 5, {0, 1, 4}), (1, 4, {0, 1, 2, 3}), (0.01, 4, set()), (0.25, 8, {0, 7})],
)
def test_a_share_of_the_layers(tmp_path, share, layers, expected):
    found, shapes = model(layers=layers)
    rules = (
        f"default = {{ bits = 4 }}\nexperts.down = {{ bits = 4, edges = {{ bits = 5, share = {share} }} }}"
    )
    plan = recipe(tmp_path, f"[formats]\n{rules}").plan(found, shapes)
    assert {layer_of(path) for path, spec in plan.items() if spec == QuantSpec(5, 64)} == expected


def test_edges_are_counted_among_the_layers_that_have_the_matrix(tmp_path):
    # of eight layers 3 and 7 have attention: half of these is 3, the first
    found, shapes = model(layers=8)
    rules = (
        "default = { bits = 4 }\nattention.o = { bits = 4, group = 32, edges = { bits = 8, share = 0.5 } }"
    )
    plan = recipe(tmp_path, f"[formats]\n{rules}").plan(found, shapes)
    assert plan["layers.3.self_attn.o_proj"] == QuantSpec(8, 32)
    assert plan["layers.7.self_attn.o_proj"] == QuantSpec(4, 32)


def test_a_tied_embedding_gets_the_better_of_two_formats(tmp_path):
    found, shapes = model(tied=True)
    for embedding, head, expected in (
        ("{ bits = 4 }", "{ bits = 6 }", QuantSpec(6, 64)),
        ("{ bits = 6 }", "{ bits = 4 }", QuantSpec(6, 64)),
        ("{ bits = 4 }", "{ bits = 4, group = 32 }", QuantSpec(4, 32)),
        ('"keep"', "{ bits = 8 }", None),
    ):
        text = f"[formats]\ndefault = {{ bits = 4 }}\nembedding = {embedding}\nhead = {head}"
        plan = recipe(tmp_path, text).plan(found, shapes)
        assert plan["embed_tokens"] == expected
        assert "lm_head" not in plan


def test_what_the_group_does_not_divide(tmp_path):
    # columns: experts.down 96, shared.down 48, everything else a multiple of 64
    found, shapes = model(width=96, shared_width=48)
    rules = "[formats]\ndefault = { bits = 4, group = 64 }"
    down, shared = "layers.0.mlp.switch_mlp.down_proj", "layers.0.mlp.shared_expert.down_proj"

    smaller = recipe(tmp_path, f'misfit = "smaller"\n{rules}')
    plan = smaller.plan(found, shapes)
    assert plan[down] == QuantSpec(4, 32) and plan[shared] is None
    assert misfits(plan, smaller) == [f"layers.{i}.mlp.shared_expert.down_proj" for i in range(4)]

    kept = recipe(tmp_path, f'misfit = "keep"\n{rules}')
    plan = kept.plan(found, shapes)
    assert plan[down] is None and plan[shared] is None
    assert len(misfits(plan, kept)) == 8

    with pytest.raises(ConfigError) as error:
        recipe(tmp_path, rules).plan(found, shapes)
    assert str(error.value) == (
        "recipe mine: layers.0.mlp.switch_mlp.down_proj: groups of 64 do not divide its 96 columns; "
        'choose another group, "keep", or misfit = "smaller"'
    )


def test_what_a_recipe_keeps_is_no_misfit(tmp_path):
    found, shapes = model(shared_width=48)
    kept = recipe(tmp_path, '[formats]\ndefault = { bits = 4, group = 32 }\nshared.down = "keep"')
    assert misfits(kept.plan(found, shapes), kept) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("formats = 1", "formats: expected a table of formats by class, got 1"),
        ("", "formats: expected a table of formats by class, got None"),
        ("[formats]", "formats.default: missing; it is the format of what has no other"),
        ("sumary = ''", "sumary: unknown key; expected one of summary, misfit, formats"),
        ("summary = 3", "summary: expected one line of text, got 3"),
        ("misfit = 'crash'", "misfit: expected \"error\", \"smaller\" or \"keep\", got 'crash'"),
        ("[formats]\ndefault = 4", "formats.default: expected \"keep\" or { bits = …, group = … }, got 4"),
        (
            "[formats]\ndefault = { bits = 4 }\nexpert = { bits = 4 }",
            "formats.expert: unknown key; expected one of default, embedding, head, router, shared_gate, attention, "
            "delta, shared, experts, dense",
        ),
        (
            "[formats]\ndefault = { bits = 4 }\nexperts.dwn = { bits = 4 }",
            "formats.experts.dwn: unknown key; expected one of gate, up, down",
        ),
        ("[formats]\ndefault = { bits = 7 }", "formats.default.bits: expected one of 2, 3, 4, 5, 6, 8, got 7"),
        ("[formats]\ndefault = { bits = 4.0 }", "formats.default.bits: expected one of 2, 3, 4, 5, 6, 8, got 4.0"),
        ("[formats]\ndefault = { group = 64 }", "formats.default.bits: expected one of 2, 3, 4, 5, 6, 8, got None"),
        ("[formats]\ndefault = { bits = 4, group = 16 }", "formats.default.group: expected one of 32, 64, 128, got 16"),
        (
            "[formats]\ndefault = { bits = 4, mode = 'mxfp4' }",
            "formats.default.mode: unknown key; expected one of bits, group",
        ),
        (
            "[formats]\ndefault = { bits = 4 }\nhead = { bits = 4, edges = { bits = 5, share = 0.5 } }",
            "formats.head.edges: unknown key; expected one of bits, group",
        ),
        (
            "[formats]\ndefault = { bits = 4 }\nrouter = { bits = 4, edges = 5 }",
            "formats.router.edges: expected { bits = …, share = … }, got 5",
        ),
        (
            "[formats]\ndefault = { bits = 4 }\nexperts = { bits = 4, edges = { bits = 5 } }",
            "formats.experts.edges.share: expected a share of the layers above 0 and up to 1, got None",
        ),
        (
            "[formats]\ndefault = { bits = 4 }\nexperts = { bits = 4, edges = { bits = 5, share = 1.5 } }",
            "formats.experts.edges.share: expected a share of the layers above 0 and up to 1, got 1.5",
        ),
        (
            "[formats]\ndefault = { bits = 4 }\nexperts = { bits = 4, edges = { bits = 5, share = nan } }",
            "formats.experts.edges.share: expected a share of the layers above 0 and up to 1, got nan",
        ),
        (
            "[formats]\ndefault = { bits = 4 }\nexperts = { bits = 4, up = { bits = 5 } }",
            "formats.experts.up: unknown key; expected one of bits, group, edges",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        recipe(tmp_path, text)
    assert str(error.value) == f"{tmp_path}/mine.toml: {message}"


def test_files_that_are_no_recipe(tmp_path):
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    (tmp_path / "half.toml").write_text("[formats")
    for name in ("bad", "half"):
        with pytest.raises(ConfigError, match=f"^{tmp_path}/{name}.toml: not valid TOML: "):
            Recipe.open(tmp_path / f"{name}.toml")
    for name in ("balancd", "~nobody-here/mine.toml", "a\0b", str(tmp_path), ""):
        with pytest.raises(ConfigError) as error:
            Recipe.open(name)
        assert str(error.value) == (
            f"{name}: no such recipe; expected one of 4bit, fast, balanced, quality, small, 8bit, "
            "or the name of a recipe file"
        )
    long = "x" * 5000
    with pytest.raises(ConfigError) as error:
        Recipe.open(long)
    assert str(error.value) == f"{long}: cannot be read: File name too long"


def test_the_digest_is_of_the_meaning(tmp_path):
    first = recipe(tmp_path, "[formats]\ndefault = { bits = 4 }").digest
    same = recipe(
        tmp_path, 'summary = "x" # note\n[formats]\ndefault = { group = 64, bits = 4 }\nhead = { bits = 4 }'
    )
    assert same.digest == first and re.fullmatch("[0-9a-f]{64}", first)
    others = {
        recipe(tmp_path, text).digest
        for text in (
            "[formats]\ndefault = { bits = 5 }",
            "[formats]\ndefault = { bits = 4, group = 32 }",
            'misfit = "keep"\n[formats]\ndefault = { bits = 4 }',
            '[formats]\ndefault = { bits = 4 }\nhead = "keep"',
            "[formats]\ndefault = { bits = 4 }\nrouter = { bits = 4, edges = { bits = 5, share = 0.5 } }",
            "[formats]\ndefault = { bits = 4 }\nrouter = { bits = 4, edges = { bits = 5, share = 0.6 } }",
        )
    } | {Recipe.open(name).digest for name in BUILT_IN}
    assert len(others) == 6 + len(BUILT_IN) and first not in others


def test_the_page_about_formats(root, tmp_path):
    page = (root / "docs" / "formats.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert recipe(tmp_path, example).rules["attention.k"].spec == QuantSpec(6, 64)
    assert all(f"| `{name}` |" in page for name in BUILT_IN)
    # every class is named there
    listed = page[page.index("- The classes:") : page.index("A family alone")]
    for kind in CLASSES:
        family, _, part = kind.partition(".")
        assert f"`{kind}`" in listed or (f"`.{part}`" in listed and f"`{family}." in listed), kind


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_plain_4_bits_are_what_mlx_lm_writes(tmp_path, family):
    from parity.originals import convert

    # the experts' down projections have 96 columns: mlx-lm leaves them as they are
    source = write(tmp_path / "source", Model(family, width=96))
    target = convert(source, tmp_path / "target", {"group_size": 64, "bits": 4})
    written = Checkpoint.open(target, ModelConfig.read(target))
    Decoder(written, written.compute_dtype, evaluate=False)
    found = ModelConfig.read(source)
    plan = Recipe.open("4bit").plan(found, shapes_of(found))
    assert {path: spec for path, spec in plan.items() if spec} == written.packed
    assert set(written.packed.values()) >= {QuantSpec(4, 64)}
    assert None in plan.values()
    assert json.loads((target / "config.json").read_text())["quantization"]["bits"] == 4
