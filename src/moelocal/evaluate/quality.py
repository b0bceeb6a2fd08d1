"""`evaluate`: how far a model's next-token distributions are from those of its original."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np

from moelocal import hub
from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig
from moelocal.errors import RequestError, TokenizerError
from moelocal.evaluate.distribution import Scores, joined
from moelocal.evaluate.reference import Reference, obtain
from moelocal.evaluate.statistics import Bootstrap, Estimate
from moelocal.evaluate.walk import Experts, walk
from moelocal.model import require_kv_bits
from moelocal.quantize.corpus import Corpus
from moelocal.quantize.sizes import stored_sizes
from moelocal.survey import survey
from moelocal.text.tokenizer import Tokenizer
from moelocal.units import size

TOKENS: Final = 65_536
LENGTH: Final = 1024

EDGES: Final = tuple(10 ** (exponent / 4) for exponent in range(-32, 9))
"""Borders in nats of the bins of `Quality.kl_histogram`: four to a decade from 1e-8 to 100."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Weights:
    """One of the two models. `nbytes`: of its text tensors; `read_per_token`: what one token reads of them; `formats`:
    how many matrices are stored how."""

    name: str
    nbytes: int
    bits_per_weight: float
    read_per_token: int
    formats: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """The sequences of one kind: how many positions, and the figures of `Quality` over them."""

    tokens: int
    kl_mean: Estimate
    top1: Estimate
    acceptance: Estimate
    perplexity: Estimate
    reference_perplexity: Estimate


@dataclass(frozen=True, slots=True)
class Quality:
    """A comparison; every `Estimate` has a 95 % confidence interval over sequences.

    Divergences KL(reference || model) are in nats per token: their mean, percentiles and maximum over positions, and
    `kl_slack`, by how much the mean can be too low because only the likeliest tokens of the reference are kept
    (`distribution.py` has the formula). `kl_histogram`: positions below 1e-8, then between neighbours of `EDGES`, then
    above. `top1`: share of positions with the same likeliest token. `acceptance`: mean of Σ min(p, q), the share of the
    model's tokens that speculative decoding would accept; `acceptance_slack`, by how much it can be too high.
    `router_overlap`: by layer the share of the reference's experts that the model, on its own hidden states, chose too;
    layers that the two models do not have in common are missing. `parts`: by kind of text. `kv_bits`: of the model's
    keys and values; the reference's are never rounded.
    """

    model: Weights
    reference: Weights
    corpus: str
    corpus_digest: str
    sequences: int
    tokens: int
    dtype: str
    kv_bits: int | None
    device: str
    kl_mean: Estimate
    kl_median: Estimate
    kl_p95: Estimate
    kl_p99: Estimate
    kl_p999: Estimate
    kl_max: float
    kl_slack: float
    kl_histogram: tuple[int, ...]
    top1: Estimate
    acceptance: Estimate
    acceptance_slack: float
    perplexity: Estimate
    reference_perplexity: Estimate
    perplexity_ratio: Estimate
    router_overlap: dict[int, Estimate]
    router_overlap_mean: Estimate | None
    parts: dict[str, Part]
    reference_reused: bool


def evaluate(
    model: str | Path,
    reference: str | Path,
    corpus: Corpus | Path | None = None,
    *,
    kv_bits: int | None = None,
    tokens: int = TOKENS,
    length: int = LENGTH,
    dtype: mx.Dtype | None = None,
    offline: bool = False,
    progress: Progress = lambda which, done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> Quality:
    """Compare `model` with its original, `reference`, with one layer of weights in memory at a time. Both are folders
    or Hugging Face names.

    `corpus`: a `Corpus`, or a file of text (`Corpus.from_file`), or None for the built-in evaluation text, of which
    `tokens` tokens are taken in sequences of at most `length`. `dtype`: of both computations; None takes float32, as
    rounding to 16 bits moves a figure as much as the choice between good recipes does. `kv_bits`: 8 or 4 keeps the keys
    and values of `model`, not of `reference`, in so many bits; with the same weights for both the divergence is what
    that costs. `progress(which, done, total)`
    is told "reference" or "model"; `note` gets single lines about the stored reference.

    Raises `ModelNotFound`, `ConfigError`, `CheckpointError`, `TokenizerError`, `TemplateError`; `RequestError` for
    models that cannot be compared, `NumericsError` for NaN, with layer and sequence.
    """
    names = (str(model), str(reference))
    folders = [
        hub.resolve(name, offline=offline, progress=sys.stderr.isatty()) for name in (model, reference)
    ]
    opened = [Checkpoint.open(folder, ModelConfig.read(folder)) for folder in folders]
    _require_comparable(names, opened)
    _require_same_tokens(names, folders)
    if not isinstance(corpus, Corpus):
        corpus = _corpus(corpus, folders, tokens, length)
    _require_room(corpus, opened)
    require_kv_bits(opened[0].config, kv_bits)
    described = [_described(name, folder) for name, folder in zip(names, folders, strict=True)]
    dtype = dtype or mx.float32

    kept = obtain(opened[1], corpus, dtype, lambda *at: progress("reference", *at), note)
    note(f"reference {'taken from' if kept.reused else 'kept in'} {kept.stamp.folder} ({size(kept.nbytes)})")
    scores, overlaps = _compare(opened[0], kept, corpus, dtype, lambda *at: progress("model", *at), kv_bits)

    draws = Bootstrap(len(corpus.sequences))

    def of(name: str) -> list[Any]:
        return [getattr(each, name) for each in scores]

    kl = np.concatenate(of("kl"))
    median, p95, p99, p999 = draws.quantiles(of("kl"), (0.5, 0.95, 0.99, 0.999))
    layers = sorted(set.intersection(*(set(each) for each in overlaps)))
    return Quality(
        model=described[0],
        reference=described[1],
        corpus=corpus.name,
        corpus_digest=corpus.digest,
        sequences=len(scores),
        tokens=kl.size,
        dtype=kept.stamp.dtype,
        kv_bits=kv_bits,
        device=kept.stamp.device,
        kl_mean=draws.mean(of("kl")),
        kl_median=median,
        kl_p95=p95,
        kl_p99=p99,
        kl_p999=p999,
        kl_max=float(kl.max()),
        kl_slack=float(np.concatenate(of("kl_slack")).mean()),
        kl_histogram=tuple(np.histogram(kl, [-np.inf, *EDGES, np.inf])[0].tolist()),
        top1=draws.mean(of("top1")),
        acceptance=draws.mean(of("acceptance")),
        acceptance_slack=float(np.concatenate(of("acceptance_slack")).mean()),
        perplexity=draws.mean(of("nll"), np.exp),
        reference_perplexity=draws.mean(of("reference_nll"), np.exp),
        perplexity_ratio=draws.mean([each.nll - each.reference_nll for each in scores], np.exp),
        router_overlap={layer: draws.mean([each[layer] for each in overlaps]) for layer in layers},
        router_overlap_mean=draws.mean([np.stack([each[n] for n in layers]).mean(0) for each in overlaps])
        if layers
        else None,
        parts={
            kind: _part([each for each, its in zip(scores, corpus.kinds, strict=True) if its == kind])
            for kind in dict.fromkeys(corpus.kinds)
        },
        reference_reused=kept.reused,
    )


def _part(scores: list[Scores]) -> Part:
    draws = Bootstrap(len(scores))
    return Part(
        tokens=sum(each.kl.size for each in scores),
        kl_mean=draws.mean([each.kl for each in scores]),
        top1=draws.mean([each.top1 for each in scores]),
        acceptance=draws.mean([each.acceptance for each in scores]),
        perplexity=draws.mean([each.nll for each in scores], np.exp),
        reference_perplexity=draws.mean([each.reference_nll for each in scores], np.exp),
    )


def _compare(
    checkpoint: Checkpoint,
    kept: Reference,
    corpus: Corpus,
    dtype: mx.Dtype,
    report: Callable[[int, int], None],
    kv_bits: int | None,
) -> tuple[list[Scores], list[dict[int, Any]]]:
    """Scores of each sequence, and by layer the share of the reference's experts at each of its positions."""
    experts, chunks = walk(checkpoint, corpus, dtype, report, kv_bits)
    scores: list[Scores] = []
    overlaps: list[dict[int, Any]] = []
    parts: list[Scores] = []
    for chunk in chunks:
        if not chunk.first:
            distributions, routes = kept.read(chunk.number)
        parts.append(distributions.compare(chunk.first, chunk.logits, chunk.targets))
        if chunk.last:
            scores.append(joined(parts))
            overlaps.append(_overlap(routes, experts[chunk.number]))
            parts = []
    return scores, overlaps


def _overlap(reference: Experts, model: Experts) -> dict[int, Any]:
    """By layer, share of the reference's experts that the model chose too, float64 [T]."""
    shares = {}
    for layer, theirs in reference.items():
        ours = model.get(layer)
        if ours is not None and ours.shape == theirs.shape:
            shares[layer] = (theirs[:, :, None] == ours[:, None, :]).any(2).mean(1)
    return shares


def _described(name: str, folder: Path) -> Weights:
    found = survey(folder)
    weighed = stored_sizes(found)
    return Weights(name, weighed.nbytes, weighed.bits_per_weight, weighed.read_per_token, found.formats)


def _require_comparable(names: tuple[str, str], opened: list[Checkpoint]) -> None:
    ours, theirs = (each.config.vocab for each in opened)
    if ours != theirs:
        raise RequestError(
            f"{names[0]}: its vocabulary has {ours} rows, that of {names[1]} {theirs}: "
            "distributions over different tokens cannot be compared"
        )


def _require_same_tokens(names: tuple[str, str], folders: list[Path]) -> None:
    """Where both folders have a tokenizer, each id must stand for the same bytes."""
    if not all(map(_has_tokenizer, folders)):
        return
    ours, theirs = map(Tokenizer.open, folders)
    for token in sorted(ours.tokens | theirs.tokens):
        first, second = (each.bytes_of(token) if each.is_token(token) else None for each in (ours, theirs))
        if first != second:
            raise RequestError(
                f"{names[0]}: its tokenizer is not that of {names[1]}: token {token} is {_shown(first)} here and "
                f"{_shown(second)} there"
            )


def _corpus(text: Path | None, folders: list[Path], tokens: int, length: int) -> Corpus:
    """Encoded by the original's tokenizer, or the model's if it alone has one."""
    folder = next(filter(_has_tokenizer, reversed(folders)), folders[1])
    if text is not None:
        return Corpus.from_file(text, folder, tokens, length)
    return Corpus.built_in(folder, "evaluation", tokens, length)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _shown(piece: bytes | None) -> str:
    return "missing" if piece is None else repr(piece.decode("utf-8", "replace"))


def _require_room(corpus: Corpus, opened: list[Checkpoint]) -> None:
    lengths = [len(ids) for ids in corpus.sequences]
    if min(lengths, default=0) < 2:
        raise RequestError(
            "the corpus: expected sequences of at least 2 tokens each, and at least one sequence"
        )
    longest = max(lengths)
    context = min(each.config.context for each in opened)
    if longest > context:
        raise RequestError(f"sequences of {longest} tokens are longer than the context of {context}")
    highest, rows = max(map(max, corpus.sequences)), opened[1].config.vocab
    if highest >= rows:
        raise TokenizerError(
            f"the text has token {highest}, but the models have only {rows} rows; "
            "the tokenizer files belong to another model"
        )
