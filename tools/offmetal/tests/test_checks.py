"""Every kind of mistake that the simulator claims to find is found, at its line, and is gone once repaired."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest

import offmetal
from offmetal import machine
from offmetal.tests import faults
from offmetal.tests.faults import BARRIER, Fault
from offmetal.tests.support import run


@pytest.mark.parametrize("fault", faults.ALL, ids=lambda fault: fault.name)
def test_planted_fault(fault: Fault):
    assert faults.missed(fault) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [fault for fault in faults.RUN if "fast" in fault.modes], ids=lambda fault: fault.name
)
def test_planted_fault_in_fast_mode(fault: Fault):
    assert faults.missed(fault, "fast") == ""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["descending", "random"])
@pytest.mark.parametrize(
    "fault", [fault for fault in faults.RUN if "data race" in fault.message], ids=lambda fault: fault.name
)
def test_races_are_found_in_any_order(fault: Fault, order: str):
    with (
        offmetal.options(order=order, seed=5),
        pytest.raises(offmetal.KernelError, match=r"data race|uninitialised"),
    ):
        fault.run()


SHOWN_BY = {
    "out-of-bounds access": "read before the start of an input",
    "data race": "no barrier between a write and a read",
    "uninitialised read": "threadgroup memory read before it is written",
    "barrier divergence": "some threads return before a barrier",
    "inactive lane": "shuffle from a lane in the other branch",
    "threadgroup memory": "too much threadgroup memory",
    "invalid access": "too much private memory",
    "timeout": "endless loop",
    "undefined behaviour": "integer division by zero",
}


def test_every_kind_of_report_has_its_planted_fault():
    assert {*SHOWN_BY} == {*machine._KINDS.values()}


@pytest.mark.parametrize("kind", SHOWN_BY)
def test_a_report_begins_with_its_kind(kind: str):
    (fault,) = (fault for fault in faults.RUN if fault.name == SHOWN_BY[kind])
    with pytest.raises(offmetal.KernelError) as error:
        fault.run()
    assert [
        problem
        for problem in error.value.problems
        if re.match(rf"{kind}( on `\w+`)?( at byte \d+)?: ", problem)
    ]


def test_names_of_the_faults_are_unique():
    assert len({fault.name for fault in faults.ALL}) == len(faults.ALL)


# --- what is no fault ---


def test_equal_values_are_no_race():
    out = run("out[0] = 3.0f; if (thread_position_in_grid.x) out[thread_position_in_grid.x] = 1.0f;")
    assert out[0].item() == 3
    assert offmetal.last_result.benign_writes == 63


def test_atomics_are_no_race(mode: str):
    add = "atomic_fetch_add_explicit(&out[thread_position_in_grid.x % 3], 1, memory_order_relaxed);"
    out = run(add, threadgroup=16, shape=(3,), dtype=mx.int32, init_value=0, atomic_outputs=True)
    assert out.tolist() == [22, 21, 21]


def test_an_initialised_output_can_be_read():
    assert run("out[thread_position_in_grid.x] += 1;", init_value=2).tolist() == [3.0] * 64


def test_unwritten_outputs_are_nan():
    out = run("if (thread_position_in_grid.x != 5) out[thread_position_in_grid.x] = 1;")
    assert mx.isnan(out).tolist() == [i == 5 for i in range(64)]


def test_variables_that_nobody_wrote_show(mode: str):
    sums = "float v[4]; for (int k = 0; k < 4; k++) v[k] += i; out[i] = v[0] + v[3];"
    assert mx.isnan(run(f"uint i = thread_position_in_grid.x; {sums}")).all().item()
    count = "int n; if (i > 99) n = 1; out[i] = n;"
    assert run(f"uint i = thread_position_in_grid.x; {count}", dtype=mx.int32).tolist() == [-0x55555556] * 64


def test_threadgroup_memory_that_nobody_wrote_is_nan_in_fast_mode():
    source = (
        "threadgroup float s[64]; uint t = thread_position_in_grid.x;"
        f"if (t > 9) s[t] = 1; {BARRIER} out[t] = s[t];"
    )
    with offmetal.options(checked=False):
        assert mx.isnan(run(source)).sum().item() == 10


# --- what is refused before anything runs ---


def test_too_many_threads():
    with pytest.raises(ValueError, match=r"maximum allowed threads per threadgroup \(1024\)"):
        run("out[0] = 1;", threads=2048, threadgroup=1025)


def test_too_many_buffers():
    inputs = {f"a{i:02}": mx.zeros((9,)) for i in range(16)}
    with pytest.raises(ValueError, match="33 buffers"):
        run("out[0] = " + " + ".join(f"{name}_shape[0]" for name in inputs) + ";", inputs)


def test_text_that_is_not_ascii():
    with pytest.raises(
        offmetal.MetalCompileError, match="the source has the character '×'; MLX gives Metal ASCII only"
    ):
        run("out[0] = 1; // 2 × 3")


def test_an_order_that_does_not_exist():
    expected = "order: expected one of ascending, descending, random, got 'up'"
    with pytest.raises(ValueError, match=expected), offmetal.options(order="up"):
        pass


def test_a_traced_function_cannot_be_simulated():
    function = mx.compile(lambda a: run("out[0] = a[0];", {"a": a}, threads=1, shape=(1,)))
    with pytest.raises(RuntimeError, match=r"call mx\.disable_compile\(\) first"):
        function(mx.ones((8,)))


# --- where the report points ---

OUTER = """#line 1 "outer.metal"
// the next lines stand in for #include "inner.metal"
#line 1 "inner.metal"
template <typename T>
METAL_FUNC T inner(const device T* p, uint i) {
  return p[i + %s];
}
#line 3 "outer.metal"
METAL_FUNC float outer(const device float* p, uint i) {
  return inner(p, i);
}
"""


@pytest.mark.parametrize(
    "index, place",
    [
        ("1", r"at inner\.metal:3 <- outer\.metal:4 <- k\.source:2"),
        ("undeclared", r"inner\.metal:3:16: error: use of undeclared identifier"),
        ("(float*)p == nullptr", r"inner\.metal:3: error: a cast to a pointer must say"),
    ],
)
def test_included_files_are_named(index: str, place: str):
    with pytest.raises((offmetal.KernelError, offmetal.MetalCompileError), match=place):
        run(
            "uint i = thread_position_in_grid.x;\nout[i] = outer(a, i);",
            {"a": mx.ones((64,))},
            header=OUTER % index,
        )


def test_the_call_line_is_named():
    with pytest.raises(
        offmetal.KernelError, match=r"thread \(0, 0, 0\) of threadgroup \(0, 0, 0\) at k\.source:2"
    ):
        run("// a comment\nout[1 << 20] = 1;")


def test_messages_quote_the_authors_text():
    with pytest.raises(offmetal.MetalCompileError) as error:
        run("threadgroup float b[4];\nfloat2 v; v.xy = undeclared;")
    assert "v.xy = undeclared;" in str(error.value)
    assert "__" not in str(error.value)


# --- afterwards ---


def test_the_process_survives(mode: str):
    for _ in range(3):
        with pytest.raises(offmetal.KernelError):
            run("out[1 << 28] = 1;")
    assert run("out[thread_position_in_grid.x] = 4;").tolist() == [4.0] * 64


def test_as_many_findings_as_asked_for():
    source = "\n".join(f"out[{k}] = thread_position_in_grid.x;" for k in range(6))
    with offmetal.options(max_reports=4), pytest.raises(offmetal.KernelError) as error:
        run(source)
    assert len(error.value.problems) == 4
