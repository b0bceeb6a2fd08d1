"""What was measured, for programs and for the file of results; `printed.py` has it for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from moelocal.bench.bytes import moved_per_token
from moelocal.bench.header import Header, Identity
from moelocal.bench.peers import MLX_LM, OURS, Loaded, Sample
from moelocal.bench.results import STOPPED, Row
from moelocal.bench.speed import Figure, Measured, paired
from moelocal.config import ModelConfig
from moelocal.evaluate.statistics import Estimate

LEAST_PROMPT: Final = 64
"""Tokens of a prompt from which the speed of reading it says something."""

_DTYPE_SIZES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}

Cut = Callable[[Sequence[int]], tuple[Sequence[int], bool]]
"""Our tokens -> those that we would count in the text that a server gives for the same answer; and whether that has
ended."""


def prefill(sample: Sample) -> float | None:
    """Tokens per second; None where a prompt is too short to tell."""
    return sample.prefill if sample.prompt_tokens >= LEAST_PROMPT else None


def _prefill_energy(sample: Sample) -> float | None:
    if sample.prefill_joules is None or sample.prompt_tokens < LEAST_PROMPT:
        return None
    return sample.prefill_joules / (sample.prompt_tokens - sample.cached)


def _decode_energy(sample: Sample) -> float | None:
    if sample.decode_joules is None or sample.decoded < 2:
        return None
    return sample.decode_joules / (sample.decoded - 1)


FIGURES: Final[dict[str, tuple[str, Callable[[Sample], float | None]]]] = {
    "decode": ("tokens/s", lambda sample: sample.decode),
    "prefill": ("tokens/s", prefill),
    "first token": ("s", lambda sample: sample.first_seconds),
    "MLX memory": ("bytes", lambda sample: sample.peak_nbytes),
    "resident memory": ("bytes", lambda sample: sample.resident_nbytes),
    "prefill energy": ("J/token", _prefill_energy),
    "decode energy": ("J/token", _decode_energy),
}
"""Of a run: name, unit, value. MLX memory is the most that MLX held in the run; resident memory the most that the
process held since it began, until it has read a longer prompt: loading and all contexts up to this one. Energy is that
of the whole machine, whatever else runs on it."""

LOADING: Final[dict[str, tuple[str, Callable[[Loaded], float | None]]]] = {
    "load": ("s", lambda start: start.load_seconds),
    "MLX memory while loading": ("bytes", lambda start: start.peak_nbytes),
}
"""Of a start."""

RATIOS: Final = ("decode", "prefill")


@dataclass(frozen=True, slots=True)
class Parting:
    """Where the runs of a pair are not the same any more: context, round (from 1), token (from 1). `padding`: the other
    side chose a row of the output that is no token, which moelocal never does."""

    context: int
    round: int
    token: int
    padding: bool = False


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether two sides said the same: `pairs` of runs and `tokens` of them that were compared; `parted`: where not."""

    pairs: int
    tokens: int
    parted: tuple[Parting, ...]

    @property
    def same(self) -> bool:
        return self.pairs > 0 and not self.parted


@dataclass(frozen=True, slots=True)
class Result:
    """A measurement with all that it depends on. `cut`: for servers, which give text; `tokens`: which rows of the
    output are tokens; `energy`: what tells it, empty for nothing."""

    header: Header
    model: Identity
    config: ModelConfig
    measured: Measured
    cut: Cut
    tokens: Sequence[bool]
    energy: str = ""

    @property
    def peers(self) -> tuple[str, ...]:
        """The sides besides ours that gave something."""
        found = self.measured
        return tuple(
            side
            for side in found.sides
            if side != OURS and any(found.samples(side, context) for context in found.contexts)
        )

    @property
    def dtype(self) -> str:
        """Of our activations."""
        return self.measured.starts[OURS][0].dtype

    def title(self, side: str) -> str:
        """A side with its version; of a server that is not known."""
        starts = self.measured.starts[side]
        version = starts[0].version if starts else ""
        if side == OURS:
            return f"{OURS} {self.header.moelocal}"
        return f"{side} {version}" if side == MLX_LM else side

    def moved(self, context: int) -> int:
        """Bytes that a token moves at least, in the middle of an answer behind `context` tokens."""
        read = self.measured.starts[OURS][0].read_per_token
        where = context + self.measured.tokens // 2
        return moved_per_token(self.config, read, where, _DTYPE_SIZES[self.dtype])

    def share(self, side: str, context: int) -> Figure | None:
        """Decoding speed over that of a program which did nothing but read these bytes as fast as this machine copies.
        None for a server: what it reads is not known."""
        if side not in (OURS, MLX_LM):
            return None
        factor = self.moved(context) / self.header.bandwidth
        return self.measured.figure(
            side, context, lambda sample: sample.decode * factor if sample.decode else None
        )

    def agreement(self, side: str) -> Agreement:
        """The tokens of a side beside ours."""
        pairs, compared, parted = 0, 0, []
        for (context, number), runs in sorted(self.measured.runs.items()):
            if OURS not in runs or side not in runs:
                continue
            ours, theirs = runs[OURS].tokens, runs[side].tokens
            ended, at_end = False, runs[side].ended
            if side != MLX_LM:
                cut, ended = self.cut(ours)
                # where text does not end, its last token may be cut differently
                ours = tuple(cut) if ended else tuple(cut)[:-1]
                theirs = theirs if at_end else theirs[:-1]
            length = min(len(ours), len(theirs))
            at = next((i for i in range(length) if ours[i] != theirs[i]), None)
            if at is None and ((ended and len(theirs) > length) or (at_end and len(ours) > length)):
                at = length  # one has ended, the other goes on
            pairs += 1
            compared += length if at is None else at
            if at is not None:
                padding = side == MLX_LM and not self.tokens[theirs[at]]
                parted.append(Parting(context, number + 1, at + 1, padding))
        return Agreement(pairs, compared, tuple(parted))

    def loading(self, side: str, name: str) -> Figure | None:
        """A figure of `LOADING`."""
        return Figure.of(map(LOADING[name][1], self.measured.starts[side]))

    def load_ratio(self, side: str) -> Estimate | None:
        """Their seconds to load over ours, start by start."""
        ours, theirs = ([start.load_seconds for start in self.measured.starts[s]] for s in (OURS, side))
        ratios = [b / a for a, b in zip(ours, theirs, strict=False) if a and b]
        return paired(ratios) if ratios else None

    # for programs

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = self.measured
        return {
            "header": self.header.as_dict(),
            "model": self.model.as_dict() | {"dtype": self.dtype},
            "tokens": found.tokens,
            "together": found.together,
            "interrupted": found.interrupted,
            "notes": found.notes,
            "programs": {side: self._program(side) for side in (OURS, *self.peers)},
            "beside": {side: self._pair(side) for side in self.peers},
        }

    def _program(self, side: str) -> dict[str, Any]:
        found = self.measured
        contexts: dict[str, Any] = {}
        for context in found.contexts:
            if not (samples := found.samples(side, context)):
                continue
            figures = {name: found.figure(side, context, value) for name, (_, value) in FIGURES.items()}
            figures["share of limit"] = self.share(side, context)
            contexts[str(context)] = {
                "prompt_tokens": [sample.prompt_tokens for sample in samples],
                "decoded": [sample.decoded for sample in samples],
                "counted": all(sample.counted for sample in samples),
            } | {_key(name): asdict(figure) for name, figure in figures.items() if figure}
        return {
            "title": self.title(side),
            "loading": {_key(name): asdict(each) for name in LOADING if (each := self.loading(side, name))},
            "contexts": contexts,
        }

    def _pair(self, side: str) -> dict[str, Any]:
        found, said = self.measured, self.agreement(side)
        contexts: dict[str, Any] = {}
        for context in found.contexts:
            ratios = {name: found.ratio(side, context, FIGURES[name][1]) for name in RATIOS}
            told = {name: asdict(each[0]) | {"pairs": each[1]} for name, each in ratios.items() if each}
            if told:
                contexts[str(context)] = told
        load = self.load_ratio(side)
        return {
            "same_tokens": said.same,
            "tokens_compared": said.tokens,
            "parted": [asdict(each) for each in said.parted],
            "load": asdict(load) if load else None,
            "contexts": contexts,
        }

    # for the file

    def rows(self) -> Iterator[Row]:
        """Every figure."""
        found = [row for side in (OURS, *self.peers) for row in self._rows_of(side)]
        found += [row for side in self.peers for row in self._rows_beside(side)]
        for row in found:
            words = (row.remark, STOPPED) if self.measured.interrupted else (row.remark,)
            yield replace(row, remark="; ".join(filter(None, words)))

    def _setting(self, context: int) -> str:
        return f"context={context} tokens={self.measured.tokens} dtype={self.dtype}"

    def _rows_of(self, side: str) -> Iterator[Row]:
        found = self.measured
        model = self.model if side in (OURS, MLX_LM) else None
        facts = (self.header, model, "speed", OURS if side == OURS else self.title(side))
        for name, (unit, _) in LOADING.items():
            if loading := self.loading(side, name):
                yield _row(*facts, f"dtype={self.dtype}", name, unit, loading)
        for context in found.contexts:
            counted = all(sample.counted for sample in found.samples(side, context))
            remark = "" if counted else "tokens estimated with our tokenizer"
            for name, (unit, value) in FIGURES.items():
                if figure := found.figure(side, context, value):
                    yield _row(*facts, self._setting(context), name, unit, figure, remark)
            if share := self.share(side, context):
                yield _row(*facts, self._setting(context), "share of limit", "ratio", share)

    def _rows_beside(self, side: str) -> Iterator[Row]:
        program, said = f"{OURS} : {self.title(side)}", self.agreement(side)
        for context in self.measured.contexts:
            parted = [each.token for each in said.parted if each.context == context]
            remark = f"tokens part from token {min(parted)} on" if parted else "same tokens"
            for name in RATIOS:
                ratio = self.measured.ratio(side, context, FIGURES[name][1])
                if ratio is not None:
                    value, count = ratio
                    facts = (self.header, self.model, "speed", program, self._setting(context))
                    figures = (value.value, value.low, value.high)
                    yield Row(*facts, f"{name} ratio", "ratio", *figures, count, remark)


def _row(
    header: Header,
    model: Identity | None,
    benchmark: str,
    program: str,
    setting: str,
    name: str,
    unit: str,
    figure: Figure,
    remark: str = "",
) -> Row:
    spread = (figure.low, figure.high) if figure.count > 1 else (None, None)
    facts = (header, model, benchmark, program, setting, name, unit)
    return Row(*facts, figure.value, spread[0], spread[1], figure.count, remark)


def _key(name: str) -> str:
    return name.replace(" ", "_")
