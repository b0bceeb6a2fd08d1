"""`moelocal evaluate` as a program: what it prints where, what it draws, what it refuses."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moelocal.chat.command import exit_code
from moelocal.errors import RequestError
from moelocal.evaluate import Estimate, Part, Quality, Weights
from moelocal.evaluate.command import add_flags, run, table
from moelocal.hub import EMBEDDED
from moelocal.quantize.corpus import Corpus
from packed import pack
from parity.checkpoints import SMALL, Recipe, write


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A model in 4 bits and its original, with a tokenizer."""
    folder = tmp_path_factory.mktemp("pair")
    original = write(folder / "original", Recipe("qwen3_5_moe", **SMALL | {"vocab": 1536}))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / name, original)
    return pack(original, folder / "packed", 4), original


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOELOCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return exit_code(run, parser.parse_args(list(map(str, arguments))))


def test_the_table_and_one_object_as_the_last_line(pair, capsys):
    flags = ("--tokens", 300, "--sequence-length", 60)
    assert call(pair[0], "--reference", pair[1], *flags, "--json") == 0
    first = capsys.readouterr()
    *lines, last = first.out.splitlines()
    found = json.loads(last)
    assert found["corpus_digest"] == Corpus.built_in(pair[1], "evaluation", 300, 60).digest
    assert found["tokens"] == 300 - found["sequences"] and found["dtype"] == "float32"
    assert lines[0].startswith(f"model      {pair[0]}: ")
    assert f"           sha256 {found['corpus_digest']}" in lines
    mean = next(line for line in lines if line.startswith("KL divergence, mean"))
    assert float(mean.split()[3]) == pytest.approx(found["kl_mean"]["value"], rel=1e-3)
    assert re.fullmatch(r"reference kept in \S+ \([\d.]+ [kM]?B(ytes)?\)\n", first.err.replace("bytes", "B"))
    # again: the reference is taken as it is, and everything but that is the same
    assert call(pair[0], "--reference", pair[1], *flags, "--json") == 0
    second = capsys.readouterr()
    assert second.out.splitlines()[:-1] == lines
    assert json.loads(second.out.splitlines()[-1]) == found | {"reference_reused": True}
    assert second.err.startswith("reference taken from ")


def test_the_cost_of_keys_and_values_in_fewer_bits(capsys):
    means = {}
    for bits in (8, 4):
        # without a reference the model itself is it: the divergence is what the bits cost
        assert call(EMBEDDED, "--kv-bits", bits, "--tokens", 600, "--sequence-length", 200, "--json") == 0
        *lines, last = capsys.readouterr().out.splitlines()
        found = json.loads(last)
        assert found["model"] == found["reference"] and found["kv_bits"] == bits
        assert f"cache      the model's keys and values in {bits} bits, the reference's as they are" in lines
        means[bits] = found["kl_mean"]["value"]
    assert 0 < 10 * means[8] < means[4] < 0.05


def test_a_reference_is_asked_for(pair, capsys):
    assert call(pair[0]) == 1
    expected = "moelocal: error: --reference: expected the original weights, got none\n"
    assert capsys.readouterr().err == expected


def test_a_text_of_the_user(pair, tmp_path, capsys):
    file = tmp_path / "mine.txt"
    file.write_text("Some words of mine. " * 30)
    assert call(pair[0], "--reference", pair[1], "--text", file, "--dtype", "bfloat16", "--json") == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert (found["corpus"], found["sequences"], found["dtype"]) == ("mine.txt", 1, "bfloat16")
    assert found["kl_mean"]["low"] is None
    assert "by kind of text" not in out  # there is only one
    assert out.splitlines()[2].endswith(" tokens to predict in 1 sequence")


ESTIMATE = Estimate(0.5, 0.25, 0.75)
QUALITY = Quality(
    model=Weights(
        "out", 20_900_000_000, 4.8231, 2_541_000_000, (("affine 4 bits in groups of 64", 300), ("bfloat16", 90))
    ),
    reference=Weights("owner/name", 69_300_000_000, 16.0, 5_900_000_000, (("bfloat16", 390),)),
    corpus="built-in evaluation text",
    corpus_digest="abc123",
    sequences=64,
    tokens=4,
    dtype="bfloat16",
    kv_bits=None,
    device="gpu",
    kl_mean=Estimate(0.0123456, 0.0119, 0.0131),
    kl_median=Estimate(0.005, 0.0049, 0.0051),
    kl_p95=Estimate(0.05, 0.04, 0.06),
    kl_p99=Estimate(0.11, 0.1, 0.12),
    kl_p999=Estimate(0.4, None, None),
    kl_max=3.25,
    kl_slack=0.00012,
    kl_histogram=(1,) + (0,) * 20 + (1, 0, 1, 0, 1) + (0,) * 16,
    top1=Estimate(0.9423, 0.94, 0.9456),
    acceptance=Estimate(0.9512, 0.95, 0.9525),
    acceptance_slack=0.0001,
    perplexity=Estimate(6.7354, 6.5, 6.9),
    reference_perplexity=Estimate(6.7221, 6.49, 6.89),
    perplexity_ratio=Estimate(1.00198, 1.001, 1.003),
    router_overlap={layer: Estimate(1 - layer / 100, None, None) for layer in range(12)},
    router_overlap_mean=Estimate(0.945, 0.94, 0.95),
    parts={
        "documentation": Part(3, Estimate(0.02, None, None), ESTIMATE, ESTIMATE, Estimate(7.5, None, None), ESTIMATE),
        "chats": Part(1, Estimate(0.01, None, None), ESTIMATE, ESTIMATE, Estimate(5.5, None, None), ESTIMATE),
    },
    reference_reused=True,
)  # fmt: skip


def test_the_table_word_for_word():
    assert (
        "\n".join(table(QUALITY))
        == """\
model      out: 20.90 GB, 4.82 bits per weight, 2.54 GB read per token (300 affine 4 bits in groups of 64, 90 bfloat16)
reference  owner/name: 69.30 GB, 16.00 bits per weight, 5.90 GB read per token (390 bfloat16)
text       built-in evaluation text: 4 tokens to predict in 64 sequences
           sha256 abc123
computed   in bfloat16 on the gpu

                             value   95 % interval over sequences
KL divergence, mean        0.01235   0.0119 to 0.0131        nats per token; at most 1e-04 too low
  median                     0.005   0.0049 to 0.0051
  95th percentile             0.05   0.04 to 0.06
  99th percentile             0.11   0.1 to 0.12
  99.9th percentile            0.4
  maximum                     3.25
top-1 agreement           94.230 %   94.000 % to 94.560 %
expected acceptance       95.120 %   95.000 % to 95.250 %    at most 1e-04 too high
perplexity                   6.735   6.5 to 6.9
  of the reference           6.722   6.49 to 6.89
  ratio                    1.00198   1.00100 to 1.00300
router overlap            94.500 %   94.000 % to 95.000 %

by kind of text             tokens    KL mean     top-1  perplexity  reference
  documentation                  3       0.02  50.000 %         7.5        0.5
  chats                          1       0.01  50.000 %         5.5        0.5

router overlap by layer, %
    0   100.00  99.00  98.00  97.00  96.00  95.00  94.00  93.00  92.00  91.00
   10    90.00  89.00

KL divergence of single positions
  below 1e-08   25.00 % ████████████████████████████████████████
  from 1.0e-08   0.00 %
  from 3.2e-08   0.00 %
  from 1.0e-07   0.00 %
  from 3.2e-07   0.00 %
  from 1.0e-06   0.00 %
  from 3.2e-06   0.00 %
  from 1.0e-05   0.00 %
  from 3.2e-05   0.00 %
  from 1.0e-04   0.00 %
  from 3.2e-04   0.00 %
  from 1.0e-03  25.00 % ████████████████████████████████████████
  from 3.2e-03  25.00 % ████████████████████████████████████████
  from 1.0e-02  25.00 % ████████████████████████████████████████"""
    )


def test_a_dense_model_of_one_kind_of_text_has_a_shorter_table():
    lines = list(
        table(
            dataclasses.replace(
                QUALITY, router_overlap={}, router_overlap_mean=None, parts={"text": QUALITY.parts["chats"]}
            )
        )
    )
    assert not any("router" in line or "by kind" in line for line in lines)


@pytest.mark.parametrize("kind, magic", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
@pytest.mark.parametrize("routed", [True, False])
def test_a_plot(tmp_path, kind, magic, routed):
    pytest.importorskip("matplotlib")
    from moelocal.evaluate.plot import plot

    file = tmp_path / f"quality.{kind}"
    file.write_bytes(b"an older one")
    plot(QUALITY if routed else dataclasses.replace(QUALITY, router_overlap={}), file)
    assert file.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [file]


def full(descriptor):
    raise OSError(28, "No space left on device")


def test_a_plot_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from moelocal.evaluate import plot as module

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RequestError) as caught:
        module.plot(QUALITY, tmp_path / "quality.png")
    assert str(caught.value) == f"{tmp_path / 'quality.png'}: cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_fails_after_hours_takes_no_figures_with_it(pair, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("os.fsync", full)
    file = tmp_path / "quality.png"
    given = (pair[0], "--reference", pair[1], "--tokens", 60, "--plot", file, "--json")
    assert call(*given) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["kl_mean"]["value"] > 0
    assert shown.err.endswith(f"moelocal: error: {file}: cannot be written: No space left on device\n")


def refused(capsys, *arguments: object) -> str:
    assert call(*arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def test_plots_that_cannot_be_are_refused_before_anything_runs(tmp_path, capsys, monkeypatch):
    flags = ("nowhere", "--reference", "nowhere", "--plot")
    assert refused(capsys, *flags, "a.txt") == (
        "moelocal: error: --plot a.txt: expected a name that ends in .png, .svg, .pdf\n"
    )
    assert refused(capsys, *flags, tmp_path / "no/a.png") == (
        f"moelocal: error: --plot {tmp_path / 'no/a.png'}: no folder {tmp_path / 'no'}\n"
    )
    (tmp_path / "folder.png").mkdir()
    assert refused(capsys, *flags, tmp_path / "folder.png") == (
        f"moelocal: error: --plot {tmp_path / 'folder.png'}: is a folder; expected the name of a file\n"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused(capsys, *flags, tmp_path / "a.png") == (
        f"moelocal: error: --plot needs matplotlib: {sys.executable} -m pip install matplotlib\n"
    )


def test_errors_are_one_line(pair, tmp_path, capsys):
    (tmp_path / "latin").write_bytes("Größe".encode("latin-1"))
    given = (pair[0], "--reference", pair[1])
    assert refused(capsys, *given, "--text", tmp_path / "latin") == (
        f"moelocal: error: {tmp_path / 'latin'}: not UTF-8 text: byte 2 is 0xf6\n"
    )
    assert refused(capsys, *given, "--tokens", 1) == (
        "moelocal: error: expected at least 2 tokens in sequences of at least 2, got 1 in 1024\n"
    )
    assert refused(capsys, pair[0], "--reference", tmp_path / "no") == (
        f"moelocal: error: {tmp_path / 'no'}: no such folder; a model is a folder or a Hugging Face name like "
        "owner/name\n"
    )


PROGRAM = """
import argparse, os, sys
sys.addaudithook(lambda event, arguments: event.startswith("socket.") and os._exit(99))
from moelocal.chat.command import exit_code
from moelocal.errors import RequestError
from moelocal.evaluate.command import add_flags, run
parser = argparse.ArgumentParser()
add_flags(parser)
sys.exit(exit_code(run, parser.parse_args()))
"""


def test_a_terminal_sees_bars_with_the_time_that_is_left_and_no_socket_is_opened(pair, cache):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, pair[0], "--reference", pair[1], "--tokens", "300"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=False)
    os.close(theirs)
    shown = os.read(ours, 1 << 20).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "running the reference" in shown and "running the model" in shown
    assert re.search(r"\d:\d\d:\d\d", shown)
    assert "\x1b" not in done.stdout.decode()
