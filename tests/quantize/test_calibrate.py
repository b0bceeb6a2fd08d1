"""Calibration of whole models: two streams of states, layer by layer, in every family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig
from moelocal.errors import CheckpointError, NumericsError, TokenizerError
from moelocal.evaluate import evaluate
from moelocal.formats import QuantizedArray, QuantSpec
from moelocal.hub import resolve
from moelocal.ops.group_search import group_search
from moelocal.quantize import calibrated_layer
from moelocal.quantize.calibrate import Calibration
from moelocal.quantize.convert import convert
from moelocal.quantize.corpus import Corpus
from moelocal.quantize.recipe import Plan, matrices
from moelocal.quantize.recipe import Recipe as BitRecipe
from moelocal.quantize.sizes import shapes_of
from moelocal.quantize.streamed import block_of, stream
from packed import pack
from parity.checkpoints import SMALL, Recipe, tokens, write
from parity.storage import encode, read_tensors, write_shards

LAYERS = {"qwen3_5_moe": 4, "qwen3_5": 1, "qwen3_next": 1, "qwen3_moe": 1}
"""By family: one has layers of both kinds."""
FOUR = QuantSpec(4, 32)
ROUNDED = 0.05
"""Mean square, of the weights', between two fits of four bits that see nearly the same: each errs by about 0.01."""


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, ModelConfig.read(folder))


def texts(*lengths: int) -> Corpus:
    ids = tuple(tuple(tokens(length, 96, seed).tolist()) for seed, length in enumerate(lengths))
    return Corpus("test", ids, ("text",) * len(ids))


def plan_of(folder: Path) -> Plan:
    """Four bits, but the router at eight, and two kinds of matrix left as they are."""
    config = ModelConfig.read(folder)
    formats: dict[str, QuantSpec | None] = {"router": QuantSpec(8, 32), "delta.b": None, "attention.v": None}
    return {path: formats.get(kind, FOUR) for path, kind, _ in matrices(shapes_of(config))}


def run(
    folder: Path, corpus: Corpus, work: Path, first: int = 0, stop: int | None = None
) -> dict[str, QuantizedArray]:
    """A conversion's calls, from layer `first` to before `stop`, or to the head. The embedding stays as it is."""
    work.mkdir(exist_ok=True)
    plan, calibration, count = plan_of(folder), Calibration(corpus), len(ModelConfig.read(folder).layers)
    calibration.begin(opened(folder), opened(folder), work)
    for index in range(first):
        calibration.resume(index, opened(folder))
    made: dict[str, QuantizedArray] = {}
    for index in range(first, count if stop is None else stop):
        made |= calibration.layer(index, opened(folder), plan)
    if stop is None and "lm_head" in plan:
        made |= calibration.head(opened(folder), plan)
    return made


def states(work: Path, index: int, model: str) -> list[mx.array]:
    arrays = mx.load(str(work / f"states-{index}.safetensors"))
    return [arrays[f"{model}.{i}"] for i in range(len(arrays) // 2)]


def same(a: dict[str, QuantizedArray], b: dict[str, QuantizedArray]) -> bool:
    return a.keys() == b.keys() and all(
        mx.array_equal(x, y) for path in a for x, y in zip(a[path].arrays, b[path].arrays, strict=True)
    )


@dataclass(frozen=True)
class Finished:
    """A calibrated model: its folder, the text, what was made, and the states before the head."""

    folder: Path
    corpus: Corpus
    made: dict[str, QuantizedArray]
    work: Path


@pytest.fixture(scope="module", params=LAYERS)
def finished(request, tmp_path_factory) -> Finished:
    place = tmp_path_factory.mktemp(request.param)
    recipe = Recipe(request.param, **SMALL, layers=LAYERS[request.param])
    folder, corpus = write(place / "model", recipe), texts(200, 150)
    return Finished(folder, corpus, run(folder, corpus, place / "work"), place / "work")


@pytest.fixture
def moe(tmp_path) -> Path:
    return write(tmp_path / "model", Recipe("qwen3_5_moe", **SMALL, layers=2))


def test_makes_every_matrix_of_the_plan_in_its_format(finished):
    plan, shapes = plan_of(finished.folder), shapes_of(ModelConfig.read(finished.folder))
    expected = {path: spec for path, spec in plan.items() if spec and path != "embed_tokens"}
    assert {path: packed.spec for path, packed in finished.made.items()} == expected
    for path, packed in finished.made.items():
        assert packed.dequantize(mx.float32).shape == shapes[f"{path}.weight"]
        assert packed.scales.dtype == opened(finished.folder).compute_dtype
        assert mx.all(mx.isfinite(packed.scales)).item() and mx.all(mx.isfinite(packed.biases)).item()


def test_the_original_stream_is_the_original_model(finished):
    ids = [mx.array(each, mx.int32) for each in finished.corpus.sequences]
    last = len(ModelConfig.read(finished.folder).layers)
    expected = stream(opened(finished.folder), ids, mx.float32)
    for ours, theirs in zip(states(finished.work, last, "original"), expected, strict=True):
        # the layer is computed in parts here, in another order of the same sums
        assert np.allclose(np.array(ours), np.array(theirs), rtol=1e-4, atol=1e-5)


def test_stays_closer_to_the_original_than_the_plain_search(finished, tmp_path, monkeypatch):
    def distance(work: Path) -> float:
        last = len(ModelConfig.read(finished.folder).layers)
        pairs = zip(states(work, last, "original"), states(work, last, "quantized"), strict=True)
        return sum(mx.sum((a - b) ** 2).item() for a, b in pairs)

    def search(weights, moments, spec, dtype) -> QuantizedArray:
        return group_search(weights, spec, None, dtype)

    monkeypatch.setattr(calibrated_layer, "calibrated", search)
    run(finished.folder, finished.corpus, tmp_path)
    ratio = distance(finished.work) / distance(tmp_path)
    assert ratio < 0.75, ratio


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, QuantizedArray]:
    place = tmp_path_factory.mktemp("whole")
    folder = write(place / "model", Recipe("qwen3_5_moe", **SMALL, layers=2))
    return run(folder, texts(30, 9), place / "work")


@pytest.mark.parametrize("reached", [0, 1, 2])
def test_goes_on_where_it_was_interrupted(moe, tmp_path, reached, uninterrupted):
    corpus, work, whole = texts(30, 9), tmp_path / "work", uninterrupted
    # the last layer that was quantized was not written, so that it is asked for again
    run(moe, corpus, work, stop=min(reached + 1, 2))
    kept = {f"states-{index}.safetensors" for index in ([0, 1], [1, 2], [1, 2])[reached]}
    assert {file.name for file in work.iterdir()} == kept
    rest = run(moe, corpus, work, first=reached)
    before = tuple(f"layers.{index}." for index in range(reached))
    assert same(rest, {path: packed for path, packed in whole.items() if not path.startswith(before)})


def test_experts_that_no_token_reaches(moe, tmp_path):
    """One token reaches two of four experts; the others are quantized as well as without calibration."""
    made = run(moe, texts(1), tmp_path / "work", stop=1)
    path = "layers.0.mlp.switch_mlp.down_proj"
    weights = opened(moe).sources[f"{path}.weight"].read().astype(mx.float32)
    plain = group_search(weights, FOUR, None, mx.float32)

    def errors(packed: QuantizedArray) -> np.ndarray:
        return np.array(mx.sum((packed.dequantize(mx.float32) - weights) ** 2, axis=(1, 2)))

    unchanged = errors(made[path]) <= errors(plain) * (1 + 1e-5)
    assert np.sum(unchanged) >= 2


def test_a_batch_of_experts_is_no_matter(moe, tmp_path, monkeypatch):
    corpus = texts(60)
    whole = run(moe, corpus, tmp_path / "whole", stop=1)
    monkeypatch.setattr(calibrated_layer, "EXPERT_BYTES", 3 * 4 * 32**2)
    assert same(run(moe, corpus, tmp_path / "batches", stop=1), whole)


def test_activations_in_bfloat16(moe, tmp_path):
    calibration, plan = Calibration(texts(60), mx.bfloat16), plan_of(moe)
    calibration.begin(opened(moe), opened(moe), tmp_path)
    made = calibration.layer(0, opened(moe), plan)
    assert made.keys() == {path for path, spec in plan.items() if spec and path.startswith("layers.0.")}
    assert {x.dtype for model in ("original", "quantized") for x in states(tmp_path, 1, model)} == {
        mx.bfloat16
    }
    exact = run(moe, texts(60), tmp_path / "exact", stop=1)
    path = "layers.0.mlp.switch_mlp.gate_proj"
    a, b = (x[path].dequantize(mx.float32) for x in (made, exact))
    assert mx.mean((a - b) ** 2).item() < ROUNDED * mx.mean(b**2).item()


def test_memory_holds_one_layer_however_many_there_are(tmp_path, monkeypatch):
    # experts are most of the weights, and what is in work is small against them
    recipe = Recipe(
        "qwen3_5_moe", layers=3, hidden=64, vocab=96, experts=64, width=64, mtp=False, dtype="F32"
    )
    folder = write(tmp_path / "model", recipe)
    monkeypatch.setattr(calibrated_layer, "EXPERT_BYTES", 2 * 4 * 64**2)

    def quick(weights, moments, spec, dtype) -> QuantizedArray:
        return QuantizedArray(*mx.quantize(weights, group_size=spec.group, bits=spec.bits), spec)

    monkeypatch.setattr(calibrated_layer, "calibrated", quick)
    layer = sum(array.nbytes for array in block_of(opened(folder), 0, mx.float32).arrays)
    plan = plan_of(folder)
    calibration = Calibration(texts(40))
    mx.clear_cache()
    before = mx.get_active_memory()
    calibration.begin(opened(folder), opened(folder), tmp_path)
    peaks: dict[str, list[int]] = {"experts": [], "layer": []}
    honest = calibrated_layer.Layer._routed

    def peak(kind: str) -> None:
        peaks[kind].append(mx.get_peak_memory() - before)
        mx.reset_peak_memory()

    def routed(self, *args) -> None:
        peak("layer")
        honest(self, *args)
        peak("experts")

    monkeypatch.setattr(calibrated_layer.Layer, "_routed", routed)
    mx.reset_peak_memory()
    for index in range(3):
        calibration.layer(index, opened(folder), plan)
        peak("layer")
    # its weights, what is made of it (0.19), and what is in work
    assert max(peaks["experts"]) < 1.5 * layer, [each / layer for each in peaks["experts"]]
    # on the CPU device the packed experts are unpacked to run, beside the original ones: twice a layer in float32; and
    # two matrices are gathered and unpacked at once on two cores (decision 0009). Measured 3.2
    assert max(peaks["layer"]) < 3.5 * layer, [each / layer for each in peaks["layer"]]


def unpacked(folder: Path, to: Path) -> Path:
    """A copy whose packed matrices are plain ones of the same values."""
    to.mkdir()
    stored, tensors = mx.load(str(folder / "model.safetensors")), {}
    for name, array in stored.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" in stored:
            scales, biases = stored[f"{path}.scales"], stored[f"{path}.biases"]
            tensors[name] = mx.dequantize(array, scales, biases, group_size=32, bits=8)
        elif not name.endswith((".scales", ".biases")):
            tensors[name] = array
    mx.save_safetensors(str(to / "model.safetensors"), tensors)
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization"]
    (to / "config.json").write_text(json.dumps(raw))
    return to


def test_a_quantized_source_is_what_it_dequantizes_to(moe, tmp_path):
    source = pack(moe, tmp_path / "packed", 8)
    plain = unpacked(source, tmp_path / "plain")
    ours, theirs = (
        run(folder, texts(60), tmp_path / f"w{i}", stop=1) for i, folder in enumerate((source, plain))
    )
    assert ours.keys() == theirs.keys()
    same_codes = [mx.mean(ours[path].weight == theirs[path].weight).item() for path in ours]
    # packed products round in another order, which few codes notice
    assert min(same_codes) > 0.9, same_codes


def test_a_tokenizer_of_another_model_is_refused(moe, tmp_path):
    with pytest.raises(TokenizerError) as caught:
        run(moe, Corpus("test", ((1, 96), (2, 95)), ("text",) * 2), tmp_path / "work", stop=0)
    assert str(caught.value) == (
        f"the calibration text has token 96, but {moe} has only 96 rows; the tokenizer files belong to another model"
    )


def test_infinite_states_are_named(moe, tmp_path):
    files = sorted(moe.glob("*.safetensors"))
    tensors = read_tensors(files)
    name = "model.language_model.layers.0.mlp.shared_expert.down_proj.weight"
    tensors[name] = encode(np.full((32, 32), 3e38, np.float32))
    write_shards(moe, tensors, len(files))
    with pytest.raises(NumericsError) as caught:
        run(moe, texts(30), tmp_path / "work")
    assert str(caught.value) == (
        f"{moe}: layer 0: NaN or infinite activations while calibrating in float32: its weights are damaged, or too "
        "large for that"
    )


def test_damaged_states_are_named(moe, tmp_path):
    work = tmp_path / "work"
    run(moe, texts(30), work, stop=1)
    file = work / "states-1.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError) as caught:
        run(moe, texts(30), work, first=1)
    assert str(caught.value).startswith(f"{file}: the states of the interrupted calibration cannot be read (")
    assert str(caught.value).endswith("); delete the result's folder and begin again")


def test_the_digest_names_what_the_result_depends_on():
    every = {
        Calibration(texts(30)).digest,
        Calibration(texts(30, 9)).digest,
        Calibration(texts(30), mx.bfloat16).digest,
        Calibration(texts(30), mx.float32).digest,
    }
    assert len(every) == 4
    assert Calibration(texts(30)).digest == Calibration(texts(30)).digest


@pytest.mark.slow
def test_halves_the_divergence_of_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELOCAL_CACHE", str(tmp_path / "cache"))
    original = resolve(None)
    corpus = Corpus.built_in(original, "calibration", 16384, 512)
    convert(original, tmp_path / "plain", BitRecipe.open("4bit"), method="minmax")
    convert(original, tmp_path / "fitted", BitRecipe.open("4bit"), calibrator=Calibration(corpus))
    text = Corpus.built_in(original, "evaluation", 8192, 512)
    plain, fitted = (evaluate(tmp_path / name, original, text) for name in ("plain", "fitted"))
    assert fitted.model.nbytes == plain.model.nbytes
    chats = [quality.parts["chats"].kl_mean.value for quality in (plain, fitted)]
    assert fitted.kl_mean.value < 0.5 * plain.kl_mean.value and chats[1] < 0.5 * chats[0]
