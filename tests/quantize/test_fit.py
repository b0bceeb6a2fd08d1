"""`--target-size`: never above it, as near as whole steps allow, and more bytes never cost quality."""

from __future__ import annotations

import itertools
import json
import math
import random

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moelocal.config import ModelConfig
from moelocal.errors import RequestError
from moelocal.formats import QuantSpec
from moelocal.ops.group_search import group_search
from moelocal.quantize.fit import HARM, expected_errors, fit, searched_error, total_error
from moelocal.quantize.recipe import BUILT_IN, CLASSES, Recipe, class_of, layer_of
from moelocal.quantize.sizes import packed_nbytes, shapes_of, sizes
from moelocal.units import parse_size
from parity.checkpoints import Recipe as Model
from parity.checkpoints import config

MODELS = [
    ModelConfig.parse(config(Model(family, layers=layers)))
    for family, layers in (("qwen3_5_moe", 8), ("qwen3_5", 5), ("qwen3_next", 4), ("qwen3_moe", 3))
]


LEAST = {"experts": 2, "dense": 3}


@pytest.fixture(scope="module")
def flagship(root):
    found = ModelConfig.parse(json.loads((root / "benchmarks/configs/qwen3.6-35b-a3b.json").read_text()))
    return found, shapes_of(found)


def smallest(recipe: Recipe, found: ModelConfig) -> int:
    """Bytes of the smallest plan: experts at 2 bits, a dense feed-forward at 3, the rest at 4, or at what it has."""
    shapes = shapes_of(found)
    plan = {
        path: spec
        and QuantSpec(min(spec.bits, LEAST.get((class_of(path) or "").split(".")[0], 4)), spec.group)
        for path, spec in recipe.plan(found, shapes).items()
    }
    return sizes(found, shapes, plan).nbytes


@given(
    st.sampled_from(BUILT_IN), st.integers(0, len(MODELS) - 1), st.floats(0, 1), st.floats(0, 1), st.data()
)
def test_never_above_the_target_and_more_bytes_are_never_worse(name, index, one, other, data):
    found, recipe = MODELS[index], Recipe.open(name)
    low, original = smallest(recipe, found), sizes(found, shapes_of(found), {}).nbytes
    less, more = sorted(low + int(share * (original - 1 - low)) for share in (one, other))
    shapes = shapes_of(found)
    errors = expected_errors(shapes)
    if data.draw(st.booleans(), "measured"):
        # errors of the caller's own, in which more bits need not be better
        seed = data.draw(st.integers(0, 5))
        errors = lambda path, spec: random.Random(f"{seed} {path} {spec}").random()  # noqa: E731
        # the recipe's own plan is then no better than smaller ones: compare on one side of it
        own = sizes(found, shapes, recipe.plan(found, shapes)).nbytes
        assume((less >= own) == (more >= own))
    plans = [fit(recipe, found, shapes, target, errors) for target in (less, more)]
    for plan, target in zip(plans, (less, more), strict=True):
        assert sizes(found, shapes, plan).nbytes <= target
        assert set(plan) == set(recipe.plan(found, shapes))
        for path, spec in plan.items():
            assert spec is None or shapes[f"{path}.weight"][-1] % spec.group == 0
    assert total_error(plans[1], errors) <= total_error(plans[0], errors) * (
        1 + 1e-12
    )  # sums of rounded terms


@given(st.sampled_from(BUILT_IN), st.integers(0, len(MODELS) - 1), st.floats(0, 1))
def test_what_stays_unused_is_less_than_any_next_step(name, index, share):
    found, recipe = MODELS[index], Recipe.open(name)
    low, original = smallest(recipe, found), sizes(found, shapes_of(found), {}).nbytes
    target = low + int(share * (original - 1 - low))
    shapes = shapes_of(found)
    plan, start = fit(recipe, found, shapes, target), recipe.plan(found, shapes)
    used = sizes(found, shapes, plan).nbytes
    grows = target >= sizes(found, shapes, start).nbytes
    partners = {"k": "q", "v": "q", "z": "qkv", "up": "gate"}
    items: dict[tuple, list[str]] = {}
    for path in plan:
        family, _, part = (class_of(path) or "").partition(".")
        items.setdefault((layer_of(path), family, partners.get(part, part), start[path]), []).append(path)
    for paths in items.values():
        was, own = plan[paths[0]], start[paths[0]]
        if was is None or own is None or (not grows and was == own):
            continue  # at its most
        # with the expected errors every number of bits lies on the hull, except that 8 may go straight to 16
        larger = [QuantSpec(b, was.group) for b in (2, 3, 4, 5, 6, 8) if b > was.bits] + [None] * grows
        steps = [
            sum(
                packed_nbytes(shapes[f"{p}.weight"], spec, 2) - packed_nbytes(shapes[f"{p}.weight"], was, 2)
                for p in paths
            )
            for spec in larger
        ]
        assert steps[-1] > target - used, paths
        assert steps[0] > target - used or was.bits >= 6, paths


def test_no_plan_is_better_that_leaves_room_for_one_step(tmp_path):
    # the promise of the greedy solution, held against every plan of a small model
    found = ModelConfig.parse(config(Model("qwen3_moe", layers=1)))
    shapes = shapes_of(found)
    (tmp_path / "r.toml").write_text(
        '[formats]\ndefault = "keep"\nembedding = { bits = 4 }\nattention.o = { bits = 4 }\nexperts = { bits = 4 }'
    )
    recipe, errors = Recipe.open(tmp_path / "r.toml"), expected_errors(shapes)
    start = recipe.plan(found, shapes)
    experts = "layers.0.mlp.switch_mlp"
    together = [
        ["embed_tokens"],
        ["layers.0.self_attn.o_proj"],
        [f"{experts}.gate_proj", f"{experts}.up_proj"],
        [f"{experts}.down_proj"],
    ]
    assert {path for path, spec in start.items() if spec} == {path for paths in together for path in paths}
    choices = [QuantSpec(4, 64), QuantSpec(5, 64), QuantSpec(6, 64), QuantSpec(8, 64), None]

    def cost(paths: list[str], spec: QuantSpec | None) -> tuple[int, float]:
        nbytes = sum(packed_nbytes(shapes[f"{path}.weight"], spec, 2) for path in paths)
        return nbytes, sum(errors(path, spec) for path in paths) if spec else 0.0

    costs = [[cost(paths, spec) for spec in choices] for paths in together]
    fixed = sizes(found, shapes, start).nbytes - sum(options[0][0] for options in costs)
    every = [
        (fixed + sum(nbytes for nbytes, _ in picked), sum(error for _, error in picked))
        for picked in itertools.product(*costs)
    ]
    step = max(more - less for options in costs for (less, _), (more, _) in itertools.pairwise(options))
    low, high = min(every)[0], max(every)[0]
    for target in range(low + step, high, (high - low) // 50):
        plan = fit(recipe, found, shapes, target)
        best = min(error for nbytes, error in every if nbytes <= target - step)
        assert total_error(plan, errors) <= best * (1 + 1e-12)  # sums in another order


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_recipe_itself_at_its_own_size(flagship, name):
    recipe = Recipe.open(name)
    plan = recipe.plan(*flagship)
    assert fit(recipe, *flagship, sizes(*flagship, plan).nbytes) == plan


def test_plain_4_bits_at_20_9_gb(flagship):
    # it finds by itself what the recipes say: mixers' outputs at 8 bits, inputs at 6 or 8, the rest for experts.down
    found, shapes = flagship
    plan = fit(Recipe.open("4bit"), found, shapes, 20_900_000_000)
    used = sizes(found, shapes, plan)
    assert 20_890_000_000 < used.nbytes <= 20_900_000_000
    errors = expected_errors(shapes)
    for name in ("fast", "balanced", "quality"):
        other = Recipe.open(name).plan(found, shapes)
        assert total_error(plan, errors) < total_error(other, errors)
    by_class = {kind: {spec for path, spec in plan.items() if class_of(path) == kind} for kind in CLASSES}
    assert by_class["delta.out"] == by_class["attention.o"] == by_class["shared.down"] == {QuantSpec(8, 64)}
    assert by_class["experts.gate"] == by_class["head"] == by_class["embedding"] == {QuantSpec(4, 64)}
    down = {layer_of(path): spec for path, spec in plan.items() if class_of(path) == "experts.down"}
    better = {layer for layer, spec in down.items() if spec == QuantSpec(5, 64)}
    # the layers nearest to the ends
    assert better == {layer for layer in range(40) if min(layer, 39 - layer) < len(better) / 2}
    assert 20 <= len(better) < 32


def test_what_a_recipe_keeps_is_kept_below_and_above(flagship):
    recipe = Recipe.open("balanced")
    start = recipe.plan(*flagship)
    for target in (12e9, 16e9, 20.9e9, 30e9, 60e9):
        plan = fit(recipe, *flagship, int(target))
        assert all(plan[path] is None for path, spec in start.items() if spec is None)
        for path, spec in plan.items():
            own = start[path]
            if own is not None:
                assert (
                    (spec.bits if spec else 16) <= own.bits
                    if target < 20.93e9
                    else (spec is None or spec.bits >= own.bits)
                )


def test_what_is_multiplied_as_one_keeps_one_format(flagship):
    found, shapes = flagship
    errors = expected_errors(shapes)

    def uneven(path: str, spec: QuantSpec) -> float:
        return errors(path, spec) * (3 if path.endswith(("up_proj", "k_proj", "in_proj_z")) else 1)

    for target in (13e9, 17e9, 21e9, 25e9):
        plan = fit(Recipe.open("4bit"), found, shapes, int(target), uneven)
        for path, spec in plan.items():
            for first, others in (
                ("gate_proj", ["up_proj"]),
                ("q_proj", ["k_proj", "v_proj"]),
                ("qkv", ["z"]),
            ):
                if path.endswith(first):
                    assert {plan[path.removesuffix(first) + other] for other in others} == {spec}


def test_a_matrix_whose_next_step_does_not_fit_takes_no_later_one():
    found = MODELS[0]
    shapes, path = shapes_of(found), "layers.2.mlp.switch_mlp.down_proj"
    # only this matrix gains anything: by 3 bits at once, then by one
    table = {2: 100.0, 3: 99.0, 4: 98.0, 5: 10.0, 6: 5.0, 8: 0.0}
    recipe = Recipe.open("8bit")
    low = smallest(recipe, found)
    one = math.prod(shapes[f"{path}.weight"]) // 8
    for bits, spent in (
        (2, one),
        (2, 3 * one - 1),
        (5, 3 * one),
        (5, 4 * one - 1),
        (6, 4 * one),
        (8, 6 * one),
    ):
        plan = fit(recipe, found, shapes, low + spent, lambda p, spec: table[spec.bits] if p == path else 1.0)
        assert plan[path] == QuantSpec(bits, 64)


def test_measured_errors_decide(flagship):
    found, shapes = flagship
    favourite = "layers.20.mlp.switch_mlp.down_proj"

    def errors(path: str, spec: QuantSpec) -> float:
        return 2.0**-spec.bits * (1e6 if path == favourite else 1)

    recipe = Recipe.open("balanced")
    assert recipe.plan(found, shapes)[favourite] == QuantSpec(4, 64)
    plan = fit(recipe, found, shapes, 21_100_000_000, errors)
    assert plan[favourite] is None or plan[favourite].bits >= 6


@pytest.mark.parametrize("found", MODELS)
def test_the_smallest_size(found):
    for recipe in map(Recipe.open, BUILT_IN):
        low = smallest(recipe, found)
        assert sizes(found, shapes_of(found), fit(recipe, found, shapes_of(found), low)).nbytes == low
        with pytest.raises(RequestError, match=f"the smallest that recipe {recipe.name} can become is "):
            fit(recipe, found, shapes_of(found), low - 1)


def test_targets_that_cannot_be_met(flagship):
    recipe = Recipe.open("balanced")
    with pytest.raises(RequestError) as error:
        fit(recipe, *flagship, 9_000_000_000)
    assert str(error.value) == (
        "target size 9.00 GB: the smallest that recipe balanced can become is 11.49 GB"
    )
    assert sizes(*flagship, fit(recipe, *flagship, 11_490_000_000)).nbytes <= 11_490_000_000
    with pytest.raises(RequestError) as error:
        fit(recipe, *flagship, 69_321_221_376)
    assert str(error.value) == (
        "target size 69.32 GB: the unquantized model has only 69.32 GB; use it as it is"
    )
    assert sizes(*flagship, fit(recipe, *flagship, 69_321_221_375)).nbytes < 69_321_221_376


@pytest.mark.parametrize("found", MODELS)
def test_the_smallest_size_that_is_said_can_be_had(found):
    recipe = Recipe.open("balanced")
    with pytest.raises(RequestError) as error:
        fit(recipe, found, shapes_of(found), 1_000)
    assert str(error.value).startswith("target size 1.0 kB: the smallest that recipe balanced can become is ")
    said = parse_size(str(error.value).rpartition(" is ")[2].replace(" bytes", ""))
    assert sizes(found, shapes_of(found), fit(recipe, found, shapes_of(found), said)).nbytes <= said
    assert said < 1.2 * smallest(recipe, found)


def test_the_table_of_errors_is_that_of_the_quantizer():
    # 32 x 2048 values instead of 256 x 2048, of another seed: within 5 % of the table, 8 bits (where bfloat16 scales
    # round coarsely) within 8 %
    for kind, tail in (("experts.up", 19), ("attention.q", 6.5), ("shared.down", 4.5)):
        values = np.random.default_rng(7).standard_t(tail, (32, 2048)).astype(np.float32)
        weights = mx.array(values).astype(mx.bfloat16)
        wide = weights.astype(mx.float32)
        for bits, group in ((2, 64), (3, 32), (4, 64), (5, 128), (6, 64), (8, 64)):
            spec = QuantSpec(bits, group)
            packed = group_search(weights, spec, None, mx.bfloat16)
            lost = mx.sum(mx.square(packed.dequantize(mx.float32) - wide)) / mx.sum(mx.square(wide))
            assert searched_error(kind, spec) == pytest.approx(lost.item(), rel=0.08 if bits == 8 else 0.05)


def test_every_class_has_a_harm():
    assert set(HARM) == set(CLASSES) and min(HARM.values()) > 0
