"""Runs in turns with programs of the test's own: who is asked what, in which order, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest

from moelocal.bench.peers import Loaded, Prompt, Sample, SideFailed
from moelocal.bench.prompts import text_of
from moelocal.bench.speed import CONTEXTS, Figure, Measured, contexts_of, measure, paired
from moelocal.errors import RequestError
from moelocal.hub import EMBEDDED
from moelocal.text.tokenizer import Tokenizer

Log = list[tuple[str, str]]


class Fake:
    """A program that decodes at the rates it is told, one per run, and writes down what it is asked for."""

    def __init__(
        self,
        name: str,
        log: Log,
        rates: Sequence[float] = (10.0,),
        fails: Callable[[str], None] | None = None,
    ):
        self.name, self.log, self.rates, self.fails = name, log, list(rates), fails
        self.resident = 0

    def start(self) -> Loaded:
        self.log.append((self.name, "start"))
        if self.fails:
            self.fails("start")
        self.resident = 1000
        return Loaded("1", load_seconds=2.0)

    def run(self, prompt: Prompt, count: int) -> Sample:
        self.log.append((self.name, prompt.text))
        if self.fails:
            self.fails(prompt.text)
        rate = self.rates.pop(0) if len(self.rates) > 1 else self.rates[0]
        self.resident = max(self.resident, 1000 + int(prompt.text.split("/")[0]))
        return Sample(100, tuple(range(count)), count, 1.0, (count - 1) / rate, resident_nbytes=self.resident)

    def stop(self) -> None:
        self.log.append((self.name, "stop"))


def prompt(context: int, number: int) -> Prompt:
    return Prompt(f"{context}/{number}")


def run(*sides: Fake, contexts=(0, 512), **options) -> Measured:
    return measure(sides, prompt, contexts, **{"tokens": 5, "rounds": 2, "loads": 1} | options)


def test_the_sides_take_turns_and_every_place_is_warmed_up_once():
    log: Log = []
    found = run(Fake("moelocal", log), Fake("mlx-lm", log))
    a, b = "moelocal", "mlx-lm"
    # of each context's three texts the last is for warming up
    assert log == [
        (a, "start"), (b, "start"),
        (a, "0/2"), (a, "0/0"), (b, "0/2"), (b, "0/0"), (a, "512/5"), (a, "512/3"), (b, "512/5"), (b, "512/3"),
        (b, "0/1"), (a, "0/1"), (b, "512/4"), (a, "512/4"),
        (a, "stop"), (b, "stop"),
    ]  # fmt: skip
    assert {where: set(sides) for where, sides in found.runs.items()} == {
        (context, number): {a, b} for context in (0, 512) for number in (0, 1)
    }


def test_sides_that_do_not_fit_together_are_never_up_together():
    log: Log = []
    run(Fake("moelocal", log), Fake("mlx-lm", log), together=False, loads=2, contexts=(0,))
    up: set[str] = set()
    warm: set[tuple[str, str]] = set()
    for name, what in log[:-2]:  # in the end everything is stopped, whatever it is
        if what == "start":
            assert not up
            up.add(name)
        elif what == "stop":
            up.remove(name)
            warm = {each for each in warm if each[0] != name}
        else:
            assert up == {name}
            assert what == "0/2" or (name, "0/2") in warm, "measured without a warm-up in this process"
            warm.add((name, what))
    assert not up
    assert [name for name, what in log if what in ("0/0", "0/1")] == [
        "moelocal",
        "mlx-lm",
        "mlx-lm",
        "moelocal",
    ]


def test_loads_are_repeated_in_turns():
    log: Log = []
    found = run(Fake("moelocal", log), Fake("mlx-lm", log), loads=3, rounds=1)
    begun = [name for name, what in log if what == "start"]
    assert begun == ["moelocal", "mlx-lm", "mlx-lm", "moelocal", "moelocal", "mlx-lm"]
    assert [len(starts) for starts in found.starts.values()] == [3, 3]


def test_a_ratio_is_that_of_pairs():
    log: Log = []
    # behind the warm-up; the machine is twice as slow in the last two rounds
    ours = Fake("moelocal", log, [1.0, 30.0, 30.0, 15.0, 15.0, 15.0])
    theirs = Fake("mlx-lm", log, [1.0, 20.0, 20.0, 10.0, 10.0, 10.0])
    found = run(ours, theirs, rounds=5, contexts=(0,))
    ratio = found.ratio("mlx-lm", 0, lambda sample: sample.decode)
    assert ratio is not None
    value, count = ratio
    assert (value.value, count) == (pytest.approx(1.5, rel=1e-12), 5)
    assert (value.low, value.high) == (pytest.approx(1.5, rel=1e-12), pytest.approx(1.5, rel=1e-12))
    assert found.figure("moelocal", 0, lambda sample: sample.decode) == Figure(
        pytest.approx(15.0), pytest.approx(15.0), pytest.approx(30.0), 5
    )


def test_an_interval_covers_what_pairs_say_and_widens_with_them():
    narrow, wide = paired([1.1, 1.2, 1.3, 1.2, 1.1, 1.3, 1.2]), paired([0.5, 1.2, 2.5, 1.2, 0.6, 2.4, 1.2])
    assert narrow.value == pytest.approx((1.1**2 * 1.2**3 * 1.3**2) ** (1 / 7), rel=1e-12)
    assert 1.1 < narrow.low < narrow.value < narrow.high < 1.3
    assert wide.low < narrow.low and wide.high > narrow.high
    assert (paired([1.4]).low, paired([1.4]).high) == (None, None)


def test_a_ratio_seen_from_the_other_side_is_its_reciprocal():
    ratios = [0.5, 3.0, 1.2, 0.9]
    there, back = paired(ratios), paired([1 / ratio for ratio in ratios])
    assert there.value == pytest.approx((0.5 * 3.0 * 1.2 * 0.9) ** 0.25, rel=1e-12)
    assert (there.value, there.low, there.high) == pytest.approx(
        (1 / back.value, 1 / back.high, 1 / back.low), rel=1e-12
    )


@pytest.mark.parametrize("pairs", [2, 3, 5, 15])
def test_the_interval_covers_the_truth_as_often_as_it_says(pairs):
    rng = np.random.default_rng(1)
    found = [paired(np.exp(rng.normal(0.3, 0.2, pairs)).tolist()) for _ in range(2000)]
    covered = sum(each.low <= np.exp(0.3) <= each.high for each in found) / len(found)
    # four standard deviations of a share of 2,000
    assert abs(covered - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5


def failing(at: str) -> Callable[[str], None]:
    def fails(what: str) -> None:
        if what.startswith(at):
            raise SideFailed("mlx-lm: out of memory")

    return fails


def test_a_side_that_fails_at_a_context_is_left_out_from_there_on():
    log: Log = []
    found = run(Fake("moelocal", log), Fake("mlx-lm", log, fails=failing("512/")), contexts=(0, 512, 1024))
    assert found.notes == ["mlx-lm: out of memory (at 512 tokens; not measured from there on)"]
    sides = {where: sorted(sides) for where, sides in found.runs.items()}
    both, alone = ["mlx-lm", "moelocal"], ["moelocal"]
    assert sides == {(c, n): both if c == 0 else alone for c in (0, 512, 1024) for n in (0, 1)}
    # what was left of it was ended; for the second round it started anew, and was warmed up anew
    assert [what for name, what in log if name == "mlx-lm"] == [
        "start", "0/2", "0/0", "512/5", "stop", "start", "0/2", "0/1", "stop",
    ]  # fmt: skip


@pytest.mark.parametrize("together", [True, False])
def test_resident_memory_is_that_of_a_process_that_has_read_no_longer_prompt(together):
    found = run(Fake("moelocal", []), contexts=(0, 512, 1024), together=together)
    resident = {
        context: [sample.resident_nbytes for sample in found.samples("moelocal", context)]
        for context in found.contexts
    }
    # the most since the process began: one that is alone in memory begins anew in every round
    later = (lambda nbytes: None) if together else (lambda nbytes: nbytes)
    assert resident == {0: [1000, later(1000)], 512: [1512, later(1512)], 1024: [2024, 2024]}


def test_a_peer_that_cannot_be_loaded_is_noted_and_ours_cannot_be_done_without():
    log: Log = []
    found = run(Fake("moelocal", log), Fake("mlx-lm", log, fails=failing("start")), loads=2)
    assert found.notes == ["mlx-lm: out of memory (not measured)"]
    assert all(set(sides) == {"moelocal"} for sides in found.runs.values())
    with pytest.raises(SideFailed, match=r"^mlx-lm: out of memory$"):
        run(Fake("moelocal", log, fails=failing("start")), Fake("mlx-lm", log))
    assert log[-2:] == [("moelocal", "stop"), ("mlx-lm", "stop")]


def test_nothing_measured_is_an_error():
    with pytest.raises(SideFailed, match=r"^mlx-lm: out of memory \(not measured\)$"):
        run(Fake("moelocal", [], fails=failing("0/")), contexts=(0,))


def interrupting(at: str) -> Callable[[str], None]:
    def fails(what: str) -> None:
        if what == at:
            raise KeyboardInterrupt

    return fails


def test_ctrl_c_keeps_what_was_measured_and_ends_all():
    log: Log = []
    found = run(Fake("moelocal", log, fails=interrupting("512/4")), Fake("mlx-lm", log))
    assert found.interrupted
    assert len(found.runs) == 4 and "moelocal" not in found.runs[512, 1]
    assert log[-2:] == [("moelocal", "stop"), ("mlx-lm", "stop")]


def test_ctrl_c_before_anything_was_measured_is_ctrl_c():
    log: Log = []
    with pytest.raises(KeyboardInterrupt):
        run(Fake("moelocal", log, fails=interrupting("0/2")), Fake("mlx-lm", log))
    assert log[-2:] == [("moelocal", "stop"), ("mlx-lm", "stop")]


@pytest.mark.parametrize("together", [True, False])
def test_progress_ends_where_it_was_said_to_end(together):
    said: list[tuple[str, int, int]] = []
    log: Log = []
    run(Fake("moelocal", log), Fake("mlx-lm", log), together=together, report=lambda *told: said.append(told))
    done = [each[1] for each in said]
    assert done == sorted(done) and len({each[2] for each in said}) == 1
    # what is said last is the last run, which is not done then
    assert said[-1][1] + (512 + 10 * 5) == said[-1][2]
    assert said[-1][0] == "moelocal: 512 tokens, round 2 of 2"


@pytest.mark.parametrize(
    ("named", "context", "room", "expected"),
    [
        (None, 262144, 10**9, CONTEXTS),
        (None, 4096, 10**9, (0, 512, 1024, 2048)),
        (None, 262144, 9000, (0, 512, 1024, 2048, 4096, 8192)),
        (None, 128, 10**9, (0,)),
        ([4096, 0, 4096], 262144, 10**9, (0, 4096)),
    ],
)
def test_contexts_reach_as_far_as_model_and_memory_do(named, context, room, expected):
    assert contexts_of(named, 128, context, room) == expected


def test_contexts_are_doublings_up_to_128k():
    assert CONTEXTS[0] == 0 and CONTEXTS[1] == 512 and CONTEXTS[-1] == 128 * 1024
    assert all(b == 2 * a for a, b in pairwise(CONTEXTS[1:]))


@pytest.mark.parametrize(
    ("named", "context", "room", "words"),
    [
        ([8192], 4096, 10**9, "--contexts 8192: the model's context is 4,096 tokens, 128 of them for the answer; "
         "at most 3,968 is possible"),
        ([8192], 262144, 5000, "--contexts 8192: memory has room for 5,000 tokens, 128 of them for the answer; "
         "at most 4,872 is possible"),
        (None, 100, 10**9, "--tokens 128: the model's context is 100 tokens; decode fewer"),
    ],
)  # fmt: skip
def test_a_context_that_does_not_fit_is_refused_with_the_one_that_does(named, context, room, words):
    with pytest.raises(RequestError) as caught:
        contexts_of(named, 128, context, room)
    assert str(caught.value) == words


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.open(EMBEDDED)


@pytest.mark.parametrize("tokens", [1, 7, 512, 2048, 16384])
def test_a_text_has_the_tokens_that_were_asked_for(tokens, tokenizer):
    found = text_of(lambda text: len(tokenizer.encode(text)), tokens, 3)
    assert len(tokenizer.encode(found)) == tokens


def test_texts_differ_from_their_beginning_on(tokenizer):
    texts = [text_of(lambda text: len(tokenizer.encode(text)), 512, number) for number in range(60)]
    assert len({text.split(".")[0] for text in texts}) == 60


def test_what_stands_around_a_text_counts(tokenizer):
    def count(text: str) -> int:
        return len(tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n"))

    assert count(text_of(count, 100, 0)) == 100
    assert text_of(count, 2, 0) == "0"  # more than was asked for already, but never empty


def test_a_rate_counts_the_tokens_behind_the_first():
    sample = Sample(100, (1, 2, 3), 3, first_seconds=0.5, rest_seconds=0.25, cached=20)
    assert (sample.decode, sample.prefill) == (8.0, 160.0)
    assert Sample(1, (1,), 1, 0.5, 0.0).decode is None
