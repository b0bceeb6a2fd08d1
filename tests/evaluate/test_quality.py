"""`evaluate` from two folders to every figure, against an independent computation with the whole models."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from moelocal.errors import MoelocalError, NumericsError, RequestError, TokenizerError
from moelocal.evaluate import Quality, evaluate
from moelocal.evaluate.quality import EDGES
from moelocal.hub import EMBEDDED
from moelocal.layers import mlp
from moelocal.model import Decoder
from moelocal.quantize.corpus import Corpus
from moelocal.units import size
from packed import pack
from parity.checkpoints import SMALL, Recipe, tokens, write
from parity.storage import encode, read_tensors, write_tensors

FAMILIES = ("qwen3_5_moe", "qwen3_5", "qwen3_next", "qwen3_moe")
LENGTHS = (40, 25, 300, 2)
CORPUS = Corpus(
    "random",
    tuple(tuple(map(int, tokens(n, 96, seed))) for seed, n in enumerate(LENGTHS)),
    ("even", "odd", "even", "odd"),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOELOCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A model in 4 bits and its original."""
    folder = tmp_path_factory.mktemp("pair")
    original = write(folder / "original", Recipe("qwen3_5_moe", **SMALL))
    return pack(original, folder / "packed", 4), original


@pytest.fixture(scope="module")
def readable(tmp_path_factory) -> Path:
    """Random weights with the embedded model's tokenizer and template."""
    folder = write(
        tmp_path_factory.mktemp("readable") / "model", Recipe("qwen3_5_moe", **SMALL | {"vocab": 1536})
    )
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / name, folder)
    return folder


def run_whole(folder: Path, monkeypatch) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Log-probabilities float64 [T, V] of every sequence and, per layer, the chosen experts [T, K]; by the decoder."""
    chosen: list[np.ndarray] = []
    honest = mlp.route

    def watched(*args):
        found = honest(*args)
        chosen.append(np.array(found[0][0]))
        return found

    decoder, rows, experts = Decoder.open(folder, mx.float32), [], []
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "route", watched)
        for ids in CORPUS.sequences:
            wide = np.array(decoder(mx.array([ids]))[0], np.float64)
            rows.append(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))
            experts.append(list(chosen))
            chosen.clear()
    return rows, experts


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_figure_equals_that_of_the_whole_models(tmp_path, monkeypatch, family, bits):
    original = write(tmp_path / "original", Recipe(family, **SMALL))
    model = pack(original, tmp_path / "packed", bits)
    quality = evaluate(model, original, CORPUS)
    (logq, ours), (logp, theirs) = run_whole(model, monkeypatch), run_whole(original, monkeypatch)

    def every(function) -> np.ndarray:
        return np.concatenate([function(p[:-1], q[:-1]) for p, q in zip(logp, logq, strict=True)])

    def likelihood(rows: list[np.ndarray]) -> float:
        found = [r[np.arange(len(ids) - 1), ids[1:]] for r, ids in zip(rows, CORPUS.sequences, strict=True)]
        return -np.concatenate(found).mean()

    kl = every(lambda p, q: (np.exp(p) * (p - q)).sum(-1))
    # float32 log-probabilities, and sequences of 300 tokens in two chunks: 1e-6 seen
    assert quality.kl_mean.value == pytest.approx(kl.mean(), abs=1e-5)
    assert quality.kl_max == pytest.approx(kl.max(), abs=1e-4)
    for name, share in (("median", 0.5), ("p95", 0.95), ("p99", 0.99), ("p999", 0.999)):
        found = getattr(quality, f"kl_{name}").value
        assert found == pytest.approx(np.quantile(kl, share, method="inverted_cdf"), abs=1e-4)
    assert quality.acceptance.value == pytest.approx(
        every(lambda p, q: np.minimum(np.exp(p), np.exp(q)).sum(-1)).mean(), abs=1e-5
    )
    assert quality.top1.value == every(lambda p, q: p.argmax(-1) == q.argmax(-1)).mean()
    assert quality.perplexity.value == pytest.approx(np.exp(likelihood(logq)), rel=1e-5)
    assert quality.reference_perplexity.value == pytest.approx(np.exp(likelihood(logp)), rel=1e-5)
    assert quality.perplexity_ratio.value == pytest.approx(
        np.exp(likelihood(logq) - likelihood(logp)), rel=1e-5
    )
    assert sum(quality.kl_histogram) == quality.tokens == kl.size == sum(LENGTHS) - len(LENGTHS)
    assert quality.sequences == len(LENGTHS) and quality.corpus_digest == CORPUS.digest

    layers = range(len(theirs[0]))
    overlap = {
        layer: np.mean(
            [len(set(a) & set(b)) / len(b) for m, r in zip(ours, theirs, strict=True)
             for a, b in zip(m[layer], r[layer], strict=True)]
        )
        for layer in layers
    }  # fmt: skip
    assert list(quality.router_overlap) == list(layers)  # none in the dense family
    for layer in layers:
        assert quality.router_overlap[layer].value == pytest.approx(overlap[layer], abs=1e-12)
    if family == "qwen3_5":
        assert quality.router_overlap_mean is None
    else:
        assert quality.router_overlap_mean.value == pytest.approx(np.mean(list(overlap.values())), abs=1e-12)


def test_more_bits_are_closer(tmp_path):
    original = write(tmp_path / "original", Recipe("qwen3_5_moe", **SMALL))
    found = [evaluate(pack(original, tmp_path / f"{bits}", bits), original, CORPUS) for bits in (2, 4, 8)]
    for worse, better in pairwise(found):
        assert worse.kl_mean.value > 3 * better.kl_mean.value
        assert worse.acceptance.value < better.acceptance.value
        assert worse.router_overlap_mean.value < better.router_overlap_mean.value
    assert [each.reference_reused for each in found] == [False, True, True]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["packed", "original"])
def test_a_model_against_itself_is_at_no_distance(pair, which, dtype):
    short = Corpus("short", CORPUS.sequences[:2], CORPUS.kinds[:2])  # 16-bit products are slow on a CPU
    quality = evaluate(pair[which], pair[which], short, dtype=dtype)
    assert quality.kl_mean.value == quality.kl_max == quality.kl_p999.value == 0
    assert quality.top1.value == 1 and quality.router_overlap_mean.value == 1
    assert quality.acceptance.value == pytest.approx(1, abs=1e-14)
    assert quality.perplexity == quality.reference_perplexity and quality.perplexity_ratio.value == 1
    assert quality.kl_histogram[0] == quality.tokens
    assert quality.dtype == str(dtype).removeprefix("mlx.core.") and quality.device == "cpu"


def test_the_parts_of_a_corpus_are_told_apart(pair):
    quality = evaluate(*pair, CORPUS)
    assert list(quality.parts) == ["even", "odd"]
    even = Corpus("even", CORPUS.sequences[::2], ("even",) * 2)
    alone = evaluate(*pair, even)
    part = quality.parts["even"]
    assert (part.tokens, part.kl_mean, part.top1) == (alone.tokens, alone.kl_mean, alone.top1)
    assert (part.acceptance, part.perplexity) == (alone.acceptance, alone.perplexity)
    assert part.reference_perplexity == alone.reference_perplexity
    assert quality.tokens == sum(part.tokens for part in quality.parts.values())


def test_sizes_are_those_of_the_files(pair):
    quality = evaluate(*pair, CORPUS)

    def text_bytes(folder: Path) -> int:
        stored = read_tensors(sorted(folder.glob("model*.safetensors")))
        return sum(len(data) for n, (_, _, data) in stored.items() if "visual" not in n and "mtp" not in n)

    for weights, folder in zip((quality.model, quality.reference), pair, strict=True):
        assert weights.name == str(folder) and weights.nbytes == text_bytes(folder)
        assert 0 < weights.read_per_token < weights.nbytes
    assert quality.reference.bits_per_weight == pytest.approx(32)
    assert 5 < quality.model.bits_per_weight < 8  # 4 bits, scale and bias in float32 per 32, norms
    assert dict(quality.model.formats)["affine 4 bits in groups of 32"] > 20


def test_progress_counts_both_models_and_notes_say_where_the_reference_is(pair, cache):
    seen: list[tuple[str, int, int]] = []
    notes: list[str] = []

    def run() -> Quality:
        seen.clear(), notes.clear()
        return evaluate(*pair, CORPUS, progress=lambda *at: seen.append(at), note=notes.append)

    assert not run().reference_reused
    # 4 sequences through 4 layers and the head
    assert [at for at in seen if at[0] == "reference"] == [("reference", done, 20) for done in sorted(
        [*range(1, 21), 18])]  # fmt: skip
    assert seen[-1] == ("model", 20, 20)
    place = next((cache / "references").iterdir())
    nbytes = sum(file.stat().st_size for file in place.iterdir())
    assert notes == [f"reference kept in {place} ({size(nbytes)})"]
    first = run()
    assert first.reference_reused and {which for which, _, _ in seen} == {"model"}
    assert notes[0].startswith(f"reference taken from {place} (")


def test_a_stored_reference_gives_the_same_figures(pair):
    first, second = (asdict(evaluate(*pair, CORPUS)) for _ in range(2))
    assert (first.pop("reference_reused"), second.pop("reference_reused")) == (False, True)
    assert first == second


def test_the_result_is_json(pair):
    found = asdict(evaluate(*pair, CORPUS))
    assert json.loads(json.dumps(found, allow_nan=False))["kl_mean"] == found["kl_mean"]


def test_one_sequence_has_no_intervals(pair):
    quality = evaluate(*pair, Corpus("one", CORPUS.sequences[:1], ("text",)))
    assert quality.kl_mean.low is None and quality.kl_mean.high is None
    assert quality.router_overlap[0].low is None


def test_the_histogram_has_a_bin_below_and_one_above():
    assert len(EDGES) == 41 and EDGES[0] == 1e-8 and EDGES[-1] == 100
    assert np.allclose(np.log10(EDGES[1:]) - np.log10(EDGES[:-1]), 0.25)


def test_texts_are_encoded_with_the_tokenizer_of_the_original(readable, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(readable, model)
    (model / "tokenizer.json").unlink()
    file = tmp_path / "text.txt"
    file.write_text("A short text about nothing in particular. " * 20)
    for pair in ((model, readable), (readable, model)):  # or of the only one that has one
        quality = evaluate(*pair, file, length=50)
        assert quality.corpus == "text.txt" and quality.kl_max == 0
        assert quality.corpus_digest == Corpus.from_file(file, readable, 10**6, 50).digest


def test_without_a_text_it_is_the_built_in_one(readable):
    quality = evaluate(readable, readable, tokens=200, length=60)
    assert quality.corpus == "built-in evaluation text"
    assert quality.corpus_digest == Corpus.built_in(readable, "evaluation", 200, 60).digest
    assert list(quality.parts) == ["documentation", "chats"]


def refused(*args, **options) -> tuple[type[MoelocalError], str]:
    with pytest.raises(MoelocalError) as caught:
        evaluate(*args, **options)
    return type(caught.value), str(caught.value)


def test_another_vocabulary_is_refused(pair, readable):
    assert refused(readable, pair[1], CORPUS) == (
        RequestError,
        f"{readable}: its vocabulary has 1536 rows, that of {pair[1]} 96: distributions over different tokens cannot "
        "be compared",
    )


def test_another_tokenizer_is_refused(readable, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(readable, other)
    raw = json.loads((other / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    a, b = vocab["a"], vocab["b"]
    vocab["a"], vocab["b"] = b, a
    (other / "tokenizer.json").write_text(json.dumps(raw))
    first = min(a, b)
    ours, theirs = ("b", "a") if first == a else ("a", "b")
    assert refused(other, readable, CORPUS) == (
        RequestError,
        f"{other}: its tokenizer is not that of {readable}: token {first} is {ours!r} here and {theirs!r} there",
    )


def test_a_tokenizer_without_one_of_the_tokens_is_refused(readable, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(readable, other)
    raw = json.loads((other / "tokenizer.json").read_text())
    last = max(raw["added_tokens"], key=lambda entry: entry["id"])
    raw["added_tokens"].remove(last)
    (other / "tokenizer.json").write_text(json.dumps(raw))
    shown = "''" if last["special"] else repr(last["content"])
    assert refused(other, readable, CORPUS) == (
        RequestError,
        f"{other}: its tokenizer is not that of {readable}: token {last['id']} is missing here and {shown} there",
    )


def test_without_any_tokenizer_there_is_no_text(pair):
    kind, message = refused(*pair)
    assert kind is TokenizerError
    assert message.startswith(f"{pair[1]}: neither tokenizer.json nor tokenizer.model is there")


def test_a_tokenizer_of_another_model_is_refused(pair, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pair[1], folder)
    shutil.copy(EMBEDDED / "tokenizer.json", folder)
    corpus = Corpus.built_in(folder, "evaluation", 500, 100)
    highest = max(max(ids) for ids in corpus.sequences)
    assert refused(folder, folder, tokens=500, length=100) == (
        TokenizerError,
        f"the text has token {highest}, but the models have only 96 rows; the tokenizer files belong to another model",
    )


def test_sequences_beyond_the_context_are_refused(pair, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pair[1], folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["max_position_embeddings"] = 200
    (folder / "config.json").write_text(json.dumps(raw))
    assert refused(pair[0], folder, CORPUS) == (
        RequestError,
        "sequences of 300 tokens are longer than the context of 200",
    )


@pytest.mark.parametrize("sequences", [(), ((1, 2), (3,)), ((),)])
def test_a_corpus_without_anything_to_predict_is_refused(pair, sequences):
    assert refused(*pair, Corpus("empty", sequences, ("text",) * len(sequences))) == (
        RequestError,
        "the corpus: expected sequences of at least 2 tokens each, and at least one sequence",
    )


@pytest.mark.parametrize("which", ["model", "reference"])
def test_nan_is_named_with_model_layer_and_sequence(tmp_path, pair, which, cache):
    broken = write(tmp_path / "broken", Recipe("qwen3_5_moe", **SMALL), shards=1)
    file, name = (
        broken / "model.safetensors",
        "model.language_model.layers.1.mlp.shared_expert.up_proj.weight",
    )
    stored = read_tensors([file])
    values = np.frombuffer(stored[name][2], np.float32).copy()
    values[5] = np.nan
    write_tensors(file, stored | {name: encode(values.reshape(stored[name][1]))})
    given = (broken, pair[1]) if which == "model" else (pair[0], broken)
    assert refused(*given, CORPUS) == (
        NumericsError,
        f"{broken}: layer 1: NaN or infinite values in sequence 0: its weights are damaged, or too large for a "
        "computation in float32",
    )
    # of a reference that failed nothing is kept
    assert len(list((cache / "references").iterdir())) == (1 if which == "model" else 0)
