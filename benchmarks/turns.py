"""The second turn of a conversation: what is evaluated again, and how long it takes until the first token.

    python benchmarks/turns.py [--json] [--contexts 1024 4096 ...] [--rounds N] [--peer-context N]

The embedded model, with a longer context than it was trained for: speed does not depend on what is said. Greedy, the
thinking switched off. With the extra `compare` mlx-lm's server is measured beside it, as a process on loopback with a
float32 copy of the checkpoint (on the CPU MLX's product of experts knows no other dtype).

- first token: seconds from the call (for the server: the request) until the first token of the second turn, rendering
  and tokenizing of the whole conversation included. The first turn holds one text as long as the context, read in the
  longest chunks that there are: a cold run is at its fastest. Cold: nothing is stored. Session: `model.session()`.
  Plain: a call of `moelocal.generate` with all messages, as a server gets them; it uses what the model has stored. All
  take turns in every round, and a figure is the median (warm ones of a few turns). For mlx-lm, cold is the first turn.
- hits: tokens reused over those that could be, for 12 conversations as agents and people have them, once in a session
  and once in plain calls. Best possible: the last boundary between messages up to which the prompt is what one before
  it was, or (in a session) what an answer was rendered as.
- disk: bytes written for a first snapshot of a context, and for that of the next turn; and seconds until a new process
  has restored it (the file cache of the system is warm).
- batch: tokens per second of 1, 2, 4 and 8 answers that grow at once, the reading of their short prompts included.

Load other than this benchmark's own makes seconds noise; ratios suffer less.

With --json the last line is one object: `warm_over_cold` (session), `warm_over_cold_plain`, `warm_over_cold_mlx_lm` and
`first_token_seconds` by context; `hit_fraction`; `snapshot_bytes` and `restore_seconds` by context; `batch_throughput`
by number of answers.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import mlx.core as mx
from conversations import FILLER, GREEDY, STOPS, Messages, assistant, fresh, hits, system, user
from rich.console import Console
from rich.table import Table

import moelocal
from moelocal.cache import Disk, Store
from moelocal.engine.batch import stream_batch
from moelocal.engine.generate import Request
from moelocal.engine.load import Model
from moelocal.engine.session import Session
from moelocal.flags import integer
from moelocal.hub import resolve

CONTEXTS = (1024, 4096, 16384, 32768)
BATCHES = (1, 2, 4, 8)
ANSWER = 96
WARM_TURNS = 5


def enlarged(folder: Path, context: int) -> Path:
    """A copy of the embedded model in `folder`, with room for `context` tokens."""
    shutil.copytree(resolve(None), folder, copy_function=shutil.copyfile)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["max_position_embeddings"] = context
    path.write_text(json.dumps(config))
    return folder


# first token


def first_token(model: Model | Session, messages: Messages) -> tuple[float, str]:
    """Seconds until the first token, and the answer."""
    begin = time.perf_counter()
    events = moelocal.stream(model, messages, max_tokens=32, sampling=GREEDY, thinking=False, stop=STOPS)
    next(events)
    seconds = time.perf_counter() - begin
    text = [event.completion.text for event in events if event.completion]
    return seconds, text[0] or "So."


def opening(model: Model, context: int, number: int) -> Messages:
    """A first turn of about `context` tokens, unlike those of other numbers from the beginning on."""
    per = len(model.tokenizer.encode(FILLER * 8)) / 8
    return [system(f"{number}. Be brief."), user(FILLER * int((context - 40) / per) + "What is 2 + 2?")]


def round_of(model: Model, context: int, number: int) -> dict[str, float]:
    """One conversation of ours: seconds until the first token of the turn behind a first one of `context` tokens. The
    warm ones are cheap: each is the median of a few further turns."""
    warm = fresh(model)
    session, messages = warm.session(), opening(model, context, number)
    _, answer = first_token(session, messages)
    messages.append(assistant(answer))
    plain, history = [], list(messages)
    for turn in range(WARM_TURNS):
        plain.append(first_token(warm, [*messages, user(f"And 5 + {turn}?")])[0])
    lasting = []
    for turn in range(WARM_TURNS):
        history.append(user(f"And 3 + {turn}?"))
        seconds, answer = first_token(session, history)
        lasting.append(seconds)
        history.append(assistant(answer))
    return {
        "session": statistics.median(lasting),
        "plain": statistics.median(plain),
        "cold": first_token(fresh(model), [*messages, user("And 3 + 4?")])[0],
    }


class Peer:
    """mlx-lm's server."""

    def __init__(self, port: int, model: str) -> None:
        self.port, self.model = port, model

    def first_token(self, messages: Messages) -> tuple[float, str]:
        body = {"model": self.model, "messages": messages, "stream": True, "max_tokens": 2, "temperature": 0}
        body["chat_template_kwargs"] = {"enable_thinking": False}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        begin, seconds, text = time.perf_counter(), 0.0, ""
        with closing(connection):
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            response = connection.getresponse()
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                seconds = seconds or time.perf_counter() - begin
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
        if not seconds:
            raise SystemExit(f"mlx-lm's server answered {response.status} without a token")
        return seconds, text or "So."

    def round_of(self, model: Model, context: int, number: int) -> dict[str, float]:
        """One conversation of theirs: cold is the first turn."""
        messages = opening(model, context, number)
        cold, answer = self.first_token(messages)
        warm, _ = self.first_token([*messages, assistant(answer), user("And 3 + 4?")])
        return {"cold": cold, "warm": warm}


@contextmanager
def serving(folder: Path, work: Path) -> Iterator[Peer | None]:
    """mlx-lm's server with the checkpoint of `folder`; None without the extra `compare`."""
    if importlib.util.find_spec("mlx_lm") is None:
        yield None
        return
    copied = work / "float32"
    shutil.copytree(folder, copied)
    if mx.default_device() == mx.Device(mx.cpu):
        weights: dict[str, mx.array] = mx.load(str(copied / "model.safetensors"))  # type: ignore[assignment]
        whole = {name: value.astype(mx.float32) for name, value in weights.items()}
        mx.save_safetensors(str(copied / "model.safetensors"), whole, {"format": "pt"})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (work / "server.log").open("w") as log:
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(copied), "--port", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            peer = Peer(port, str(copied))
            deadline = time.monotonic() + 120
            while True:
                try:
                    peer.first_token([user("Hello!")])  # also compiles
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit(
                            f"mlx-lm's server does not start: {(work / 'server.log').read_text()}"
                        ) from None
                    time.sleep(0.5)
            yield peer
        finally:
            server.terminate()
            server.wait()


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


# disk


def on_disk(model: Model, context: int, work: Path) -> dict[str, float]:
    """Bytes of a snapshot, of the one after it, and the seconds that a new process needs to restore that."""
    folder, other = work / f"disk{context}", fresh(model)
    disk = Disk(folder, model.store.fingerprint, 1 << 40)
    store, session, sizes = Store(model.store.fingerprint, 1 << 40, disk), other.session(), []
    messages = opening(model, context, 0)
    for question in ("And 3 + 4?", "And 5 + 4?"):
        _, answer = first_token(session, messages)
        store.put(session.tokens, session._cache)
        disk.flush()
        sizes.append(sum(file.stat().st_size for file in folder.rglob("*.safetensors")))
        messages += [assistant(answer), user(question)]
    store.close()
    request = {"model": str(model.folder), "disk": str(folder), "tokens": session.tokens}
    path = work / "restore.json"
    path.write_text(json.dumps(request))
    command = [sys.executable, __file__, "--restore", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"first": sizes[0], "next": sizes[1] - sizes[0], "seconds": json.loads(done.stdout)}


def restore(path: Path) -> float:
    """The inside of the new process."""
    request = json.loads(path.read_text())
    model = moelocal.load(request["model"])
    fingerprint = model.store.fingerprint
    begin = time.perf_counter()
    store = Store(fingerprint, 1 << 40, Disk(Path(request["disk"]), fingerprint, 1 << 40))
    found = store.find(request["tokens"])
    assert found is not None and found.position == len(request["tokens"])
    cache = store.restore(found)
    assert cache is not None
    mx.eval(cache.arrays)
    return time.perf_counter() - begin


# batch


def throughput(model: Model, count: int, rounds: int) -> float:
    """Tokens per second of `count` answers that grow at once."""
    rates = []
    for turn in range(rounds + 1):
        requests = [
            Request(f"{turn}{i} Draw a circle, then say: ", max_tokens=ANSWER, sampling=GREEDY, raw=True)
            for i in range(count)
        ]
        begin = time.perf_counter()
        tokens = sum(len(event.tokens) for _, event in stream_batch(fresh(model), requests))
        rates.append(tokens / (time.perf_counter() - begin))
    return statistics.median(rates[1:])  # the first round compiles


# all of it


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object at the end")
    parser.add_argument(
        "--contexts", type=integer(1), nargs="*", default=list(CONTEXTS), help="tokens of the first turn"
    )
    parser.add_argument("--rounds", type=integer(1), default=3, help="conversations per context; default: 3")
    parser.add_argument(
        "--peer-context",
        type=integer(0),
        default=CONTEXTS[-1],
        metavar="N",
        help="longest context for mlx-lm; 0: none",
    )
    parser.add_argument("--restore", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.restore:
        print(json.dumps(restore(parsed.restore)))
        return
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = enlarged(work / "model", 2 * max([*parsed.contexts, 4096]))
        model = moelocal.load(folder, progress=False)
        round_of(model, 512, 0)  # compiles
        ours, theirs = first_tokens(model, folder, work, parsed)
        console.print(first_table(ours, theirs))
        reuse = hits(model)
        console.print(hits_table(reuse))
        disk = {context: on_disk(model, context, work) for context in parsed.contexts}
        console.print(disk_table(disk))
        batch = {count: throughput(model, count, parsed.rounds) for count in BATCHES}
        console.print(batch_table(batch))
    if parsed.json:
        figures = {
            "warm_over_cold": {c: each["session"] / each["cold"] for c, each in ours.items()},
            "warm_over_cold_plain": {c: each["plain"] / each["cold"] for c, each in ours.items()},
            "warm_over_cold_mlx_lm": {c: each["warm"] / each["cold"] for c, each in theirs.items()},
            "first_token_seconds": ours,
            "first_token_seconds_mlx_lm": theirs,
            "hit_fraction": sum(each[2] for each in reuse) / sum(each[3] for each in reuse),
            "snapshot_bytes": {c: {"first": each["first"], "next": each["next"]} for c, each in disk.items()},
            "restore_seconds": {c: each["seconds"] for c, each in disk.items()},
            "batch_throughput": batch,
        }
        print(json.dumps(figures))


def first_tokens(
    model: Model, folder: Path, work: Path, parsed: argparse.Namespace
) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]]:
    """Medians by context, ours and theirs, measured in turns."""
    ours, theirs = dict[int, dict[str, float]](), dict[int, dict[str, float]]()
    compared = [context for context in parsed.contexts if context <= parsed.peer_context]
    with serving(folder, work) if compared else nullcontext() as peer:
        for context in parsed.contexts:
            mine, other = [], []
            for number in range(1, parsed.rounds + 1):
                mine.append(round_of(model, context, number))
                if peer and context in compared:
                    other.append(peer.round_of(model, context, number))
            ours[context] = medians(mine)
            if other:
                theirs[context] = medians(other)
    return ours, theirs


def first_table(ours: dict[int, dict[str, float]], theirs: dict[int, dict[str, float]]) -> Table:
    table = Table(
        title=f"first token of the second turn on {mx.default_device()}, milliseconds, and % of cold"
    )
    columns = ("tokens", "cold", "session", "%", "plain", "%", "mlx-lm: cold", "warm", "%")
    for column in columns:
        table.add_column(column, justify="right")
    for context, each in ours.items():
        peer = theirs.get(context)
        row = [f"{each['cold'] * 1e3:,.0f}"]
        for name in ("session", "plain"):
            row += [f"{each[name] * 1e3:,.0f}", f"{100 * each[name] / each['cold']:.1f}"]
        if peer:
            row += [
                f"{peer['cold'] * 1e3:,.0f}",
                f"{peer['warm'] * 1e3:,.0f}",
                f"{100 * peer['warm'] / peer['cold']:.1f}",
            ]
        table.add_row(f"{context:,}", *row)
    return table


def hits_table(found: Sequence[tuple[str, str, int, int]]) -> Table:
    table = Table(title="tokens reused of those that could be")
    for column in ("conversation", "session", "%", "plain", "%"):
        table.add_column(column, justify="left" if column == "conversation" else "right")
    for name in dict.fromkeys(each[0] for each in found):
        row = []
        for _, _, reused, best in (each for each in found if each[0] == name):
            row += [f"{reused:,} of {best:,}", f"{100 * reused / best:.0f}"]
        table.add_row(name, *row)
    return table


def disk_table(disk: dict[int, dict[str, float]]) -> Table:
    table = Table(title="on disk")
    for column in ("tokens", "first snapshot, MB", "next turn's, MB", "restored in a new process, ms"):
        table.add_column(column, justify="right")
    for context, each in disk.items():
        table.add_row(
            f"{context:,}",
            f"{each['first'] / 1e6:.2f}",
            f"{each['next'] / 1e6:.2f}",
            f"{each['seconds'] * 1e3:.0f}",
        )
    return table


def batch_table(batch: dict[int, float]) -> Table:
    table = Table(title="answers that grow at once, tokens/s")
    for count in batch:
        table.add_column(str(count), justify="right")
    table.add_row(*(f"{rate:,.0f}" for rate in batch.values()))
    return table


if __name__ == "__main__":
    main()
