"""`moelocal bench`: its flags, what fits, whom it measures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Final

import mlx.core as mx

from moelocal import flags
from moelocal.bench import results
from moelocal.bench.energy import Meter
from moelocal.bench.header import Header, Identity, command_line, slug
from moelocal.bench.peers import MLX_LM, OURS, Loaded, Process, Prompt, Served, Side, plain, require_mlx_lm
from moelocal.bench.printed import lines
from moelocal.bench.prompts import text_of
from moelocal.bench.report import Result
from moelocal.bench.server import Server
from moelocal.bench.speed import LOADS, ROUNDS, TOKENS, Report, contexts_of, measure
from moelocal.config import ModelConfig
from moelocal.engine.load import DTYPES
from moelocal.engine.plan import VARIABLE, Plan, plan
from moelocal.errors import MemoryOverflow, RequestError
from moelocal.ops.op import on_cpu
from moelocal.quantize.once import prepared
from moelocal.quantize.recipe import BUILT_IN, Recipe
from moelocal.quantize.sizes import WORKING, Memory, shapes_of, sizes
from moelocal.survey import survey
from moelocal.text.generation_config import GenerationDefaults
from moelocal.text.template import ChatTemplate
from moelocal.text.tokenizer import Tokenizer
from moelocal.units import GIB, size

_MACS: Final = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
"""Gigabytes of memory that Macs are sold with."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench`."""
    flags.add(parser, "--model", "--revision", "--offline", "--quantization", "--dtype")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="PEER",
        help="measure in turns with mlx-lm (same checkpoint), or with a server on this machine by its "
        "ADDRESS[=MODEL], as localhost:1234 (LM Studio; Ollama has 11434, llama.cpp 8080); may be repeated",
    )
    parser.add_argument(
        "--contexts",
        type=_contexts,
        metavar="N,N,…",
        help="tokens before the answer, like 0,4096,32k; else 0 and 512 to 128k in doublings, as memory and the model "
        "allow",
    )
    parser.add_argument(
        "--tokens",
        type=flags.integer(2),
        default=TOKENS,
        metavar="N",
        help="to decode each time (default %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=flags.integer(1),
        default=ROUNDS,
        metavar="N",
        help="after a warm-up (default %(default)s)",
    )
    parser.add_argument(
        "--loads",
        type=flags.integer(1),
        default=LOADS,
        metavar="N",
        help="times to load each (default %(default)s)",
    )
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where the file of results is")
    parser.add_argument(
        "--no-results", action="store_true", help="write no file of results, and no plot unless it is named"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw it as .png there; else beside the results"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(parsed: argparse.Namespace) -> None:
    """Measure how fast a model is on this machine: reading prompts and decoding at growing contexts, loading, memory,
    energy where the system tells; beside other programs with --against. Nothing leaves this machine but the download
    of a model that is not here yet."""
    if parsed.plot is not None:
        flags.require_plot(parsed.plot, (".png",))
    noted = None if parsed.no_results else parsed.results or results.default_folder()
    if noted is not None:
        results.require_writable(noted)
    servers = _servers(parsed)  # before a model is downloaded
    folder = prepared(
        parsed.model,
        parsed.quantization,
        revision=parsed.revision,
        offline=parsed.offline,
        progress=sys.stderr.isatty(),
    )
    name = "embedded" if parsed.model is None else str(parsed.model)
    require_fits(folder, name, parsed.dtype)
    result = _measured(parsed, folder, name, servers)
    # what was measured is noted first and printed whatever fails behind it
    try:
        try:
            file = None if noted is None else results.append(noted, result.rows())
        finally:
            print("\n".join(lines(result)))
        if file is not None:
            print(f"\nresults    {file}")
        _draw(parsed, result)
    finally:
        if parsed.json:
            print(json.dumps(result.as_dict()))
    if result.measured.interrupted:
        raise KeyboardInterrupt


def _measured(
    parsed: argparse.Namespace, folder: Path, name: str, servers: Sequence[tuple[Server, str]]
) -> Result:
    config, tokenizer, meter = ModelConfig.read(folder), Tokenizer.open(folder), Meter.here()
    template = ChatTemplate.open(folder) if servers else None
    stops = GenerationDefaults.open(folder, config.eos).stop_tokens
    header, model = Header.now(command_line()), Identity.of(folder, name)

    @lru_cache(maxsize=2)  # the sides read the same one, one after the other
    def prompt(context: int, number: int) -> Prompt:
        if template is None:
            return Prompt(text_of(lambda text: len(tokenizer.encode(text)), context, number))

        def messages(text: str) -> tuple[dict[str, str], ...]:
            return ({"role": "user", "content": text},)

        def rendered(text: str) -> str:
            return template.render(messages(text))

        text = text_of(lambda text: len(tokenizer.encode(rendered(text))), context, number)
        return Prompt(rendered(text), messages(text))

    def cut(tokens: Sequence[int]) -> tuple[Sequence[int], bool]:
        end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
        return tokenizer.encode(plain(tokenizer.decode(tokens[:end]))), end < len(tokens)

    ours = Process(OURS, folder, parsed.dtype, meter)
    try:
        loaded = ours.start()
    finally:
        ours.stop()
    contexts = _contexts_that_fit(parsed, config, loaded)
    sides: list[Side] = [ours]
    if MLX_LM in parsed.against:
        sides.append(Process(MLX_LM, folder, parsed.dtype, meter))
    sides += [Served(server, which, tokenizer.encode, meter) for server, which in servers]
    with _bar(sys.stderr.isatty()) as report:
        found = measure(
            sides,
            prompt,
            contexts,
            tokens=parsed.tokens,
            rounds=parsed.rounds,
            loads=parsed.loads,
            together=MLX_LM not in parsed.against or _both_fit(parsed, config, loaded, max(contexts)),
            report=report,
        )
    return Result(header, model, config, found, cut, tokenizer.token_mask(config.vocab).tolist(), meter.name)


def _contexts_that_fit(parsed: argparse.Namespace, config: ModelConfig, loaded: Loaded) -> tuple[int, ...]:
    dtype = DTYPES[loaded.dtype]
    made = plan(config, loaded.weights_nbytes, dtype, 1, parsed.tokens).check()
    return contexts_of(parsed.contexts, parsed.tokens, config.context, made.largest_context)


def _both_fit(parsed: argparse.Namespace, config: ModelConfig, loaded: Loaded, context: int) -> bool:
    """Whether two programs with this model fit into memory, the other with as much as ours."""
    made = plan(config, loaded.weights_nbytes, DTYPES[loaded.dtype], max(context, 1), parsed.tokens)
    return made.limit is None or 2 * made.nbytes <= made.limit


def require_fits(folder: Path, name: str, dtype: str | None) -> None:
    """Raises `MemoryOverflow` for a model whose weights and work on one token do not fit into what this machine has for
    them, and says what would fit."""
    found = survey(folder)
    computed = DTYPES[dtype] if dtype else mx.float32 if on_cpu() else found.dtype
    shapes = shapes_of(found.config)

    def planned(recipe: str | None = None) -> Plan:
        formats = found.packed if recipe is None else Recipe.open(recipe).plan(found.config, shapes)
        return plan(found.config, sizes(found.config, shapes, formats, computed.size).nbytes, computed, 1, 1)

    made = planned()
    if made.limit is None or made.fits:
        return
    smaller = {recipe: small.weights for recipe in BUILT_IN if (small := planned(recipe)).fits}
    best = max(smaller, key=lambda recipe: smaller[recipe], default=None)
    macs = [gib for gib in _MACS if Memory.of(gib * GIB).usable >= made.weights + WORKING]
    advice = []
    if best is not None:
        advice.append(
            f"its original weights quantized with `moelocal quantize --recipe {best}` would ({size(smaller[best])})"
        )
    if macs:
        advice.append(f"a Mac with {macs[0]} GB would hold it as it is")
    told = "; ".join(advice) or "no recipe makes it small enough, and no Mac is large enough"
    raise MemoryOverflow(
        f"{name}: weights of {size(made.weights)} and {size(made.nbytes - made.weights)} for one token do not fit the "
        f"{size(made.limit)} that a model may take here; {told}; or allow more with {VARIABLE}"
    )


def _servers(parsed: argparse.Namespace) -> list[tuple[Server, str]]:
    """The servers named by --against that answer, each with its model. Raises `RequestError`."""
    if MLX_LM in parsed.against:
        require_mlx_lm()
    found: list[tuple[Server, str]] = []
    for peer in parsed.against:
        if peer == MLX_LM:
            continue
        if ":" not in peer.partition("=")[0]:
            raise RequestError(f"--against {peer}: expected {MLX_LM}, or an address like localhost:1234")
        server, name = Server.named(peer)
        if any((each.port, each.base, other) == (server.port, server.base, name) for each, other in found):
            raise RequestError(f"--against {peer}: named twice")
        # not every server lists what it can serve, and some load a model when it is first asked
        server.chat([{"role": "user", "content": "Hi"}], model=name, max_tokens=1)
        found.append((server, name))
    return found


def _draw(parsed: argparse.Namespace, result: Result) -> None:
    if parsed.plot is None and parsed.no_results:
        return
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no plot: {sys.executable} -m pip install matplotlib")
        return
    from moelocal.bench.plot import plot  # here: matplotlib takes a second

    name = f"{result.header.machine}-{slug(Path(result.model.name).name)}.png"
    file = parsed.plot or (parsed.results or results.default_folder()) / name
    plot(result, file)
    print(f"plot       {file}")


def _contexts(text: str) -> list[int]:
    """ "0,4096,32k" as numbers."""
    found = []
    for word in text.split(","):
        word = word.strip().lower()
        number = word.removesuffix("k")
        if not number.isascii() or not number.isdecimal():
            raise argparse.ArgumentTypeError(f"expected numbers of tokens like 0,4096,32k, got {text!r}")
        found.append(int(number) * (1024 if word.endswith("k") else 1))
    return found


@contextmanager
def _bar(wanted: bool) -> Iterator[Report]:
    """A progress bar with the time that is left, on a terminal."""
    if not wanted:
        yield lambda what, done, total: None
        return
    # imported here: only a terminal needs it
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    # a [ in the name of a model is no style
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring")
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
