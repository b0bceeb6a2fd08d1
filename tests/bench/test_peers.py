"""Programs in processes of their own: what they are told, how they end, what they are measured in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moelocal
from moelocal.bench import peers, worker
from moelocal.bench.energy import Meter
from moelocal.bench.peers import OURS, Process, Prompt, SideFailed
from moelocal.errors import MoelocalError
from moelocal.hub import EMBEDDED
from moelocal.text.template import ChatTemplate

PACKAGE = Path(moelocal.__file__).parents[1]


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
