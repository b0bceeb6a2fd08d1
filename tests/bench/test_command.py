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
from pathlib import Path
from typing import Any

import pytest

import moelocal
from bench.local_server import DONE, answer_of, event, listing, piece, serving, streaming
from moelocal.bench import bandwidth, command, peers
from moelocal.bench.bytes import moved_per_token
from moelocal.bench.command import add_flags, run
from moelocal.bench.energy import Meter
from moelocal.bench.header import Identity, machine_name
from moelocal.bench.peers import Served
from moelocal.bench.results import read
from moelocal.bench.server import Server
from moelocal.chat.command import exit_code
from moelocal.config import ModelConfig
from moelocal.hub import EMBEDDED

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
    *shown, last = told.out.splitlines()
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
    assert f"results    {file}" in shown and f"plot       {picture}" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = {(row.setting, row.figure): row for row in read(file)}
    decode = rows["context=64 tokens=4 dtype=float32", "decode"]
    assert decode.value == pytest.approx(ours["64"]["decode"]["value"], rel=1e-5)
    assert (decode.program, decode.unit, decode.low, decode.count) == ("moelocal", "tokens/s", None, 1)
    assert decode.model == Identity.of(EMBEDDED, "embedded")
    assert shown[6].startswith("model      embedded: 9.2 MB, 16.00 bits per weight")
    assert "loads in" in told.out and "\n       64  " in told.out


@pytest.mark.parametrize("breaks", ["plot", "results"])
def test_what_was_measured_is_told_whatever_fails_behind_it(breaks, tmp_path, capsys, monkeypatch):
    place = tmp_path / "results"

    def removed(what):
        """The real function, behind somebody who removes the folder, or puts a file in its place."""
        real = getattr(*what)

        def call(*arguments):
            shutil.rmtree(place, ignore_errors=True)
            if breaks == "results":
                place.touch()
            return real(*arguments)

        monkeypatch.setattr(*what, call)

    removed((command, "_draw") if breaks == "plot" else (command.results, "append"))
    assert call(*SHORT, "--results", place, "--json") == 1
    told = capsys.readouterr()
    *shown, last = told.out.splitlines()
    assert json.loads(last)["programs"]["moelocal"]["contexts"]["64"]["decoded"] == [4]
    assert "4 tokens decoded greedily; 1 round after a warm-up: median (least to largest)" in shown
    assert any(line.startswith("results ") for line in shown) == (breaks == "plot")
    name = machine_name()
    assert told.err == "moelocal: error: " + (
        f"{place}/{name}-embedded.png: cannot be written: No such file or directory\n"
        if breaks == "plot"
        else f"{place}/{name}.tsv: results cannot be written: File exists\n"
    )


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
    """The figures beside a server, what was printed, and what the server is called."""
    with serving(listing("tiny"), post) as server:
        flags = ("--contexts", "128", "--tokens", 12, "--rounds", 1, "--loads", 1, "--no-results", "--json")
        assert call(*flags, "--against", server.address, *more) == 0
        out = capsys.readouterr().out
        first, *asked = [body for path, body in server.asked if body]
        assert first["max_tokens"] == 1, "it is asked for a token before a model is loaded here"
        assert all(body["temperature"] == 0.0 and body["max_tokens"] == 12 for body in asked)
        texts = [body["messages"][0]["content"] for body in asked]
        assert len(set(texts)) == len(texts), "a prompt was asked twice: a cache may have answered"
    return json.loads(out.splitlines()[-1]), out, f"tiny at {server.address}"


def test_a_server_that_says_the_same_is_measured_in_pairs(capsys):
    found, out, address = beside(capsys, Greedy())
    assert found["programs"][address]["title"] == address
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
        r"give it a larger context there \(at 128 tokens; not measured from there on\)",
        found["notes"][0],
    )


def test_a_server_that_gives_no_text_has_no_speed(capsys):
    count = {"prompt_tokens": 128, "completion_tokens": 0}
    found, out, address = beside(capsys, answer_of([], count, "stop"))
    assert found["beside"] == {} and list(found["programs"]) == ["moelocal"]
    note = f"{address}: it gave no text (at 128 tokens; not measured from there on)"
    assert found["notes"] == [note] and f"note: {note}" in out


@pytest.mark.parametrize(
    ("models", "more", "words"),
    [
        (("a", "b"), "", "server HERE: it serves 2 models; name one, as HERE=a: a, b"),
        (("a", "b"), "=c", "server HERE: /v1/chat/completions: 404 Not Found: no model c"),
    ],
)
def test_which_model_of_a_server_must_be_known(models, more, words, capsys):
    def post(handler):
        handler.whole(404, b'{"error": {"message": "no model c"}}')

    with serving(listing(*models), post) as server:
        assert refused(capsys, "--against", server.address + more).replace(server.address, "HERE") == words


def called(server: Server, model: str) -> str:
    return Served(server, model, encode=list, meter=Meter(None)).name


def test_the_name_of_a_model_does_not_steer_the_terminal(monkeypatch):
    server = Server("localhost:1", ("127.0.0.1",), 1, "/v1")
    assert called(server, "a\x1b[2J\n[/red]") == "a?[2J?[/red] at localhost:1"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with command._bar(True) as report:
        report("a [/red]: 512 tokens", 1, 2)  # is no style that was never begun


def test_models_of_one_server_are_told_apart_and_none_is_asked_twice(capsys, monkeypatch):
    with serving(listing("a", "b"), answer_of(["x"])) as server:
        one, two = (f"{server.address}={name}" for name in "ab")
        parsed = argparse.Namespace(against=[one, two])
        sides = [called(*named) for named in command._servers(parsed)]
        assert sides == [f"a at {server.address}", f"b at {server.address}"]
        assert [body["model"] for _, body in server.asked if body] == ["a", "b"]
        by_name = one.replace("127.0.0.1", "localhost")  # of the same server
        for again in (one, by_name):
            assert refused(capsys, "--against", one, "--against", again) == f"--against {again}: named twice"


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
        (("--against", "mlx_lm"), "--against mlx_lm: expected mlx-lm, or an address like localhost:1234"),
        (
            ("--against", "ollama=a:7b"),
            "--against ollama=a:7b: expected mlx-lm, or an address like localhost:1234",
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


@pytest.mark.parametrize(("memory", "told"), [("12MB", "12\\.0 MB"), ("19MB", "19\\.0 MB")])
def test_a_model_that_does_not_fit_comes_with_what_would(memory, told, capsys, monkeypatch):
    # 19 MB have room for the weights, but not for a token besides
    monkeypatch.setenv("MOELOCAL_MEMORY", memory)
    assert re.fullmatch(
        r"embedded: weights of 18\.5 MB and 1\.0 MB for one token do not fit the "
        + told
        + r" that a model may take "
        r"here; its original weights quantized with `moelocal quantize --recipe \w+` would \(\d\.\d MB\); a Mac with 8 "
        r"GB would hold it as it is; or allow more with MOELOCAL_MEMORY",
        refused(capsys, "--no-results"),
    )


def test_what_fits_nowhere_is_told_so(capsys, monkeypatch):
    monkeypatch.setattr(command, "_MACS", ())
    monkeypatch.setenv("MOELOCAL_MEMORY", "1MB")
    assert refused(capsys, "--no-results") == (
        "embedded: weights of 18.5 MB and 1.0 MB for one token do not fit the 1.0 MB that a model may take here; no "
        "recipe makes it small enough, and no Mac is large enough; or allow more with MOELOCAL_MEMORY"
    )


def test_a_context_for_which_memory_has_no_room_is_refused_with_the_one_that_fits(capsys, monkeypatch):
    monkeypatch.setenv("MOELOCAL_MEMORY", "28MB")
    found = refused(capsys, "--contexts", "0,2048", "--no-results")
    assert re.fullmatch(
        r"--contexts 2048: memory has room for [\d,]+ tokens, 128 of them for the answer; at most [\d,]+ is possible",
        found,
    )


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
    "--results", {str(tmp_path)!r}, "--json"])))
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
    *told, last = out.splitlines()
    assert "note: stopped early; the figures are of what was measured until then" in told
    assert json.loads(last)["interrupted"]
    (file,) = tmp_path.glob("*.tsv")
    assert {row.remark for row in read(file)} == {"stopped early"}
    (decode,) = [row for row in read(file) if row.figure == "decode"]
    assert decode.count >= 3


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
