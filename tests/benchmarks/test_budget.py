"""The counts of benchmarks/budget.py: exact for a decode step, and the rules that they rest on."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import budget  # noqa: E402
import tables  # noqa: E402
from ledger.dispatches import Device  # noqa: E402
from ledger.trace import as_on_metal, hold, region, trace  # noqa: E402

from moelocal.bench.header import Header  # noqa: E402
from moelocal.config import DeltaNetSpec  # noqa: E402
from moelocal.formats import QuantizedArray, QuantSpec  # noqa: E402
from moelocal.ops import delta_net, experts, route  # noqa: E402
from parity.checkpoints import Recipe, config  # noqa: E402

CONFIGS = {
    "flagship": ROOT / "benchmarks/configs/qwen3.6-35b-a3b.json",
    "embedded": ROOT / "src/moelocal/embedded/config.json",
}

# launches, bytes of weights and caches, longest chain of one greedy step at zero context; a change here is a change of
# what a token costs on a Mac
OURS = {"flagship": (402, 1_799_005_176, 399), "embedded": (89, 1_407_648, 86)}
THEIRS = {"flagship": (1859, 1_798_403_720, 937), "embedded": (379, 1_400_688, 193)}  # mlx-lm 0.32.2


def figures(found: dict[str, Any]) -> tuple[int, int, int]:
    return found["launches"], found["nbytes"], found["longest_chain"]


@pytest.mark.parametrize("model", CONFIGS)
def test_what_our_step_costs(model):
    found = budget.counted(budget.OURS, CONFIGS[model], 1)
    assert figures(found) == OURS[model]
    assert found["merged"] == 0
    assert found["mlx_nbytes"] < 2_000_000, "weights were evaluated"
    surplus = found["nbytes"] - sum(found["minimum"].values())
    assert 0 <= surplus < 0.02 * found["nbytes"]


@pytest.mark.parity
@pytest.mark.parametrize("model", CONFIGS)
def test_what_the_step_of_mlx_lm_costs(model):
    found = budget.counted(budget.THEIRS, CONFIGS[model], 1)
    assert figures(found) == THEIRS[model]
    assert found["merged"] == 0
    # it keeps norms and states as the checkpoint does, so it reads what we call the least
    assert found["nbytes"] == pytest.approx(sum(found["minimum"].values()), rel=1e-3)


FAMILIES = ("qwen3_5_moe", "qwen3_5", "qwen3_next", "qwen3_moe")


@pytest.mark.parametrize("side", [budget.OURS, pytest.param(budget.THEIRS, marks=pytest.mark.parity)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted(family, side, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config(Recipe(family))))
    # the step fills the buffer, which the portable form of attention reads whole
    found = budget.counted(side, file, 255)
    assert 0 < found["longest_chain"] <= found["launches"]
    for block, least in found["minimum"].items():
        facts = found["blocks"][block]
        assert (least == 0) == (facts["launches"] == 0) or block == "sampling"
        # more only by small weights kept in float32, less by what mlx-lm keeps narrower than the originals
        assert facts["weights"] + facts["caches"] == pytest.approx(least, rel=0.05, abs=2500)


def test_keys_and_values_are_all_that_grows_with_the_context():
    near, far = (budget.counted(budget.OURS, CONFIGS["flagship"], context) for context in (1, 4097))
    grown = 4096 * 10 * 2 * 256 * 2 * 2  # positions, layers, heads, size, keys and values, bytes
    assert far["nbytes"] - near["nbytes"] == grown
    assert sum(far["minimum"].values()) - sum(near["minimum"].values()) == grown


@pytest.mark.parity
def test_the_whole_program():
    command = [sys.executable, ROOT / "benchmarks/budget.py", "--json", "--rounds", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["dispatches_per_token"] == OURS["flagship"][0]
    assert found["bytes_per_token"] == OURS["flagship"][1]
    assert found["longest_chain"] == OURS["flagship"][2]
    assert found["mlx_lm_dispatches_per_token"] == THEIRS["flagship"][0]
    # 5.7 on an idle machine; both share what else runs
    assert found["host_ratio"] > 3
    assert "not measured" in done.stdout


def test_predictions_return_the_rates_that_they_were_fitted_to():
    chips = json.loads((ROOT / "benchmarks/ledger/chips.json").read_text())
    stock = predicted = budget.predict(chips, chips["fitted_to"])
    for chip, facts in chips["chips"].items():
        assert ("stock" in facts) == ("source" in facts) != ("like" in facts)
        if "stock" in facts:
            assert predicted[chip] == pytest.approx(facts["stock"])
    fused = budget.predict(chips, {"launches": 1155, "nbytes": chips["fitted_to"]["nbytes"]})
    # Rapid's four fusions took 680 launches away on an M3 Ultra: 128 tokens/s were published
    assert fused["M3 Ultra"] == pytest.approx(128, rel=0.05)
    assert all(fused[chip] > stock[chip] for chip in fused)


# --- fusion ---------------------------------------------------------------------------------------------------------


def two_outputs(x: mx.array, y: mx.array) -> list[mx.array]:
    inner = mx.exp(x) * y
    return [mx.sigmoid(inner) + 1, mx.abs(inner).sum(axis=-1, keepdims=True) * y]


def shared_broadcast(x: mx.array, y: mx.array) -> list[mx.array]:
    wide = mx.broadcast_to(y[:, :1], x.shape)
    return [mx.softmax(x * wide) + wide, x - wide]


def deep(x: mx.array, y: mx.array) -> list[mx.array]:
    for i in range(30):
        x = mx.sin(x) * y + i
    return [x]


def many_inputs(x: mx.array, y: mx.array) -> list[mx.array]:
    rows = [row * 2 for row in mx.split(x, 8, axis=-1)]
    parts = [part for row in rows for part in mx.split(row, 8, axis=-1)]
    return [sum(parts, start=parts[0] * y[:, :1])]


def mixer(x: mx.array, y: mx.array) -> list[mx.array]:
    spec = DeltaNetSpec(1, 2, 16, 16, 4)
    weights = delta_net.DeltaNetWeights.build(
        spec, mx.ones((64, 4, 1)), mx.ones((2,)), mx.ones((2,)), mx.ones((16,)), 1e-6
    )
    u = x[:, None]
    states = mx.zeros((1, 3, 64)), mx.zeros((1, 2, 16, 16))
    return list(
        delta_net.portable(u, y[:, None, :32], y[:, None, :2], y[:, None, 2:4], *states, None, weights)
    )


def feed_forward(x: mx.array, y: mx.array) -> list[mx.array]:
    logits = x[:, :9].astype(mx.float32)
    chosen, weights, share = route.portable(logits, 2, True, True)

    def glu(*lead: int) -> experts.SwiGLU:
        return experts.SwiGLU((mx.ones((*lead, 32, 64)),), mx.ones((*lead, 64, 16)))

    return [experts.portable(x, glu(8), chosen, weights, glu(), share, y)]


FUNCTIONS = [two_outputs, shared_broadcast, deep, many_inputs, mixer, feed_forward]
VIEWS = {
    "Reshape",
    "Squeeze",
    "ExpandDims",
    "Split",
    "Slice",
    "Broadcast",
    "Transpose",
    "Flatten",
    "Unflatten",
}
REDUCED = {"Sum", "Max", "Min"}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_elementwise_primitives_are_joined_as_mlx_compile_joins_them(function: Callable[..., list[mx.array]]):
    x, y = mx.ones((1, 64)), mx.full((1, 64), 2.0)
    mx.eval(x, y)
    compile_ = mx.compile
    text = io.StringIO()

    def real() -> list[mx.array]:
        with patch.object(mx, "compile", compile_):
            mx.export_to_dot(text, *mx.compile(function)(x, y))
        return [mx.array(0)]

    with as_on_metal():
        mx.export_function(lambda record: None, real)
        graph = trace(lambda: (region("f", function, compiled=True)(x, y), []))
    # a fused primitive is called Compiled and the names of its parts in some order: compared letter by letter
    labels = Counter(
        "".join(sorted(name.removeprefix("Compiled"))) if name.startswith("Compiled") else name
        for name in re.findall(r'label ="(\w+)', text.getvalue())
    )
    ours = Counter("".join(sorted("".join(p.name for p in n.parts))) or n.name for n in graph.nodes)
    for named in REDUCED & set(labels):
        labels["Reduce"] += labels.pop(named)
    for stand_in in {"RMSNorm", "GatedDelta", "Contiguous"} & set(ours):
        ours["CustomKernel"] += ours.pop(stand_in)
    assert {k: v for k, v in ours.items() if k not in VIEWS} == {
        k: v for k, v in labels.items() if k not in VIEWS
    }


# --- hidden launches ------------------------------------------------------------------------------------------------


def launches(step: Callable[[], list[mx.array]]) -> list[str]:
    """The kernels of a step, in order."""
    with as_on_metal():
        graph = trace(lambda: (step(), []))
    return [kernel for launch in Device(graph).launches for kernel in launch.kernels]


def packed(rows: int, cols: int) -> QuantizedArray:
    scales = mx.zeros((rows, cols // 64))
    weight = QuantizedArray(mx.zeros((rows, cols // 8), mx.uint32), scales, scales + 0, QuantSpec(4, 64))
    mx.eval(weight.arrays)
    return weight


def product(x: mx.array, weight: QuantizedArray) -> mx.array:
    return mx.quantized_matmul(x, *weight.arrays, transpose=True, group_size=64, bits=4)


@pytest.fixture
def x() -> mx.array:
    array = mx.zeros((1, 1, 256))
    mx.eval(array)
    return array


def test_a_half_of_a_row_keeps_its_stride_and_is_copied_for_a_quantized_product(x):
    down = packed(64, 128)

    def halves(flat: bool) -> list[mx.array]:
        gate, up = mx.split(mx.abs(x), 2, axis=-1)
        y = gate * up
        return [product(y.reshape(1, 128) if flat else y, down)]

    assert launches(lambda: halves(False)) == ["Abs", "Multiply", "copy", "QuantizedMatmul"]
    assert launches(lambda: halves(True)) == ["Abs", "Multiply", "QuantizedMatmul"]


def test_a_norm_copies_heads_that_lie_apart(x):
    def heads() -> list[mx.array]:
        q, gate = mx.split(mx.abs(x).reshape(1, 1, 2, 128), 2, axis=-1)
        return [mx.fast.rms_norm(q, None, 1e-6), gate.reshape(1, 1, 128) * 2]

    assert sorted(launches(heads)) == ["Abs", "Multiply", "RMSNorm", "copy", "copy"]


def test_a_norm_casts_where_its_weight_is_wider(x):
    weight = mx.ones((256,))
    mx.eval(weight)

    def norm() -> list[mx.array]:
        return [mx.fast.rms_norm(mx.abs(x.astype(mx.bfloat16)), weight, 1e-6)]

    assert launches(norm) == ["AsType", "Abs", "AsType", "RMSNorm"]


def test_a_rotation_of_a_part_of_the_head_copies_what_others_need(x):
    def rotated(kept: bool) -> list[mx.array]:
        q = mx.abs(x).reshape(1, 4, 1, 64)
        turned = mx.fast.rope(q, 16, traditional=False, base=1e4, scale=1.0, offset=3)
        return [turned, q] if kept else [turned]

    assert launches(lambda: rotated(kept=False)) == ["Abs", "RoPE"]
    assert launches(lambda: rotated(kept=True)) == ["Abs", "copy", "RoPE"]


def test_a_concatenation_copies_each_part(x):
    assert launches(lambda: [mx.concatenate([x, x, x])]) == ["copy"] * 3


@pytest.mark.parametrize(("size", "count"), [(256, 1), (1024, 1), (2049, 4), (248_320, 16)], ids=str)
def test_a_large_sort_takes_many_launches(size, count):
    values = mx.zeros((size,))
    mx.eval(values)
    # 248,320 values: 122 blocks of 2,048, 7 rounds of two launches, and a copy
    assert launches(lambda: [mx.argsort(values)]) == ["ArgSort"] * count


def test_a_large_maximum_takes_two(x):
    values = mx.zeros((248_320,))
    mx.eval(values)
    assert launches(lambda: [mx.max(values), mx.max(x)]) == ["Reduce"] * 3


def test_a_row_is_written_in_place_where_only_the_cache_holds_the_buffer(x):
    def write(held: bool) -> list[mx.array]:
        buffer = mx.zeros((1, 8, 256))
        if held:
            hold([buffer])
        else:
            mx.eval(buffer)  # a constant: somebody else's
        buffer[:, 3:4] = x
        return [buffer]

    assert launches(lambda: write(held=True)) == ["SliceUpdate"]
    assert launches(lambda: write(held=False)) == ["copy", "SliceUpdate"]


def test_predictions_are_rows_that_say_so_and_a_table():
    chips = json.loads((ROOT / "benchmarks/ledger/chips.json").read_text())
    counts = {"launches": 402, "nbytes": 1_799_005_176, "longest_chain": 399}
    header = Header(
        "m", "C", 2, 1 << 30, 1.0, "", "Linux", "3", "0", "cpu", "abc", "2026-01-01T00:00:00Z", "budget.py"
    )
    rows = list(budget.rows_of(header, chips, {budget.OURS: counts}, "flagship", 0))
    predicted = [row for row in rows if row.figure == "predicted"]
    assert len(predicted) == len(chips["chips"])
    assert {row.remark for row in predicted} == {"not measured by anybody"}
    table = tables.made("predicted", rows).splitlines()
    assert (
        table[0]
        == "| chip | moelocal, PREDICTED | ours, of peak bandwidth | stock MLX, published by others |"
    )
    # seconds: bytes over the bandwidth of large reads, and 402 launches at what one costs there
    seconds = 1_799_005_176 / 464e9 + 402 * (1 / 105.5 - 1_798_400_000 / 464e9) / 1859
    share = 1_799_005_176 / seconds / 546e9
    assert f"| M4 Max | {1 / seconds:.0f} | {share:.0%} | 106 |" in table
