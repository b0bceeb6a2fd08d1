"""benchmarks/scale.py: both programs do the same, rows and pictures hold what they did, the time is foreseen."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import forecast  # noqa: E402
import growth  # noqa: E402
import scale  # noqa: E402
import scale_report  # noqa: E402
import sides  # noqa: E402
import synthetic  # noqa: E402

from moelocal.bench import results  # noqa: E402
from moelocal.bench.header import Header, Identity  # noqa: E402
from moelocal.bench.peers import SideFailed  # noqa: E402
from moelocal.config import ModelConfig  # noqa: E402

TINY = {"layers": 4, "hidden": 64, "vocab": 96, "heads": 4, "kv_heads": 2, "head_dim": 32, "key_heads": 1,
        "value_heads": 2, "key_dim": 32, "value_dim": 32, "experts": 8, "per_token": 2, "width": 64,
        "shared_width": 64, "context": 512}  # fmt: skip

HEADER = Header(
    machine="some-chip", chip="Some Chip", cores=2, memory=24 << 30, bandwidth=3e10, power="unknown",
    system="Linux", python="3.11", mlx="0.32.4", device="cpu (x86_64)", moelocal="0123456789ab",
    date="2026-01-02T03:04:05Z", command="python benchmarks/scale.py",
)  # fmt: skip


def config(**changes: int) -> ModelConfig:
    return ModelConfig.parse(synthetic.shape("flagship", TINY | changes))


# rows, and what is made of them


def run(prompt: int, first: float, decode: float, chosen: tuple[int, ...], nbytes: int = 10**6) -> sides.Run:
    return sides.Run(prompt, 3, first, decode, chosen, nbytes, 2 * nbytes)


@pytest.fixture
def measured() -> scale.Measured:
    """Two points of two rounds: ours reads 100 and 200 tokens/s; theirs half as many. Theirs
    once chooses another token. And a point of one run."""
    points = (scale.Point(10, TINY, 10), scale.Point(40, TINY, 40), scale.Point(80, TINY, 80, once=True))
    axis = scale.Axis("context", "small", points, 3, 1.0)
    model, key = Identity("tiny", "4 bits", 1000, "abc"), axis.points[0].key
    same, other = (1, 2, 3), (1, 2, 4)
    runs = {
        (10, "moelocal"): [run(10, 0.1, 0.02, same), run(10, 0.05, 0.02, same)],
        (10, "mlx-lm"): [run(10, 0.2, 0.04, same), run(10, 0.1, 0.01, other)],
        (40, "moelocal"): [run(40, 0.4, 0.04, same, 5 * 10**6), run(40, 0.2, 0.04, same)],
        (40, "mlx-lm"): [run(40, 0.8, 0.08, same), run(40, 0.4, 0.08, same)],
        (80, "moelocal"): [run(80, 9.0, 9.0, same, 7 * 10**6)],
        (80, "mlx-lm"): [run(80, 9.0, 9.0, other)],
    }
    return scale.Measured(axis, {key: config()}, {key: model}, runs)


def test_rows_have_every_figure(measured):
    pytest.importorskip("mlx_lm")
    rows = {(row.program.split()[0] if row.unit != "ratio" else ":", row.setting, row.figure): row
            for row in measured.rows(HEADER)}  # fmt: skip
    at = "axis=context context=10"
    prefill = rows["moelocal", at, "prefill"]
    assert (prefill.value, prefill.low, prefill.high, prefill.count) == (150.0, 100.0, 200.0, 2)
    ratio = rows[":", at, "decode ratio"]
    # pairs of 2 and 1/2: logarithms of +-ln 2, whose mean has a standard error of ln 2; t at one degree of freedom
    assert (ratio.value, ratio.low, ratio.high) == (
        pytest.approx(1.0),
        pytest.approx(2**-12.706),
        pytest.approx(2**12.706),
    )
    assert ratio.count == 2
    assert ratio.remark == "same greedy choice: 5 of 6"
    assert rows["work", at, "decode work"].value == growth.decode_work(config(), 11.5)
    assert rows["moelocal", "axis=context context=40", "resident memory"].value == 10**7
    last = {
        row.figure: (row.value, row.count) for key, row in rows.items() if key[1] == "axis=context context=80"
    }
    assert last == {"MLX memory": (10**6, 1), "resident memory": (2 * 10**6, 1)}
    slope = rows["moelocal", "axis=context", "prefill cost"]
    assert slope.value == pytest.approx(0.0, abs=1e-12)  # as many tokens a second at both
    excess = rows["moelocal", "axis=context", "prefill excess"]
    assert excess.value == pytest.approx(-rows["work", "axis=context", "prefill cost"].value)


def test_rows_survive_the_file_and_are_told_and_drawn(measured, tmp_path, capsys):
    pytest.importorskip("mlx_lm")
    pytest.importorskip("matplotlib")
    results.append(tmp_path, measured.rows(HEADER))
    rows = scale_report.last_run(results.read(tmp_path / "some-chip.tsv"))
    assert len(rows) == len(list(measured.rows(HEADER)))
    found = scale_report.summary(rows)
    assert found["ratio"]["context"]["40"]["decode"] == [2.0, 2.0, 2.0]
    assert found["agree"] == round(22 / 24, 5)
    assert found["memory"]["MLX memory"]["moelocal"] == {"10": 10**6, "40": 5 * 10**6, "80": 7 * 10**6}
    assert set(found["exponents"]["context"]["prefill cost"]) == {"moelocal", "mlx-lm", "work"}
    scale_report.show(HEADER, rows)
    assert "exponents over context" in capsys.readouterr().out
    scale_report.draw(rows, tmp_path / "images")
    pictures = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in pictures] == ["scale-context.png", "scale-memory.png"]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in pictures)


def test_the_last_run_can_be_drawn_again(measured, tmp_path):
    pytest.importorskip("mlx_lm")
    pytest.importorskip("matplotlib")
    results.append(tmp_path, measured.rows(HEADER))
    assert scale.main(["--redraw", "--results", str(tmp_path), "--images", str(tmp_path / "images")]) == 0
    names = [path.name for path in sorted((tmp_path / "images").iterdir())]
    assert names == ["scale-context.png", "scale-memory.png"]


def test_the_last_run_is_the_latest_one(measured):
    pytest.importorskip("mlx_lm")
    import dataclasses

    later = dataclasses.replace(HEADER, date="2026-02-02T03:04:05Z")
    rows = [*measured.rows(later), *measured.rows(HEADER)]
    assert {row.header.date for row in scale_report.last_run(rows)} == {later.date}
    assert scale_report.last_run(rows, "slice") == []


# the two sides


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("scale") / "tiny"
    return synthetic.write(synthetic.shape("flagship", TINY), to, synthetic.recipe_of(None, 4, 32)).folder


def test_ours_runs_in_its_own_process(folder):
    with sides.Side("moelocal", folder) as side:
        first, again = side.run(40, 5, seed=3), side.run(40, 5, seed=3)
        other = side.run(40, 5, seed=4)
    assert (first.prompt, first.decode, len(first.chosen)) == (40, 5, 5)
    assert first.chosen == again.chosen != other.chosen
    assert first.first_seconds > 0 and first.decode_seconds > 0
    assert first.prefill_rate == 40 / first.first_seconds and first.decode_rate == 4 / first.decode_seconds
    assert folder.joinpath("model.safetensors").stat().st_size < first.mlx_nbytes < first.resident_nbytes


def test_the_process_of_mlx_lm_does_not_import_moelocal():
    script = "import sys; sys.path.insert(0, sys.argv[1]); import sides; print('moelocal' in sys.modules)"
    command = [sys.executable, "-c", script, str(ROOT / "benchmarks")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_process_that_fails_says_so(tmp_path):
    with pytest.raises(SideFailed) as error:
        sides.Side("moelocal", tmp_path / "nothing")
    assert re.fullmatch(
        rf"moelocal: ended with status 1: moelocal\.errors\.ModelNotFound: {tmp_path}/nothing.*",
        str(error.value),
    )


def test_a_process_that_the_system_ended_is_named(folder):
    with sides.Side("moelocal", folder) as side:
        side._process.kill()
        side._process.wait()
        with pytest.raises(SideFailed) as error:
            side.run(4, 2, seed=0)
    assert str(error.value) == "moelocal: ended by the system, as happens where memory is short"


def test_the_resident_set_is_not_that_of_the_parent():
    # ru_maxrss would be: it survives execve
    script = (
        "import subprocess, sys; sys.path.insert(0, sys.argv[1]); import sides\n"
        "kept = b'x' * (400_000_000 if len(sys.argv) > 2 else 1)\n"
        "print(sides.most_resident(), flush=True)\n"
        "if len(sys.argv) > 2: subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1]], check=True)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(ROOT / "benchmarks"), script],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    parent, child = map(int, found.split())
    assert parent > 400e6 and child < 100e6


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("prompt", [1, 33, 300])
def test_both_read_the_same_tokens_and_choose_the_same(folder, prompt):
    with sides.Side("moelocal", folder) as ours, sides.Side("mlx-lm", folder) as theirs:
        mine, other = ours.run(prompt, 12, seed=5), theirs.run(prompt, 12, seed=5)
    assert mine.chosen == other.chosen and len(mine.chosen) == 12
    assert len(set(mine.chosen)) > 3  # not one answer to everything


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_the_whole_of_it_runs_and_notes_what_it_found(tmp_path, capsys, monkeypatch):
    points = (scale.Point(4, {**TINY, "layers": 4}, 48), scale.Point(8, {**TINY, "layers": 8}, 48))
    contexts = (scale.Point(16, TINY, 16), scale.Point(32, TINY, 32), scale.Point(64, TINY, 64, once=True))
    axes = [
        scale.Axis("layers", "flagship", points, 4, 1.0),
        scale.Axis("context", "flagship", contexts, 4, 1.0),
    ]
    monkeypatch.setattr(scale, "axes_of", lambda quick, longest, memory: axes)
    monkeypatch.setattr(scale, "WARM_UP", (4, 2))
    folders = ["--results", str(tmp_path / "results"), "--images", str(tmp_path / "images")]
    assert scale.main(["--quick", "--minutes", "1e-9", "--json", *folders]) == 0
    told = capsys.readouterr()
    assert re.fullmatch(r"about \d+ minutes in all: layers \d+\.\d, context \d+\.\d\n", told.err)
    found: dict[str, Any] = json.loads(told.out.splitlines()[-1])
    assert set(found["ratio"]["layers"]) == {"4", "8"} and found["agree"] == 1.0
    assert set(found["ratio"]["context"]) == {"16", "32"}
    assert set(found["memory"]["resident memory"]["mlx-lm"]) == {"16", "32", "64"}
    (file,) = (tmp_path / "results").iterdir()
    rows = results.read(file)
    assert {row.setting for row in rows if row.unit == "ratio"} == {
        "axis=layers context=48 layers=4", "axis=layers context=48 layers=8", "axis=context context=16",
        "axis=context context=32",
    }  # fmt: skip
    assert all(row.count == 3 for row in rows if row.unit == "ratio")
    assert all(row.count == 1 for row in rows if row.unit == "bytes")
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["scale-context.png", "scale-layers.png", "scale-memory.png"]


def test_contexts_double_up_to_the_longest_and_single_runs_go_further(capsys):
    points = scale.axes_of(False, 1024, 4096)[0].points
    assert [(point.context, point.once) for point in points] == [
        (256, False), (512, False), (1024, False), (2048, True), (4096, True),
    ]  # fmt: skip
    assert [point.context for point in scale.axes_of(False, 2000, 0)[0].points] == [256, 512, 1024]
    with pytest.raises(SystemExit):
        scale.main(["--longest", "300"])  # one context: no slope
    assert capsys.readouterr().err.endswith("--longest: expected an integer from 512, got '300'\n")


# how long it takes


def reading(layers: int, context: int) -> float:
    """Multiply-adds of a prompt."""
    return context * growth.prefill_work(config(layers=layers), context)


def axes() -> list[scale.Axis]:
    contexts = tuple(scale.Point(n, TINY, n, once=n > 40) for n in (20, 40, 80))
    layers = tuple(scale.Point(n, TINY | {"layers": n}, 20) for n in (4, 8))
    return [
        scale.Axis("context", "flagship", contexts, 5, 0.5),
        scale.Axis("layers", "flagship", layers, 5, 0.5),
    ]


@pytest.mark.parametrize(("rounds", "expected"), [(0.1, 3), (5.5, 5), (99.0, 12)])
def test_an_axis_takes_its_rounds_its_single_runs_and_its_loading(rounds, expected):
    def work(layers: int, context: int) -> float:
        return reading(layers, context) + 4 * growth.decode_work(config(layers=layers), context + 2.5)

    context, layers = axes()
    one, paces = work(4, 20) + work(4, 40), [(1.0, 1.0), (3.0, 3.0)]  # seconds for each multiply-add
    found = forecast.Forecast([context], 2 * rounds * 4 * one).predicted(context, paces, 7.0)
    assert found == pytest.approx(7.0 + expected * 4 * one + 4 * work(4, 80))
    two = work(4, 20) + work(8, 20)
    found = forecast.Forecast([layers], 2 * rounds * 4 * two).predicted(layers, paces, 7.0)
    assert found == pytest.approx(14.0 + expected * 4 * two)  # two checkpoints


def test_how_long_it_takes_is_said_once_from_the_first_point(capsys):
    with forecast.Forecast(axes(), 1e-9) as found:
        # both read 20 tokens in 10 minutes; of the time since the start, which is none, that leaves -20 for loading
        found.learn({name: run(20, 600.0, 0.0, ()) for name in sides.PROGRAMS}, config())
        found.learn({}, config())
    context = 20 * (3 * (reading(4, 20) + reading(4, 40)) + reading(4, 80)) / reading(4, 20) - 20
    layers = 20 * 3 * (reading(4, 20) + reading(8, 20)) / reading(4, 20) - 40
    assert capsys.readouterr().err == (
        f"about {context + layers:.0f} minutes in all: context {context:.1f}, layers {layers:.1f}\n"
    )


def test_without_matplotlib_it_says_how_to_get_it_before_it_measures(capsys, monkeypatch):
    pytest.importorskip("mlx_lm")
    monkeypatch.setattr(scale, "find_spec", lambda name: None)
    assert scale.main([]) == 1
    assert capsys.readouterr().err == (
        f"moelocal: error: matplotlib is not installed here: {sys.executable} -m pip install matplotlib\n"
    )


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "1441", "soon"])
def test_minutes_are_minutes(capsys, minutes):
    with pytest.raises(SystemExit) as ended:
        scale.main([f"--minutes={minutes}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{Path(sys.argv[0]).name}: error: argument --minutes: expected minutes, up to 1440, got '{minutes}'"
    )


def test_a_slice_without_attention_is_refused(capsys):
    assert scale.main(["--slice", "--layers", "3"]) == 1
    assert capsys.readouterr().err == (
        "moelocal: error: --layers: expected at least 4, one of them attention (mlx-lm needs it), got 3\n"
    )


def test_a_slice_that_does_not_fit_is_refused_with_what_would(monkeypatch):
    monkeypatch.setattr(scale.machine, "memory", lambda: 8 * 10**9)
    written = synthetic.Written(Path("x"), 0, 2_500_000_000)
    with pytest.raises(scale.RequestError) as error:
        scale._check_memory(scale.slice_of(4)[0], written)
    assert str(error.value) == (
        "--layers: two programs with 2.50 GB of weights each need about 12.50 GB, this machine has 8.00 GB; take fewer "
        "layers"
    )
    scale._check_memory(scale.slice_of(4)[0], synthetic.Written(Path("x"), 0, 1_000_000_000))
