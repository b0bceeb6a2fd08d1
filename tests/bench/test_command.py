"""`moelocal bench` as a program: real runs of the embedded model, beside a server and mlx-lm, and what is refused."""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import moelocal
from bench.local_server import DONE, event, listing, piece, serving, streaming
from moelocal.bench import bandwidth, command, peers, worker
from moelocal.bench.bytes import moved_per_token, read_per_token
from moelocal.bench.command import add_flags, run
from moelocal.bench.energy import Meter
from moelocal.bench.header import Header, Identity
from moelocal.bench.peers import OURS, Loaded, Process, Prompt, Sample, SideFailed
from moelocal.bench.plot import plot
from moelocal.bench.report import Agreement, Parting, Result
from moelocal.bench.results import read
from moelocal.bench.speed import Measured
from moelocal.chat.command import exit_code
from moelocal.config import ModelConfig
from moelocal.engine.plan import weights_nbytes
from moelocal.errors import MoelocalError, RequestError
from moelocal.hub import EMBEDDED
from moelocal.model import Decoder
from moelocal.text.template import ChatTemplate

SHORT = ("--contexts", "0,64", "--tokens", 4, "--rounds", 1, "--loads", 1)
PACKAGE = Path(moelocal.__file__).parents[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """The bandwidth of this machine takes a second to measure, and is not what is tested here."""
    monkeypatch.setattr(bandwidth, "measured", lambda: 40e9)


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return exit_code(run, parser.parse_args(list(map(str, arguments))))


def refused(capsys, *arguments: object) -> str:
    assert call(*arguments) == 1
    told = capsys.readouterr()
    assert told.out == ""
    return told.err.removeprefix("moelocal: error: ").rstrip("\n")


def test_the_embedded_model_is_measured_and_the_figures_go_everywhere(tmp_path, capsys):
    assert call(*SHORT, "--results", tmp_path / "results", "--json") == 0
    told = capsys.readouterr()
    *lines, last = told.out.splitlines()
    found = json.loads(last)
    assert found["model"]["dtype"] == "float32" and found["tokens"] == 4
    ours = found["programs"]["moelocal"]["contexts"]
    assert [ours[context]["prompt_tokens"] for context in ("0", "64")] == [[1], [64]]
    assert ours["64"]["decoded"] == [4]
    assert "prefill" not in ours["0"], "a prompt of one token says nothing about reading"
    assert ours["64"]["prefill"]["value"] == pytest.approx(64 / ours["64"]["first_token"]["value"])
    # at least the weights are in memory
    assert ours["64"]["MLX_memory"]["value"] > 18_000_000
    assert ours["64"]["resident_memory"]["value"] > ours["64"]["MLX_memory"]["value"]
    limit = 40e9 / moved_per_token(ModelConfig.read(EMBEDDED), 8_258_112, 64 + 2, 4)
    assert ours["64"]["share_of_limit"]["value"] == pytest.approx(ours["64"]["decode"]["value"] / limit)
    loading = found["programs"]["moelocal"]["loading"]
    assert loading["load"]["value"] > 0 and loading["MLX_memory_while_loading"]["value"] > 18_000_000
    assert found["beside"] == {}
    (file,) = (tmp_path / "results").glob("*.tsv")
    (picture,) = (tmp_path / "results").glob("*.png")
    assert f"results    {file}" in lines and f"plot       {picture}" in lines
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = {(row.setting, row.figure): row for row in read(file)}
    decode = rows["context=64 tokens=4 dtype=float32", "decode"]
    assert decode.value == pytest.approx(ours["64"]["decode"]["value"], rel=1e-5)
    assert (decode.program, decode.unit, decode.low, decode.count) == ("moelocal", "tokens/s", None, 1)
    assert decode.model == Identity.of(EMBEDDED, "embedded")
    assert lines[6].startswith("model      embedded: 9.2 MB, 16.00 bits per weight")
    assert "loads in" in told.out and "\n      64  " in told.out


def test_nothing_is_written_that_was_not_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command.results, "default_folder", lambda: tmp_path / "never")
    assert call(*SHORT, "--no-results", "--plot", "here.png") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["here.png"]


# servers


class Greedy:
    """A server with the embedded model, which answers what the model would, or changes a word of it."""

    def __init__(self, spoil: bool = False, usage: bool = True, read: float = 1.0) -> None:
        self.spoil, self.usage, self.read = spoil, usage, read
        self.model = moelocal.load()

    def __call__(self, handler: Any) -> None:
        body = handler.server.asked[-1][1]
        greedy = moelocal.Sampling(temperature=0)
        done = moelocal.generate(self.model, body["messages"], max_tokens=body["max_tokens"], sampling=greedy)
        words = [done.reasoning, done.text]
        if self.spoil:
            changed = 0 if done.reasoning else 1
            words[changed] = words[changed][:3] + " indeed" + words[changed][3:]
        pieces = [
            piece(reasoning_content=words[0][:3]),
            piece(reasoning_content=words[0][3:]),
            piece(content=words[1]),
        ]
        count = {
            "prompt_tokens": int(done.usage.prompt * self.read),
            "completion_tokens": done.usage.completion,
        }
        told = [event({"choices": [], "usage": count})] if self.usage else []
        streaming(*pieces, piece("length"), *told, DONE)(handler)


def beside(capsys, post, *more: object) -> tuple[dict[str, Any], str, str]:
    """The figures beside a server, what was printed, and where the server was."""
    with serving(listing("tiny"), post) as server:
        flags = ("--contexts", "128", "--tokens", 12, "--rounds", 1, "--loads", 1, "--no-results", "--json")
        assert call(*flags, "--against", server.address, *more) == 0
        out = capsys.readouterr().out
        first, *asked = [body for path, body in server.asked if body]
        assert first["max_tokens"] == 1, "it is asked for a token before a model is loaded here"
        assert all(body["temperature"] == 0.0 and body["max_tokens"] == 12 for body in asked)
        texts = [body["messages"][0]["content"] for body in asked]
        assert len(set(texts)) == len(texts), "a prompt was asked twice: a cache may have answered"
    return json.loads(out.splitlines()[-1]), out, server.address


def test_a_server_that_says_the_same_is_measured_in_pairs(capsys):
    found, out, address = beside(capsys, Greedy())
    assert found["programs"][address]["title"] == f"tiny at {address}"
    pair = found["beside"][address]
    assert pair["same_tokens"] and pair["tokens_compared"] > 8 and pair["parted"] == []
    assert pair["contexts"]["128"]["decode"]["pairs"] == 1
    ours, theirs = (found["programs"][side]["contexts"]["128"] for side in ("moelocal", address))
    assert ours["prompt_tokens"] == theirs["prompt_tokens"] == [128]
    assert pair["contexts"]["128"]["prefill"]["value"] == pytest.approx(
        ours["prefill"]["value"] / theirs["prefill"]["value"]
    )
    assert "MLX_memory" not in theirs and "share_of_limit" not in theirs
    assert "same tokens in all 1 pairs" in out and "(its text, cut by our tokenizer)" in out


def test_a_server_that_says_something_else_is_told_apart(capsys):
    found, out, address = beside(capsys, Greedy(spoil=True))
    pair = found["beside"][address]
    assert not pair["same_tokens"] and pair["parted"][0]["context"] == 128
    assert "NOT the same tokens in 1 of 1 pairs" in out
    assert f"they part at token {pair['parted'][0]['token']}" in out


@pytest.mark.slow
def test_tokens_that_a_server_does_not_count_are_called_estimated(capsys):
    found, out, address = beside(capsys, Greedy(usage=False))
    assert found["programs"][address]["contexts"]["128"]["counted"] is False
    assert found["programs"]["moelocal"]["contexts"]["128"]["counted"] is True
    assert "  the server does not count its tokens: estimated by cutting its text with our tokenizer" in out


@pytest.mark.slow
def test_a_server_that_cuts_the_prompt_is_not_compared(capsys):
    found, _, address = beside(capsys, Greedy(read=0.5))
    assert found["beside"] == {}
    assert re.fullmatch(
        rf"{address}: it read \d+ tokens of a prompt that has about \d+ and left out the rest; "
        "give it a larger context there at 128 tokens, not measured from there on",
        found["notes"][0],
    )


@pytest.mark.parametrize(
    ("models", "more", "words"),
    [
        (("a", "b"), (), "server HERE: it serves 2 models; name one: a, b (--server-model)"),
        (
            ("a", "b"),
            ("--server-model", "c"),
            "server HERE: /v1/chat/completions: 404 Not Found: no model c",
        ),
    ],
)
def test_which_model_of_a_server_must_be_known(models, more, words, capsys):
    def post(handler):
        handler.whole(404, b'{"error": {"message": "no model c"}}')

    with serving(listing(*models), post) as server:
        assert refused(capsys, "--against", server.address, *more).replace(server.address, "HERE") == words


# what is refused


def test_prompts_go_nowhere_else(capsys, monkeypatch):
    monkeypatch.setattr(command, "prepared", lambda *_, **__: pytest.fail("a model was loaded"))
    assert refused(capsys, "--against", "api.example.com:443") == (
        "server api.example.com:443: api.example.com is not this machine (localhost, 127.0.0.1, ::1), and prompts stay "
        "on it; expected an address like localhost:1234"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--against", "localhost:1", "--against", "localhost:1"), "--against localhost:1: named twice"),
        (
            ("--server-model", "m"),
            "--server-model names a model of a server, and no server is named by --against",
        ),
        (("--plot", "x.pdf"), "--plot x.pdf: expected a name that ends in .png"),
        (("--plot", "/no/such/x.png"), "--plot /no/such/x.png: no folder /no/such"),
        (
            ("--contexts", "8k", "--no-results"),
            "--contexts 8192: the model's context is 4,096 tokens, 128 of them for the answer; at most 3,968 is "
            "possible",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, words, capsys):
    assert refused(capsys, *arguments) == words


@pytest.mark.parametrize(
    "arguments",
    [("--contexts", "1,x"), ("--contexts", "-1"), ("--tokens", "1"), ("--rounds", "0"), ("--rounds", "²")],
)
def test_numbers_that_are_none_are_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert caught.value.code == 2


def test_a_peer_that_is_not_installed_comes_with_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "requires", lambda name: ["mlx>=1", 'mlx-lm==0.32.2; extra == "compare"'])
    assert refused(capsys, "--against", "mlx-lm") == (
        f"--against mlx-lm: it is not installed here: {sys.executable} -m pip install 'mlx-lm==0.32.2'"
    )


def test_a_model_that_does_not_fit_comes_with_what_would(capsys, monkeypatch):
    monkeypatch.setenv("MOELOCAL_MEMORY", "12MB")
    monkeypatch.setattr(command, "WORKING", 2_000_000)
    found = refused(capsys)
    assert re.fullmatch(
        r"embedded: 18\.5 MB of weights do not fit the 12\.0 MB that a model may take here; its original weights "
        r"quantized with `moelocal quantize --recipe \w+` would \(\d\.\d MB\); a Mac with 8 GB would hold it as it is; "
        r"or allow more with MOELOCAL_MEMORY",
        found,
    )
    monkeypatch.setattr(command, "_MACS", ())
    monkeypatch.setenv("MOELOCAL_MEMORY", "1MB")
    assert refused(capsys) == (
        "embedded: 18.5 MB of weights do not fit the 1.0 MB that a model may take here; no recipe makes it small "
        "enough, and no Mac is large enough; or allow more with MOELOCAL_MEMORY"
    )


def test_a_context_for_which_memory_has_no_room_is_refused_with_the_one_that_fits(capsys, monkeypatch):
    monkeypatch.setattr(command, "WORKING", 0)
    monkeypatch.setenv("MOELOCAL_MEMORY", "28MB")
    found = refused(capsys, "--contexts", "0,2048", "--no-results")
    assert re.fullmatch(
        r"--contexts 2048: memory has room for [\d,]+ tokens, 128 of them for the answer; at most [\d,]+ is possible",
        found,
    )


# processes


def test_a_process_that_dies_says_so_and_can_be_started_again(tmp_path):
    side = Process(OURS, EMBEDDED, None, Meter(None))
    try:
        side.start()
        assert side._process is not None
        side._process.kill()
        with pytest.raises(SideFailed) as caught:
            side.run(Prompt("a"), 2)
        assert str(caught.value) == (
            "moelocal: its process was ended by the system, as happens where memory is short"
        )
        side.stop()
        side.start()
        assert len(side.run(Prompt("a"), 2).tokens) == 2
    finally:
        side.stop()


def test_what_goes_wrong_in_a_process_is_told_without_a_traceback(tmp_path):
    broken = shutil.copytree(EMBEDDED, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    side = Process(OURS, broken, None, Meter(None))
    try:
        with pytest.raises(SideFailed) as caught:
            side.start()
        with pytest.raises(MoelocalError) as expected:
            moelocal.load(broken)
        assert str(caught.value) == f"moelocal: {expected.value}"
    finally:
        side.stop()


def test_answers_are_endless_and_nothing_is_reused():
    side = Process(OURS, EMBEDDED, None, Meter(None))
    try:
        side.start()
        # the model would end its answer here
        prompt = Prompt(
            ChatTemplate.open(EMBEDDED).render(
                [{"role": "user", "content": "What is 2 + 3?"}], thinking=False
            )
        )
        first, second = side.run(prompt, 40), side.run(prompt, 40)
    finally:
        side.stop()
    assert first.tokens == second.tokens and len(first.tokens) == 40
    assert moelocal.load().stop_tokens & set(first.tokens[:-1]), "the control: it would have ended before"
    assert (first.cached, second.cached) == (0, 0)
    assert first.prompt_tokens == second.prompt_tokens > 10


class Steps:
    """A meter that counts the marks: each section is one joule more."""

    name = "steps"

    def __init__(self) -> None:
        self.sections = 0.0

    def begin(self) -> None:
        return None

    def joules(self, mark: None) -> float:
        self.sections += 1
        return self.sections


def test_energy_is_taken_up_to_the_first_token_and_from_there():
    side = Process(OURS, EMBEDDED, None, Meter(Steps()))
    try:
        side.start()
        found = side.run(Prompt("Good morning"), 3)
    finally:
        side.stop()
    assert (found.prefill_joules, found.decode_joules) == (1.0, 2.0)


def test_mlx_lm_is_measured_in_the_environment_that_its_users_have(monkeypatch):
    ours = {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "400"}
    monkeypatch.setattr(peers.machine, "chip", lambda: "Apple M3 Max")
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", ours["MLX_MAX_OPS_PER_BUFFER"])
    monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "77")  # somebody else's: it stays
    assert {k: v for k, v in peers.environment("mlx-lm").items() if k in ours} == {
        "MLX_MAX_MB_PER_BUFFER": "77"
    }
    assert {k: v for k, v in peers.environment(OURS).items() if k in ours} == {
        "MLX_MAX_OPS_PER_BUFFER": "1000",
        "MLX_MAX_MB_PER_BUFFER": "77",
    }
    assert peers.environment(OURS)["PYTHONPATH"].split(os.pathsep)[0] == str(PACKAGE)


def test_the_worker_does_not_import_what_it_does_not_measure():
    program = (
        "import sys, runpy; sys.argv = ['worker.py', 'other']\n"
        f"runpy.run_path({worker.__file__!r})\n"
        "assert not {'moelocal', 'mlx'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parity
def test_mlx_lm_says_the_same_from_plain_and_from_packed_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MOELOCAL_CACHE", str(tmp_path))
    for more in ((), ("--quantization", "4bit")):
        flags = ("--contexts", "0,300", "--tokens", 24, "--rounds", 2, "--loads", 1, "--no-results", "--json")
        assert call(*flags, *more, "--against", "mlx-lm") == 0
        out = capsys.readouterr().out
        found = json.loads(out.splitlines()[-1])
        pair = found["beside"]["mlx-lm"]
        assert pair["same_tokens"] and pair["tokens_compared"] == 2 * 2 * 24
        assert pair["contexts"]["300"]["decode"]["pairs"] == 2
        assert found["programs"]["mlx-lm"]["contexts"]["300"]["prompt_tokens"] == [300, 300]
        assert found["programs"]["mlx-lm"]["contexts"]["300"]["MLX_memory"]["value"] > 5_000_000
        assert "same tokens in all 4 pairs, 96 compared" in out


# a person at a terminal


@pytest.mark.slow
def test_ctrl_c_prints_and_keeps_what_was_measured(tmp_path):
    program = f"""
import argparse, sys
from moelocal.bench import bandwidth
bandwidth.measured = lambda: 40e9
from moelocal.bench.command import add_flags, run
from moelocal.chat.command import exit_code
parser = argparse.ArgumentParser(); add_flags(parser)
sys.exit(exit_code(run, parser.parse_args(["--contexts", "0", "--tokens", "64", "--rounds", "9999", "--loads", "1",
    "--results", {str(tmp_path)!r}])))
"""
    reader, writer = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE), "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(writer)
    shown, deadline = b"", time.monotonic() + 60
    while b"round 4 of" not in shown and time.monotonic() < deadline:
        shown += os.read(reader, 65536)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    os.close(reader)
    assert process.returncode == 130
    assert "note: stopped before its end; the figures are of what was measured until then" in out
    (file,) = tmp_path.glob("*.tsv")
    (decode,) = [row for row in read(file) if row.figure == "decode"]
    assert decode.count >= 3


def test_a_process_ends_with_the_one_that_started_it_also_in_the_midst_of_a_run():
    program = f"""
import os, sys
from moelocal.bench.energy import Meter
from moelocal.bench.peers import OURS, Process, Prompt
side = Process(OURS, {str(EMBEDDED)!r}, None, Meter(None))
side.start()
side._send(do="run", text="a", count=4000)
side._answer()
print(side._process.pid, flush=True)
os._exit(9)
"""
    place = os.environ | {"PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=place, check=False
    )
    worker_id, deadline = int(done.stdout), time.monotonic() + 10
    while time.monotonic() < deadline and "worker.py" in words_of(worker_id):
        time.sleep(0.05)
    assert "worker.py" not in words_of(worker_id)


def words_of(process: int) -> str:
    """The command of a process that runs; empty if there is none (a zombie has no words either)."""
    shown = ["ps", "-o", "args=", "-p", str(process)]
    return subprocess.run(shown, capture_output=True, text=True, check=False).stdout


@pytest.mark.slow
def test_without_a_server_no_socket_is_opened(tmp_path):
    program = f"""
import argparse, os, sys
def forbid(event, arguments):
    if event.startswith("socket."):
        os.write(2, event.encode()); os._exit(99)
sys.addaudithook(forbid)
from moelocal.bench import bandwidth
bandwidth.measured = lambda: 40e9
from moelocal.bench.command import add_flags, run
parser = argparse.ArgumentParser(); add_flags(parser)
run(parser.parse_args({[str(each) for each in (*SHORT, "--results", tmp_path)]!r}))
"""
    place = {"PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=os.environ | place, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


# bytes and reports


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
    lines = list(found.lines())
    assert "moelocal beside mlx-lm 2, in turns: times as fast, with 95 % interval" in lines
    assert "       0  2.00                                                1" in lines
    assert "    load  3.00" in lines
    assert "NOT the same tokens in 1 of 1 pairs:" in lines
    assert (
        "  context 0, round 1: they part at token 3; mlx-lm chose a row of the output that is no token"
        in lines
    )
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
