"""`python -m offmetal`: what it prints and how it ends. Its tests are made here, in a folder of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2]

TESTS = """
import mlx.core as mx
import offmetal
import pytest
from offmetal.pytest_plugin import mode

HEADER = '#line 1 "twice.metal"\\ntemplate <typename T>\\nMETAL_FUNC T twice(T v) {\\n  return v + v;\\n}\\n'
SOURCE = "out[thread_position_in_grid.x] = twice<T>(a[thread_position_in_grid.x %s]);"

def run(n, wrong=""):
    kernel = offmetal.emulated_kernel("twice", ["a"], ["out"], SOURCE % wrong, HEADER)
    a = mx.arange(n).astype(mx.float32)
    (out,) = kernel(inputs=[a], grid=(n, 1, 1), threadgroup=(32, 1, 1), output_shapes=[(n,)],
                    output_dtypes=[mx.float32], template=[("T", mx.float32)])
    assert mx.array_equal(out, 2 * a)

def test_modes(mode):
    run(64)

def test_another():
    run(96)
    run(96)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\nfilterwarnings = ['error']\naddopts = '-q'\n"
    )
    tests = tmp_path / "tests" / "kernels"
    tests.mkdir(parents=True)
    (tests / "test_twice.py").write_text(TESTS)
    (tests / "test_wrong.py").write_text(TESTS.replace('wrong=""', 'wrong="+ 1"'))
    return tmp_path


def offmetal(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "offmetal", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(TOOLS), **environment},
        capture_output=True,
        text=True,
    )


def test_check_runs_the_tests_in_each_mode(folder: Path):
    done = offmetal(folder, "check", "twice")
    assert done.returncode == 0, done.stdout + done.stderr
    launched = [line for line in done.stdout.splitlines() if line.startswith(("---", "offmetal:"))]
    assert launched == [
        *("--- checked ---", "offmetal: 3 launches of 1 kernels"),
        *("--- fast ---", "offmetal: 1 launches of 1 kernels"),
        *("--- random ---", "offmetal: 3 launches of 1 kernels"),
        *("--- fused ---", "offmetal: 3 launches of 1 kernels"),
    ]


def test_check_says_where_a_kernel_is_wrong(folder: Path):
    done = offmetal(folder, "check", "wrong")
    assert done.returncode == 1
    assert "4-byte read at byte 256 of 256 bytes" in done.stdout
    assert "at twice.source:1" in done.stdout


@pytest.mark.parametrize("kernel", ["twice", "kernels/twice.metal"])
def test_show_names_the_lines_as_reports_do(folder: Path, kernel: str):
    (folder / "kernels").mkdir()
    (folder / "kernels" / "twice.metal").write_text("// its tests say what is launched\n")
    done = offmetal(folder, "show", kernel)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "// twice<T=float32>"
    assert "twice.metal:3  |   return v + v;" in lines
    assert (
        "twice.source:1 | out[thread_position_in_grid.x] = twice<T>(a[thread_position_in_grid.x ]);" in lines
    )
    assert "               |   uint3 thread_position_in_grid [[thread_position_in_grid]]) {" in lines


def test_traffic_is_a_table_for_each_shape(folder: Path):
    done = offmetal(folder, "traffic", "twice")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = done.stdout.split("\n\n")
    assert first.startswith("twice<T=float32>: 2 launches of 96 x 1 x 1 threads in groups of 32 x 1 x 1\n")
    assert second.startswith("twice<T=float32>: 1 launch of 64 x 1 x 1 threads")
    rows = [line.split() for line in first.splitlines()[3:]]
    assert rows == [
        ["a", "float32", "96", "384", "384", "0", "384", "1.00"],
        ["out", "float32", "96", "384", "0", "384", "384"],
        ["all", "384", "384", "768"],
    ]


def test_a_file_alone_is_compiled_with_what_it_includes(folder: Path):
    (folder / "inner.metal").write_text("float inner(float* p) {\n  return p[0];\n}\n")
    (folder / "outer.metal").write_text(
        '// outer\n#include "inner.metal"\nMETAL_FUNC float outer() { return 1; }\n'
    )
    done = offmetal(folder, "check", "outer.metal")
    assert done.returncode == 1
    assert "inner.metal:1: error: `p`: a pointer or reference must say" in done.stdout
    (folder / "inner.metal").write_text("float inner(const device float* p) {\n  return p[0];\n}\n")
    done = offmetal(folder, "check", "outer.metal")
    assert done.returncode == 0
    assert done.stdout == (
        "outer.metal: compiles, as far as templates can without their arguments; nothing was run\n"
    )


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["chek", "twice"], "offmetal: argument action: invalid choice: 'chek'"),
        (["check"], "offmetal: the following arguments are required: kernel"),
        (
            ["check", "thrice"],
            "offmetal: thrice: there is no test_thrice.py in tests/kernels or ../tests/kernels",
        ),
        (["show", "thrice.metal"], "offmetal: thrice.metal: no such file"),
        (
            ["show", "untested.metal"],
            "offmetal: untested: there is no test_untested.py in tests/kernels or ../tests/kernels",
        ),
        (["check", "thrice.metal"], "offmetal: thrice.metal: [Errno 2] No such file or directory"),
        (
            ["traffic", "tests/kernels/test_thrice.py"],
            "offmetal: tests/kernels/test_thrice.py: no such test file",
        ),
        (
            ["show", "twice", "--", "-k", "nothing"],
            "offmetal: tests/kernels/test_twice.py: pytest ran no tests",
        ),
    ],
)
def test_bad_arguments_are_one_line(folder: Path, arguments: list[str], line: str):
    (folder / "untested.metal").write_text("// a text without tests\n")
    done = offmetal(folder, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1


def test_no_clang_is_one_line(folder: Path):
    done = offmetal(folder, "check", "twice", OFFMETAL_CLANG="/nowhere/clang")
    assert done.returncode == 2
    assert done.stderr == (
        "offmetal: /nowhere/clang (OFFMETAL_CLANG) is not clang 16 or later: "
        "apt install clang-19 or set OFFMETAL_CLANG\n"
    )


# --- the pytest plugin ---


def pytest_in(folder: Path, *arguments: str, **environment: str) -> str:
    (folder / "conftest.py").write_text('pytest_plugins = ["offmetal.pytest_plugin"]\n')
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-rs",
            "tests/kernels/test_twice.py",
            *arguments,
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(TOOLS), **environment},
        capture_output=True,
        text=True,
    ).stdout


def test_without_clang_one_test_fails_with_one_line_and_the_others_are_skipped(folder: Path):
    said = pytest_in(folder, OFFMETAL_CLANG="/nowhere/clang")
    assert "1 failed, 4 skipped" in said
    assert "Traceback" not in said
    assert (
        said.count("is not clang 16 or later: apt install clang-19") <= 4
    )  # failure, its summary, skips, the end


def test_without_any_clang_all_are_skipped_and_the_end_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("OFFMETAL_CLANG", raising=False)
    said = pytest_in(folder, PATH=str(folder))
    assert "5 skipped" in said and "failed" not in said
    assert "offmetal: 5 tests of kernels skipped: " in said and "apt install clang-19" in said


def test_the_simulators_own_tests_are_skipped_with_one_line_elsewhere():
    elsewhere = "import platform; platform.system = lambda: 'Darwin'; import pytest; exit(pytest.main())"
    # without this file, which would start itself again if nothing were skipped
    tests = ["tools/offmetal/tests", "--ignore=tools/offmetal/tests/test_cli.py", "-x", "-m", ""]
    done = subprocess.run(
        [sys.executable, "-c", elsewhere, *tests],
        cwd=TOOLS.parent,
        env={**os.environ, "OFFMETAL_CLANG": "/nowhere/clang"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = r"(?m)^offmetal: \d+ tests of kernels skipped: it runs on Linux only$"
    assert len(re.findall(told, done.stdout)) == 1
    assert "passed" not in done.stdout and set(done.stdout.split(" ")[0]) == {"s"}


def test_launches_of_all_processes_are_counted(folder: Path):
    pytest.importorskip("xdist")
    assert "offmetal: 6 launches of 1 kernels" in pytest_in(folder, "-n", "2")


@pytest.mark.slow
def test_processes_share_an_empty_cache(folder: Path):
    pytest.importorskip("xdist")
    said = pytest_in(folder, "-n", "3", OFFMETAL_CACHE=str(folder / "cache"))
    assert "5 passed" in said
    (state,) = (folder / "cache").iterdir()
    assert not [file for file in state.rglob("*") if file.name.startswith(".")]  # nothing half made is left
