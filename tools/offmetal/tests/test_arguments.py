"""What MLX refuses before it compiles a kernel, the simulator refuses too, and takes the rest.

MLX's own binding is asked in each case: without Metal it checks all the same, and goes no further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import offmetal
from offmetal import kernel
from offmetal.tests.support import run

BIG = 2**31

Make = Callable[..., Callable[..., Sequence[mx.array]]]


def refusal(make: Make, options: Any = None, **arguments: Any) -> type[Exception] | None:
    """What is raised for arguments of a call, or None."""
    given = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "inputs": [mx.ones((8,))], **arguments}
    try:
        built = make("k", ["a"], ["out"], "out[0] = 1;", compile_options=options)
        built(**given, output_shapes=[(1,)], output_dtypes=[mx.float32])
    except offmetal.KernelError as error:
        assert "did not finish in time" in str(error)
    except Exception as error:
        if "No Metal back-end" not in str(error):
            return type(error)
    return None


@pytest.mark.parametrize(
    "size",
    [
        *((BIG - 1, 1, 1), (BIG, 1, 1), (1, BIG, 1), (1, 1, 1 << 40), (1, 1), (1, 1, 1, 1), 3, "111"),
        *((1.0, 1, 1), (np.int64(1), 1, 1), (np.int64(BIG), 1, 1), (np.float32(1), 1, 1), (None, 1, 1)),
        *([1, 1, 1], np.array([1, 1, 1]), (True, 1, 1)),
    ],
    ids=str,
)
def test_sizes_of_a_grid_are_ints_of_32_bits(size: Any):
    expected = refusal(mx.fast.metal_kernel, grid=size)
    assert expected in (None, TypeError)
    with offmetal.options(timeout=0.05):  # the largest grid is not waited for
        assert refusal(offmetal.emulated_kernel, grid=size) is expected


@pytest.mark.parametrize("size", [(BIG, 1, 1), (1, 1), (1.0, 1, 1)], ids=str)
def test_sizes_of_a_threadgroup_are_ints_of_32_bits(size: Any):
    assert refusal(mx.fast.metal_kernel, threadgroup=size) is TypeError
    assert refusal(offmetal.emulated_kernel, threadgroup=size) is TypeError


@pytest.mark.parametrize(
    "value",
    [
        *(BIG - 1, BIG, -BIG - 1, True, mx.float32, 1.5, "3", None),
        *(np.int64(3), np.True_, mx.array(3)),
    ],
    ids=str,
)
def test_template_arguments_are_dtypes_bools_and_ints_of_32_bits(value: Any):
    expected = refusal(mx.fast.metal_kernel, template=[("N", value)])
    assert expected in (None, ValueError)
    assert refusal(offmetal.emulated_kernel, template=[("N", value)]) is expected


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"math_mode": "safe"}, {"math_mode": "relaxed"}, {"math_mode": "fast"}),
        *({"math_mode": "quick"}, {"fast_math": True}, 3, [("math_mode", "safe")]),
    ],
    ids=str,
)
def test_compile_options(options: Any):
    expected = refusal(mx.fast.metal_kernel, options)
    assert expected in (None, ValueError)
    assert refusal(offmetal.emulated_kernel, options) is expected


def test_the_messages_say_what_was_given():
    with pytest.raises(TypeError, match=r"grid must be three ints of 32 bits, got \(2147483648, 1, 1\)"):
        run("out[0] = 1;", threads=(BIG, 1, 1), threadgroup=1)
    with pytest.raises(ValueError, match=r"N is 2147483648 \(ints have 32 bits\)"):
        run("out[0] = 1;", template=[("N", BIG)])


def test_where_there_is_metal_metal_kernel_is_that_of_mlx_and_the_tests_stay_in_the_simulator(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(kernel, "_mlx_metal_kernel", lambda *arguments, **options: "MLX's")
    assert isinstance(offmetal.metal_kernel("k", [], ["out"], "out[0] = 5;"), kernel._Kernel)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert offmetal.metal_kernel("k", [], ["out"], "out[0] = 5;") == "MLX's"
    before = offmetal.launches()["k"]
    assert run("out[thread_position_in_grid.x] = 5;").tolist() == [5.0] * 64
    assert offmetal.launches()["k"] == before + 1
