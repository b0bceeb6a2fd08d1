"""Whole decode steps of the embedded model with every kernel on, in the simulator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import moelocal
import offmetal
from kernels import quantized
from moelocal import metal
from moelocal.ops.op import force

QUESTION = "Draw a red circle as SVG."
TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized")
    quantized.write(path)
    return path


def counted(launches: Counter[str]) -> metal.Executor:
    """The simulator, and how often it ran which kernel."""

    def bind(name: str, **parts: Any) -> Callable[..., Sequence[mx.array]]:
        kernel = offmetal.emulated_kernel(name=name, **parts)

        def launch(**arguments: Any) -> Sequence[mx.array]:
            launches[name.removeprefix("moelocal_").split("__")[0]] += 1
            return kernel(**arguments)

        return launch

    return bind


def answer(folder: Path) -> tuple[int, ...]:
    model = moelocal.load(str(folder))
    greedy = moelocal.Sampling(temperature=0)
    return moelocal.generate(model, QUESTION, sampling=greedy, max_tokens=TOKENS, thinking=False).tokens


@pytest.mark.slow
def test_greedy_tokens_equal_the_portable_ones(folder: Path):
    with force("portable"):
        expected = answer(folder)
    launches: Counter[str] = Counter()
    with metal.executing(counted(launches)), offmetal.options(checked=False):
        got = answer(folder)
    assert len(got) >= 32 and got == expected
    steps, layers, attention = len(got) - 1, 8, 2
    per_step = {
        "rms_norm": layers + 1,
        "add_norm": layers,
        "delta_net": layers - attention,
        "prologue": attention,
        "router": layers,
        "route": layers,
        "experts_inner": layers,
        "experts_sum": layers,
    }
    # the prompt is read by the portable form of those that take few tokens only
    for name, count in per_step.items():
        assert launches[name] >= count * steps, name


def test_a_checked_step_equals_the_portable_one(folder: Path):
    """Every memory check on, and outputs that no thread wrote refused."""
    model = moelocal.load(str(folder))
    tokens = mx.array([model.tokenizer.encode(QUESTION)])
    logits = []
    for form in ("portable", "metal"):
        cache = model.new_cache()
        with force("portable"):
            model(tokens, cache)
        with force(form), offmetal.options(allow_unwritten=False):
            logits.append(model(mx.array([[50]]), cache)[0, -1])
            logits.append(model(mx.array([[51]]), cache)[0, -1])
    spread = mx.max(mx.abs(logits[0])).item()
    for portable, ours in zip(logits[:2], logits[2:], strict=True):
        # float32 throughout, sums in another order, over eight layers
        assert mx.max(mx.abs(portable - ours)).item() < 1e-4 * spread
        assert mx.argmax(portable).item() == mx.argmax(ours).item()
