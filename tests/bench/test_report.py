"""What is made of a measurement: bytes of a token, where tokens part, tables, rows and pictures."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import pytest

from moelocal.bench.bytes import moved_per_token, read_per_token
from moelocal.bench.header import Header, Identity
from moelocal.bench.peers import OURS, Loaded, Sample
from moelocal.bench.plot import plot
from moelocal.bench.printed import lines
from moelocal.bench.report import Agreement, Parting, Result
from moelocal.bench.speed import Measured
from moelocal.config import ModelConfig
from moelocal.engine.plan import weights_nbytes
from moelocal.errors import RequestError
from moelocal.hub import EMBEDDED
from moelocal.model import Decoder


def test_bytes_per_token_are_all_weights_but_unused_experts_and_rows():
    decoder = Decoder.open(EMBEDDED, mx.float32)
    config = decoder.config
    unused = 0
    for block in decoder.blocks:
        routed = sum(array.nbytes for array in block.mlp.routed.arrays)
        unused += routed * (block.mlp.spec.experts - block.mlp.spec.per_token) // block.mlp.spec.experts
    assert not config.tied  # of the embedding one row is read
    unused += 4 * config.hidden * (config.vocab - 1)
    assert read_per_token(decoder) == weights_nbytes(decoder) - unused


def test_bytes_beside_the_weights_grow_with_the_context(root):
    raw = json.loads((root / "benchmarks/configs/qwen3.6-35b-a3b.json").read_text())
    config = ModelConfig.parse(raw)
    # of 40 layers 10 attend: 2 heads of 256, keys and values, two bytes each
    position = 10 * 2 * 2 * 256 * 2
    # 30 delta nets: 32 heads with a state of 128 x 128 in float32, and 3 rows of 8192 channels
    state = 30 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    assert moved_per_token(config, 1_700_000_000, 1000, 2) == 1_700_000_000 + 2 * state + 1002 * position


def result(ours: tuple[int, ...], theirs: tuple[int, ...], side: str = "mlx-lm") -> Result:
    measured = Measured((OURS, side), (0,), 4, True)
    measured.starts = {
        OURS: [Loaded("1", 1.0, dtype="float32", read_per_token=1000)],
        side: [Loaded("2", 3.0)],
    }
    measured.runs[0, 0] = {
        name: Sample(1, tokens, 4, 1.0, seconds)
        for name, tokens, seconds in ((OURS, ours, 1.0), (side, theirs, 2.0))
    }
    header = Header("m", "chip", 1, 1, 1e9, "p", "s", "3", "0", "cpu", "c", "2026-01-01T00:00:00Z", "x")
    return Result(
        header,
        Identity("n", "q", 1, "h"),
        ModelConfig.read(EMBEDDED),
        measured,
        lambda tokens: (tokens, 0 in tokens),
        [True] * 9 + [False],
    )


def test_where_tokens_part():
    assert result((1, 2, 3, 4), (1, 2, 3, 4)).agreement("mlx-lm") == Agreement(1, 4, ())
    assert result((1, 2, 3, 4), (1, 2, 8, 4)).agreement("mlx-lm") == Agreement(1, 2, (Parting(0, 1, 3),))
    # row 9 of the output is no token here, and moelocal never chooses such a row
    assert result((1, 2, 3, 4), (1, 2, 9, 4)).agreement("mlx-lm") == Agreement(
        1, 2, (Parting(0, 1, 3, True),)
    )
    # in text of a server the last token of either may be cut
    assert result((1, 2, 3, 4), (1, 2, 9), "localhost:1").agreement("localhost:1") == Agreement(1, 2, ())
    assert result((1, 2, 3, 4), (1, 9, 3), "localhost:1").agreement("localhost:1") == Agreement(
        1, 1, (Parting(0, 1, 2),)
    )
    assert not Agreement(0, 0, ()).same


def test_an_answer_that_ends_is_not_the_same_as_one_that_goes_on():
    found = result((1, 2, 0), (1, 2, 0, 4), "localhost:1")  # the test's own rule: 0 ends ours
    assert found.agreement("localhost:1") == Agreement(1, 3, ())
    longer = result((1, 2, 0), (1, 2, 0, 4, 5), "localhost:1")
    assert longer.agreement("localhost:1") == Agreement(1, 3, (Parting(0, 1, 4),))
    shorter = result((1, 2, 3, 4), (1, 2), "localhost:1")
    assert shorter.agreement("localhost:1").same
    runs = shorter.measured.runs[0, 0]
    runs["localhost:1"] = replace(runs["localhost:1"], ended=True)
    assert shorter.agreement("localhost:1") == Agreement(1, 2, (Parting(0, 1, 3),))


def test_a_pair_is_reported_and_drawn_with_its_ratio(tmp_path):
    found = result((1, 2, 3, 4), (1, 2, 9, 4))
    shown = list(lines(found))
    at = shown.index("moelocal beside mlx-lm 2, in turns: times as fast (95 % interval)")
    assert shown[at + 1 :] == [
        "  context  decode  pairs",
        "        0    2.00      1",
        "  loading    3.00",
        "  no ratio of prefill at 0: a prompt of fewer than 64 tokens says nothing",
        "NOT the same tokens in 1 of 1 pairs:",
        "  context 0, round 1: they part at token 3; mlx-lm chose a row of the output that is no token",
    ]
    plot(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    with pytest.raises(RequestError) as caught:
        plot(found, tmp_path / "none" / "picture.png")
    assert str(caught.value) == f"{tmp_path}/none/picture.png: cannot be written: No such file or directory"
    rows = [row for row in found.rows() if row.program == "moelocal : mlx-lm 2"]
    assert [(row.figure, row.value, row.remark) for row in rows] == [
        ("decode ratio", 2.0, "tokens part from token 3 on")
    ]


def test_a_ratio_stands_without_the_other_and_a_small_one_keeps_its_digits():
    found = result((1, 2, 3, 4), (1, 2, 3, 4), "m at localhost:1")
    ours, theirs = found.measured.runs[0, 0].values()
    found.measured.contexts = (0, 512)
    for number, slower in enumerate((9000, 11000)):
        slow = replace(ours, prompt_tokens=512, first_seconds=slower)
        in_one_piece = replace(theirs, prompt_tokens=512, rest_seconds=0.0)
        found.measured.runs[512, number] = dict(zip(found.measured.sides, (slow, in_one_piece), strict=True))
    shown = list(lines(found))
    at = shown.index("moelocal beside m at localhost:1, in turns: times as fast (95 % interval)")
    assert shown[at + 1 : at + 7] == [
        "  context  decode  prefill                          pairs",
        "        0    2.00                                       1",
        "      512          0.000101 (2.81e-05 to 0.000360)      2",
        "  loading    3.00",
        "  no ratio of prefill at 0: a prompt of fewer than 64 tokens says nothing",
        "  no ratio of decode at 512: an answer was of one token, or came in one piece",
    ]


def test_a_run_that_was_stopped_says_so_wherever_it_is_read(tmp_path):
    found = result((1, 2, 3, 4), (1, 2, 9, 4))
    assert {row.remark for row in found.rows()} == {"", "tokens part from token 3 on"}
    assert not any("stopped" in line for line in lines(found))
    found.measured.interrupted = True
    assert {row.remark for row in found.rows()} == {
        "stopped early",
        "tokens part from token 3 on; stopped early",
    }
    assert "4 tokens decoded greedily; stopped early, in round 1: median (least to largest)" in lines(found)
    assert list(lines(found))[-1] == "note: stopped early; the figures are of what was measured until then"


def test_a_table_has_median_spread_and_memory_and_no_column_of_nothing():
    found = result((1, 2, 3, 4), (1, 2, 3, 4))
    shown, title = list(lines(found)), "moelocal c; loads in 1.00 s"
    limit = f"{3 * found.moved(0) / 1e9:.0%}"  # three tokens behind the first in a second; 1 GB/s are copied
    assert shown[shown.index(title) + 1 :][:3] == [
        "            decode,     of     first",
        "  context  tokens/s  limit  token, s",
        f"        0      3.00  {limit:>5}     1.000",
    ]
    runs = found.measured.runs
    for number, seconds in ((1, 3.0), (2, 0.01)):
        told = replace(runs[0, 0][OURS], rest_seconds=seconds, peak_nbytes=10**6, resident_nbytes=9 * 10**6)
        runs[0, number] = {OURS: told}
    shown = list(lines(found))
    assert shown[shown.index(title) + 1 :][:3] == [
        "           decode,                of     first    MLX,  resident,",
        "  context  tokens/s            limit  token, s    most       most",
        f"        0  3.00 (1.00 to 300)  {limit:>5}     1.000  1.0 MB     9.0 MB",
    ]
