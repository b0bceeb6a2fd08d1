"""A decode step is compiled once per setting: an override or another choice of kernels holds from the next token on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

import moelocal
from moelocal import metal
from moelocal.ops.op import force


def test_an_override_holds_after_a_step_was_compiled():
    model = moelocal.load()
    cache = model.new_cache()
    called: list[str] = []

    def executor(name: str, **parts: Any) -> Callable[..., Sequence[mx.array]]:
        """Kernels that give zeros, and can be traced."""

        def launch(output_shapes: Any, output_dtypes: Any, **arguments: Any) -> Sequence[mx.array]:
            called.append(name.removeprefix("moelocal_"))
            return [mx.zeros(*each) for each in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    token = mx.array([[5]])
    for _ in range(2):
        before = model(token, cache)
    with metal.executing(executor), force("metal"):
        model(token, cache)
        first = len(called)
        assert {"delta_net", "prologue", "attend_block", "route", "add_norm", "rms_norm"} <= set(called)
        model(token, cache)
        # compiled: only what stands outside of the blocks is called again
        assert called[first:] == ["rms_norm"]
    called.clear()
    after = model(token, model.new_cache())
    assert not called and mx.any(after != 0).item() and before.shape == after.shape


def test_a_model_answers_in_a_thread_of_its_own():
    """Nothing that an import left behind belongs to the thread that imported it."""
    program = """
import os, threading, moelocal
said = []
def answer():
    model = moelocal.load()
    said.append(moelocal.generate(model, "Hello!", max_tokens=3, sampling=moelocal.Sampling(temperature=0)).tokens)
thread = threading.Thread(target=answer)
thread.start(); thread.join()
print(len(said[0]), flush=True)
os._exit(0)  # MLX may abort when it takes down what a thread that ended had compiled
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "3\n", done.stderr
